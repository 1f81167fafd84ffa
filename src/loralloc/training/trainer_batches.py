"""Batches of validation data in a Trainer, made as the Trainer makes its own.

Ranks are learned from the loss that the model returns for them. It returns none for the batches of trainers with a loss
of their own, such as TRL's for preferences, rewards and generated answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from transformers.utils import find_labels

from loralloc.errors import UserError
from loralloc.training.step_data import CollatedBatches, random_state_kept


def validation_batches(data: Any, training: Any, args: TrainingArguments, model: nn.Module) -> CollatedBatches:
    """Make batches that methods can draw by index.

    Args:
        data: Validation examples.
        training: The Trainer's loader of training data.
        args: The Trainer's arguments.
        model: The model, wrapped or not.

    Raises:
        UserError: The data are not in the form of the Trainer's training data, or nothing that the Trainer makes of
            such data has labels.
    """
    columns = getattr(training.dataset, "column_names", None)  # the Trainer has removed what forward() does not take
    collate = training.collate_fn
    if getattr(collate, "padding_free", False):  # TRL's, which joins examples: methods need one per row
        collate = replace(collate, padding_free=False)
    batches = CollatedBatches(data, collate, args.per_device_eval_batch_size, args.seed, columns)
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    labels = find_labels(type(inner))
    try:
        first = batches[0]
    except Exception as error:
        _refuse_unlabelled(training, labels, type(inner).__name__)
        raise UserError(
            f"the validation data of the method cannot be made into a batch ({type(error).__name__}: {error}); they "
            "must look like the Trainer's training data when it trains: tokenized, with labels where the collator adds "
            "none"
        ) from error
    if not _holds_any(first, labels):
        _refuse_unlabelled(training, labels, type(inner).__name__)
    return batches


def _refuse_unlabelled(training: Any, labels: list[str], model: str) -> None:
    """Refuse a Trainer if its own batches hold no labels; do nothing if they do, or cannot be looked at.

    Args:
        training: Its loader.
        labels: What the model calls labels.
        model: What the model is called.
    """
    try:
        with random_state_kept():
            batch = training.collate_fn([training.dataset[0]])
    except Exception:  # data without an index, or that need several rows
        return
    if not labels or _holds_any(batch, labels):
        return
    found = f"hold {', '.join(batch)}" if isinstance(batch, Mapping) else f"are {type(batch).__name__}s"
    raise UserError(
        f"the trainer's batches {found}, and no {' or '.join(labels)}, without which {model} returns no loss that "
        "ranks could be learned from; where the trainer computes a loss of its own, as TRL's do for preferences, "
        'rewards and generated answers, use AdaLoRA, ALLoRA, or ABLoRA with score="sensitivity" or "gate", which look '
        "at the training alone; elsewhere give its data labels"
    )


def _holds_any(batch: Any, labels: list[str]) -> bool:
    return isinstance(batch, Mapping) and any(name in batch for name in labels)
