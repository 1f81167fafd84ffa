"""Two processes over gloo: one decision for both, equal to that of one process with the doubled batch."""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import VOCABULARY, tiny_peft
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from trainers import (
    BATCH,
    adapter_tensors,
    build,
    language_batch,
    read_trace,
    sentences,
    train,
    train_until_killed,
    training_rows,
)

from loralloc import ABLoRA, AdaLoRA, ALLoRA, Budget, UserError, attach
from loralloc.methods.base import Method
from loralloc.training.run import AllocationRun

pytestmark = pytest.mark.slow

WORLD = 2
STEPS = 16
TWO_RANKS = AdaLoRA(Budget(average_rank=2))


def moving(validation: Sequence[Any]) -> ABLoRA:
    """Ranks that move after steps 3, 6 and 9."""
    return ABLoRA(Budget(average_rank=2), validation, warmup=4, interval=3, rounds=3, samples=12)


SEEDS_DIFFER = 17
"""Added to the seed of the second process, so that nothing agrees by chance."""


def checksum(model: nn.Module) -> str:
    """One number for all that training changes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


# A loop of one's own, on one process or on two.


@dataclass
class Loop:
    """A training loop over `STEPS` batches, each split over the processes.

    Attributes:
        method: The method.
        poison: (step, process) at which the loss is infinite; one process does the work of both.
        disagree: Whether the second process's scores are turned upside down after each step.
        wrapped: Whether the model is in DistributedDataParallel, which averages the gradients.
        averaged: Without it, whether the loop averages them itself, once it knows that the step is sound.
    """

    method: Method = TWO_RANKS
    poison: tuple[int, int] | None = None
    disagree: bool = False
    wrapped: bool = True
    averaged: bool = True

    def run(self, rank: int, world: int) -> dict[str, Any]:
        # P and Q are drawn differently; DDP takes those of the first process.
        torch.manual_seed(rank * SEEDS_DIFFER if self.wrapped else 0)
        model = tiny_peft("llama", **({"lora_alpha": 4} if isinstance(self.method, ALLoRA) else {})).train()
        run = attach(model, self.method, total_steps=STEPS)
        wrapped = DistributedDataParallel(model) if self.wrapped and world > 1 else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        events: list[dict[str, Any]] = []
        run.on_event = events.append
        masks, still, rows = [], [], sentences(BATCH * STEPS)
        for step in range(STEPS):
            before = [site.A.detach().clone() for site in run.sites]
            share = rows[BATCH * step : BATCH * (step + 1)][rank::world]
            batch = language_batch(share)
            weight = float((batch["labels"][:, 1:] != -100).sum())
            total = float((language_batch(rows[BATCH * step : BATCH * (step + 1)])["labels"][:, 1:] != -100).sum())
            loss = wrapped(**batch).loss * (weight * world / total)
            infinite = self.poison in ((step, rank), (step, rank + world))
            (loss * (torch.inf if infinite else 1.0)).backward()
            run.before_step()
            if world > 1 and not self.wrapped and self.averaged:
                average_(model)
            optimizer.step()
            if self.disagree and rank == 1:
                turn_scores_over(run)
            run.after_step(optimizer)
            optimizer.zero_grad()
            masks.append([(site.gate * site.scale != 0).int().tolist() for site in run.sites])
            still.append(all(torch.equal(a, site.A) for a, site in zip(before, run.sites, strict=True)))
        plan = run.finish()
        return {
            "ranks": plan.ranks,
            "bad_steps": run.bad_steps,
            "masks": masks,
            "still": [step for step, unmoved in enumerate(still) if unmoved],
            "events": events,
            "checksum": checksum(model),
        }


def average_(model: nn.Module) -> None:
    """Average the gradients that there are over both processes."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= WORLD


def turn_scores_over(run: AllocationRun) -> None:
    """Make the most important rank the least important."""
    for stack in run.state.stacks:
        stack.mean.copy_(stack.mean.max() - stack.mean)


# transformers' Trainer, on one process or on two.


def trainer_run(folder: Path, world: int, batch: int = BATCH, killed_at: int | None = None, **settings: Any) -> Any:
    """Train with `batch` samples a micro-batch over all processes; when killed, resume."""
    settings = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4, **settings}
    settings |= {"per_device_train_batch_size": batch // world, "trace": folder / "trace.jsonl"}
    if killed_at is not None:
        train_until_killed(folder, killed_at, **settings)
        dist.barrier()
        resume = str(folder / f"checkpoint-{(killed_at - 1) // 4 * 4}")
        trainer, allocation = build(folder, **settings)
        trainer.train(resume_from_checkpoint=resume)
    else:
        trainer, allocation = train(folder, **settings)
    assert allocation.plan is not None
    return {
        "ranks": allocation.plan.ranks,
        "bad_steps": allocation.plan.provenance["bad_steps"],
        "checksum": checksum(trainer.model),
        "wrapper": type(trainer.model_wrapped).__name__,
        "losses": [row["loss"] for row in training_rows(trainer)],
        "statistics": [[row["rank/total"], row["budget"]] for row in training_rows(trainer)],
    }


def classifier_run(folder: Path, world: int, cured: bool) -> Any:
    """A model whose loss ignores the number of items in the batch, which the Trainer multiplies by the processes."""
    model = tiny_peft("bert")
    if cured:
        model.get_base_model().accepts_loss_kwargs = False
    try:
        return trainer_run(folder, world, name="bert", model=model, max_grad_norm=0.0)
    except UserError as error:
        return {"refused": str(error)}


def refusal(run: Callable[[], Any]) -> Any:
    """The message that ends a run."""
    try:
        return run()
    except UserError as error:
        return {"refused": str(error)}


def evaluated_trainer(folder: Path, world: int, when: str) -> Any:
    """A model that is evaluated, or asked for predictions, before it is trained."""
    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH // world, "eval_on_start": when == "on start"}
    data = {"eval_dataset": sentences(BATCH, seed=1)}
    trainer, allocation = build(folder, extra=data, **settings)
    if when in ("evaluate", "predict"):
        getattr(trainer, when)(data["eval_dataset"])
    trainer.train()
    if when == "after":
        trainer.evaluate()
    assert allocation.plan is not None
    wrapper = type(trainer.model_wrapped).__name__
    return {"ranks": allocation.plan.ranks, "checksum": checksum(trainer.model), "wrapper": wrapper}


def poisoned_trainer(folder: Path, world: int) -> Any:
    """One token is worth infinity, and stands in one sample of the sixth batch."""
    model = tiny_peft("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[VOCABULARY - 1] = torch.inf
    rows = [{**row, "ids": [min(token, VOCABULARY - 2) for token in row["ids"]]} for row in sentences(BATCH * STEPS)]
    rows[5 * BATCH]["ids"][0] = VOCABULARY - 1
    return trainer_run(folder, world, model=model, data=rows, train_sampling_strategy="sequential")


SCENARIOS: dict[str, Callable[[Path, int, int], Any]] = {
    "loop": lambda folder, rank, world: Loop().run(rank, world),
    "loop, one bad step": lambda folder, rank, world: Loop(poison=(6, 1)).run(rank, world),
    "loop, scores disagree": lambda folder, rank, world: Loop(disagree=True).run(rank, world),
    "loop, bad step without DDP": lambda folder, rank, world: Loop(poison=(6, 1), wrapped=False).run(rank, world),
    "apart: loop": lambda folder, rank, world: refusal(lambda: Loop(wrapped=False, averaged=False).run(rank, world)),
    **{
        f"apart: {when}": lambda folder, rank, world, when=when: refusal(lambda: evaluated_trainer(folder, world, when))
        for when in ("evaluate", "predict")
    },
    **{
        f"evaluated {when}": lambda folder, rank, world, when=when: evaluated_trainer(folder, world, when)
        for when in ("on start", "after")
    },
    "loop, ablation": lambda folder, rank, world: Loop(moving([language_batch(sentences(12, seed=3))])).run(
        rank, world
    ),
    "loop, row scales": lambda folder, rank, world: Loop(ALLoRA(mode="hybrid", allocate=TWO_RANKS)).run(rank, world),
    "ablation, scores disagree": lambda folder, rank, world: Loop(
        moving([language_batch(sentences(12, seed=3 + rank))])
    ).run(rank, world),
    "trainer, ablation": lambda folder, rank, world: trainer_run(folder, world, method=moving(sentences(24, seed=3))),
    "trainer": lambda folder, rank, world: trainer_run(folder, world),
    "trainer, accumulation": lambda folder, rank, world: trainer_run(
        folder, world, batch=4, gradient_accumulation_steps=2
    ),
    "trainer, resumed": lambda folder, rank, world: trainer_run(folder, world, killed_at=11),
    "classifier": lambda folder, rank, world: classifier_run(folder, world, cured=False),
    "classifier, cured": lambda folder, rank, world: classifier_run(folder, world, cured=True),
    "trainer, one bad step": lambda folder, rank, world: poisoned_trainer(folder, world),
}


SHARED = [name for name in SCENARIOS if name != "classifier" and not name.startswith("apart")]


def in_one_of_two_processes(rank: int, folder: Path) -> None:
    """Run every scenario; write what came out."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT="29500", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=WORLD)
    results = {name: scenario(folder / name, rank, WORLD) for name, scenario in SCENARIOS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(results))
    gc.collect()  # wrappers hold on to the process group
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and the results of every scenario on each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(in_one_of_two_processes, args=(folder,), nprocs=WORLD)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The result of a scenario on one process with the whole batch."""
    folder = tmp_path_factory.mktemp("one")
    return lambda name: SCENARIOS[name](folder / name, 0, 1)


@pytest.mark.parametrize("name", SHARED)
def test_both_processes_end_with_the_same_adapter_and_plan(name: str, two: Any) -> None:
    first, second = (results[name] for results in two[1])
    assert first["ranks"] == second["ranks"]
    assert sum(first["ranks"].values()) == 12
    assert first["checksum"] == second["checksum"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("loop")])
def test_both_processes_close_the_same_ranks_at_every_step(name: str, two: Any) -> None:
    first, second = (results[name] for results in two[1])
    assert first["masks"] == second["masks"]
    assert first["events"] == second["events"]
    assert [event["event"] for event in first["events"]][-2:] == ["freeze", "finish"]


@pytest.mark.parametrize(
    "name",
    [
        *("loop", "loop, one bad step", "loop, ablation", "loop, row scales"),
        *("trainer", "trainer, accumulation", "trainer, ablation"),
    ],
)
def test_two_processes_decide_as_one_with_the_doubled_batch(name: str, two: Any, one: Any) -> None:
    both, alone = two[1][0][name], one(name)
    assert both["ranks"] == alone["ranks"]
    assert both["bad_steps"] == alone["bad_steps"]
    if "trainer" in name:
        assert (both["wrapper"], alone["wrapper"]) == ("DistributedDataParallel", "PeftModelForCausalLM")
        assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert both["statistics"] == alone["statistics"]


@pytest.mark.parametrize(("name", "step"), [("loop", 1), ("evaluate", 1), ("predict", 1)])
def test_processes_that_train_apart_are_stopped_both_and_at_once(name: str, step: int, two: Any) -> None:
    words = (
        f"the processes train apart: after step {step} the trained weights of process 1 are not those of process 0, "
        "because gradients are not averaged over the processes. trainer.evaluate() or trainer.predict() before "
        "trainer.train() makes accelerate leave the model out of DistributedDataParallel: call it after train(), or "
        "set eval_on_start=True. In a loop of your own, call what accelerator.prepare(model) or "
        "DistributedDataParallel(model) returns, not the model itself"
    )
    assert [results[f"apart: {name}"] for results in two[1]] == [{"refused": words}, {"refused": words}]


@pytest.mark.parametrize("when", ["on start", "after"])
def test_the_cures_for_it(when: str, two: Any) -> None:
    first, second = (results[f"evaluated {when}"] for results in two[1])
    assert first == second
    assert first["wrapper"] == "DistributedDataParallel"


def test_a_loss_that_ignores_the_number_of_items_is_refused(two: Any) -> None:
    words = (
        "the loss of BertForSequenceClassification ignores the number of items in a step, so with 1 accumulated "
        "batches on 2 processes gradients would be 2 times too large; set model.accepts_loss_kwargs = False on the "
        "base model before building the Trainer, which then takes the mean over batches itself"
    )
    assert [results["classifier"] for results in two[1]] == [{"refused": words}, {"refused": words}]


def test_the_cure_for_such_a_loss_gives_the_run_of_one_process(two: Any, one: Any) -> None:
    both, alone = two[1][0]["classifier, cured"], one("classifier, cured")
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert both["ranks"] == alone["ranks"]


@pytest.mark.parametrize("name", ["loop, one bad step", "loop, bad step without DDP"])
def test_a_bad_step_of_one_process_is_skipped_by_both(name: str, two: Any) -> None:
    for results in two[1]:
        assert results[name]["bad_steps"] == 1
        assert results[name]["still"] == [6]
        assert [e["step"] for e in results[name]["events"] if e["event"] == "bad_step"] == [6]
    assert [results["loop"]["bad_steps"] for results in two[1]] == [0, 0]
    assert [results["loop"]["still"] for results in two[1]] == [[], []]


def test_a_bad_step_under_the_trainer_is_counted_once_on_both(two: Any) -> None:
    folder, results = two
    assert [result["trainer, one bad step"]["bad_steps"] for result in results] == [1, 1]
    events = read_trace(folder / "trainer, one bad step" / "trace.jsonl")
    assert [event["step"] for event in events if event["event"] == "bad_step"] == [5]


def test_scores_that_disagree_lead_to_the_first_processs_decision(two: Any, one: Any) -> None:
    assert two[1][1]["loop, scores disagree"]["ranks"] == one("loop")["ranks"]
    assert two[1][1]["ablation, scores disagree"]["ranks"] == one("loop, ablation")["ranks"]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "trainer" in name])
def test_the_trace_is_written_once(name: str, two: Any) -> None:
    events = read_trace(two[0] / name / "trace.jsonl")
    steps = [event["step"] for event in events]
    assert steps == sorted(steps)
    kinds = [event["event"] for event in events]
    assert [kinds.count(kind) for kind in ("start", "freeze", "finish")] == [1, 1, 1]
    assert events[-1]["ranks"] == list(two[1][0][name]["ranks"].values())


def test_a_run_killed_and_resumed_on_two_processes_is_the_same_run(two: Any) -> None:
    folder, results = two
    for result in results:
        resumed, whole = result["trainer, resumed"], result["trainer"]
        assert resumed["checksum"] == whole["checksum"]
        assert resumed["losses"] == whole["losses"]
    traces = [(folder / name / "trace.jsonl").read_text() for name in ("trainer", "trainer, resumed")]
    assert traces[0] == traces[1]
