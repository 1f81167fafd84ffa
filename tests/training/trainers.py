"""A Trainer around a tiny model, on sentences of uneven length: what the tests of the callback share."""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from models import LABELS, VOCABULARY, tiny_peft
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loralloc import AdaLoRA, Budget, RankAllocation
from loralloc.methods.base import Method

gc.freeze()  # the Trainer collects garbage at every start; what is imported by now need not be searched each time

STEPS = 24
"""Steps of a run unless told otherwise: warm-up until 3, falling budget until 14, final ranks from 15 on."""

BATCH = 8


class KilledError(Exception):
    """Stands for the signal that ends a process."""


class KillAt(TrainerCallback):
    """End the run before a step, as a kill would: nothing of the Trainer's or the callback's endings is run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            raise KilledError


class Compare(TrainerCallback):
    """Compute every step again and compare it with the gradients that the Trainer has."""

    def __init__(self, allocation: RankAllocation) -> None:
        self.allocation, self.equal = allocation, []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        data = self.allocation.run.data
        assert data is not None
        weights = data.weights()
        total = [torch.zeros_like(weight) for weight in weights]
        for loss in data.train_losses():
            found = torch.autograd.grad(loss, weights)
            total = [t + f for t, f in zip(total, found, strict=True)]
        slopes: list[Any] = [weight.grad for weight in weights]
        self.equal.append(all(torch.allclose(t, s, rtol=1e-4, atol=1e-7) for t, s in zip(total, slopes, strict=True)))


def sentences(count: int = 64, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sequences with a rule to learn, of 3 to 11 tokens; `label` is what a classifier is to find."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 12, (), generator=generator))
        first = int(torch.randint(1, VOCABULARY, (), generator=generator))
        ids = [(first + 3 * i) % (VOCABULARY - 1) + 1 for i in range(length)]
        rows.append({"ids": ids, "label": first % LABELS})
    return rows


def language_batch(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded token ids; the labels are the tokens."""
    length = max(len(row["ids"]) for row in rows)
    ids = torch.tensor([row["ids"] + [0] * (length - len(row["ids"])) for row in rows])
    labels = torch.where(ids == 0, -100, ids)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def class_batch(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded token ids; the labels are classes."""
    return {**language_batch(rows), "labels": torch.tensor([row["label"] for row in rows])}


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Arguments for a short run on the CPU, without reports and progress bars."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "logging_steps": 10,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**defaults, **settings})


def build(
    output: Path,
    name: str = "llama",
    *,
    model: nn.Module | None = None,
    method: Method | None = None,
    trace: Path | None = None,
    folder: Path | None = None,
    data: Any = None,
    callbacks: Sequence[TrainerCallback] = (),
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Trainer, RankAllocation]:
    """A Trainer with the callback, as a user builds one.

    Args:
        output: The output folder.
        name: The tiny model: `llama`, `bert` or `gpt2`.
        model: Another model than the tiny one of that name.
        method: Another method than AdaLoRA with two ranks a module.
        trace: The trace file.
        folder: The folder in which the callback keeps the run.
        data: Another training set.
        callbacks: Further callbacks, after ours.
        extra: Further arguments of the Trainer.
        settings: Training arguments that differ from `arguments`.
    """
    method = AdaLoRA(Budget(average_rank=2)) if method is None else method
    allocation = RankAllocation(method, trace=trace, folder=folder)
    trainer = Trainer(
        model=tiny_peft(name) if model is None else model,
        args=arguments(output, **settings),
        train_dataset=sentences() if data is None else data,
        data_collator=class_batch if name == "bert" else language_batch,
        callbacks=[allocation, *callbacks],
        **(extra or {}),
    )
    return trainer, allocation


def train(output: Path, name: str = "llama", **settings: Any) -> tuple[Trainer, RankAllocation]:
    """Build and train."""
    trainer, allocation = build(output, name, **settings)
    trainer.train()
    return trainer, allocation


def train_until_killed(output: Path, step: int, **settings: Any) -> tuple[Trainer, RankAllocation]:
    """Train until the process is killed before a step."""
    trainer, allocation = build(output, callbacks=[KillAt(step)], **settings)
    try:
        trainer.train()
    except KilledError:
        trainer.pop_callback(KillAt)
        return trainer, allocation
    raise AssertionError(f"the run ended before step {step}")


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if "lora_" in name or "modules_to_save" in name
    }


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two dictionaries hold the same tensors, bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def training_rows(trainer: Trainer) -> list[dict[str, Any]]:
    """The rows of the log that belong to training steps."""
    return [row for row in trainer.state.log_history if "loss" in row]


def read_trace(path: Path) -> list[dict[str, Any]]:
    """The events of a trace file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
