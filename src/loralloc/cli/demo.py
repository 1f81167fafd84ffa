"""`loralloc demo`: the main job, offline, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune a real pretrained encoder on real text, offline: AdaLoRA beside plain LoRA at the same budget.

    The task: from which area of Python's standard library does a docstring come? The data are made from the sources of
    the Python that runs this; the encoder comes with the extra `demo`.
    """
    from loralloc.cli import pipeline, terminal
    from loralloc.config import load_recipe
    from loralloc.recipes import list_recipes

    outcomes = {}
    for method in ("adalora", "lora"):
        folder = output / method
        recipe = load_recipe(list_recipes()[f"demo/{method}"], ["--output", str(folder)])
        outcomes[method] = pipeline.run(recipe, replace=True)
    terminal.show_comparison(outcomes)
