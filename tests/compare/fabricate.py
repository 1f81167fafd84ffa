"""Made-up comparisons: recipes whose models and data need not be there, and run folders that nobody has trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cli.command import RECIPE

from loralloc.compare.cells import plan_cells
from loralloc.compare.folder import CompareFolder
from loralloc.compare.grid import Cell, Shapes
from loralloc.plan import ModuleRank, RankPlan
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe, load_recipe

MODULES = {"layer.0.query": (16, 16), "layer.0.dense": (16, 32), "layer.1.query": (16, 16), "layer.1.dense": (16, 32)}
SHAPES = Shapes(
    MODULES,
    train=48,
    validation=21,
    test=15,
    steps=16,
    base_parameters=10_000,
    metric="accuracy",
    greater_is_better=True,
    depends_on={"data": {"test": {"rows": 15, "sha256": "made up"}}, "base": {"tensors": 4, "sha256": "made up"}},
)
ROWS = 15

Losses = Callable[[Cell], Sequence[float] | str]
"""The losses of a cell's test rows, or why it has failed."""


def recipe_for(folder: Path, *words: str, text: str = RECIPE, test: str | None = "test.jsonl") -> Recipe:
    """A recipe of AdaLoRA at average rank 2, capacity 4."""
    path = folder / "recipe.yaml"
    path.write_text(text.format(encoder="encoder", data="data").replace("output: run", f"output: {folder}/out"))
    return load_recipe(path, [*words, *(["--data.test", test] if test else [])])


def cells_of(recipe: Recipe, shapes: Shapes = SHAPES) -> list[Cell]:
    return plan_cells(recipe, shapes, CompareFolder.of(recipe).runs)


def uneven(ranks: Sequence[int]) -> RankPlan:
    modules = {
        name: ModuleRank(rank, 4, *sizes, scale=2.0) for (name, sizes), rank in zip(MODULES.items(), ranks, strict=True)
    }
    return RankPlan("made-up", modules)


def fabricate(recipe: Recipe, losses: Losses, cells: Sequence[Cell] | None = None) -> CompareFolder:
    """Write what the runs of a comparison would have left."""
    folder = CompareFolder.of(recipe)
    folder.create(recipe, SHAPES.depends_on)
    for cell in cells_of(recipe) if cells is None else cells:
        found = losses(cell)
        if isinstance(found, str):
            folder.fail(cell.name, found, final=True)
        else:
            write_run(folder.run(cell.name), cell, np.array(found))
    return folder


def write_run(run: RunFolder, cell: Cell, losses: np.ndarray, **changed: Any) -> None:
    run.create(cell.recipe)
    loss = float(losses.mean())
    figures = {"loss": loss, "accuracy": 1 - loss / 10}
    metrics = {
        "validation": figures,
        "test": figures,
        "train_seconds": 2.0,
        "processor_seconds": 4.0 if cell.contender.id == "adalora" else 3.0,
        "final_parameters": cell.point.parameters,
        **changed,
    }
    run.write_json(run.metrics, metrics)
    run.write_json(run.losses, {"split": "test", "losses": losses.tolist()})
    steps = range(4, 17, 4)
    rows: list[Mapping[str, Any]] = []
    for step in steps:
        seconds = metrics["processor_seconds"] * step / 16
        rows.append({"step": step, "loss": 1.0, "memory_mib": 100.0 + step, "processor_seconds": seconds})
        rows.append({"step": step, "eval_loss": loss + 1 - step / 16})
    run.log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = cell.contender.kind in ("baseline", "peer")
    uneven((2, 2, 2, 2) if plain else (4, 0, 4, 1) if cell.seed % 2 else (0, 4, 3, 2)).save(run.plan)
    run.adapter.mkdir()
    (run.adapter / "adapter_model.safetensors").write_bytes(b"x" * 4000)


def noisy(better: Mapping[str, float], seeds: float = 0.0, rows: float = 0.1) -> Losses:
    """Losses with effects of rows, of seeds within a contender, and noise; some contenders are better by so much."""

    def made(cell: Cell) -> Sequence[float]:
        shared = np.random.default_rng(99).normal(1.0, 0.3, ROWS)
        key = sum(ord(letter) * place for place, letter in enumerate(cell.contender.id, 1))
        own = np.random.default_rng([key, cell.seed])
        penalty = abs(np.log(cell.learning_rate / 1e-2))
        lift = own.normal(0, seeds) if seeds else 0.0
        return list(shared - better.get(cell.contender.id, 0.0) + lift + own.normal(0, rows, ROWS) + penalty)

    return made
