"""The scores of a frontier: made once, on training examples, and kept in its folder.

Validation examples would favour the terms that happen to suit them, and sizes are judged by these examples afterwards.
Gradients on a GPU are not the same bits twice: a frontier that was interrupted between a cut and its recovery must find
the terms that it has cut, so it reads the scores again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor

from loralloc.adapter.terms import Terms
from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.frontier.orders import SAMPLES, Order, score_terms
from loralloc.reading import read_object
from loralloc.recipe.screen import Screen
from loralloc.tasks.base import TaskData
from loralloc.training.trainer import RunTrainer
from loralloc.training.trainer_batches import validation_batches

DEFAULT_ORDER: Order = "ablation"
"""From a quarter of the ranks downwards it has the lowest losses after recovery (docs/frontier.md)."""


def scores_of(
    folder: Path,
    asked: Order | None,
    terms: Terms,
    trainer: RunTrainer,
    data: TaskData,
    made_from: Mapping[str, str],
    screen: Screen,
) -> tuple[Order, Tensor]:
    """Score the terms of an adapter, or read the scores of an earlier call.

    Args:
        folder: Folder of the frontier.
        asked: The order; None for `DEFAULT_ORDER`, or for singular values if the model's loss of an example is not
            known.
        terms: The terms of the trainer's model.
        trainer: It collates the examples.
        data: The task's data.
        made_from: What scores depend on beside the order.
        screen: Told if the default order was not possible.

    Returns:
        The order, and the scores, [R] on the CPU, float64; those of terms that are zero but for rounding are -inf.

    Raises:
        UserError: The order that was asked for is not possible with this model.
    """
    order = asked or DEFAULT_ORDER
    kept, of = folder / "scores.json", {**made_from, "order": order}
    scores = terms.sigma if order == "singular_value" else _read(kept, of)
    if scores is None:
        model = trainer.model
        assert isinstance(model, PeftModel)
        try:
            scores = score_terms(order, model, terms, _batches(model, trainer, data))
        except UserError as error:
            if asked is not None:
                raise
            screen.note(f"{error}; so the terms with the smallest singular values are dropped first")
            order, scores = "singular_value", terms.sigma
        else:
            write_atomically(kept, json.dumps({"of": of, "scores": scores.tolist()}) + "\n")
    return order, scores.masked_fill(~terms.alive, -math.inf)


def digest_of(order: Order, scores: Tensor) -> str | None:
    """Fingerprint scores that are read again from the folder; None for singular values, which are computed anew."""
    return None if order == "singular_value" else hashlib.sha256(scores.numpy().tobytes()).hexdigest()[:16]


def _read(path: Path, of: Mapping[str, str]) -> Tensor | None:
    """The scores of an earlier call; None if there are none, or if they depend on something else."""
    try:
        record = read_object(path)
        if record["of"] != dict(of):
            return None
        scores: Any = record["scores"]
        return torch.tensor(scores, dtype=torch.float64)
    except (UserError, KeyError, TypeError, ValueError, RuntimeError):
        return None


def _batches(model: PeftModel, trainer: RunTrainer, data: TaskData) -> Sequence[Any]:
    """Batches of training examples to score terms on; of a stream its first ones."""
    examples = data.train if isinstance(data.train, Dataset) else Dataset.from_list(list(data.train.take(SAMPLES)))
    return validation_batches(examples, trainer.get_train_dataloader(), trainer.args, model)
