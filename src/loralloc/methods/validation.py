"""Checks of validation data, whichever method uses them: that there are examples, usable batches, and a loss.

Each check runs as early as possible: of the data when the method is made, of a batch when it is drawn, of its labels
and its loss in the first step. Methods handle later losses that are not finite themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from loralloc.errors import UserError

IGNORED = -100
"""The label of a position that is not learned; the convention of torch and transformers."""

NO_LABELS = "the validation batch has no labels (all are -100); give examples with something to learn"


def check_validation(method: str, validation: Any) -> None:
    """Refuse validation data that cannot be drawn by index.

    Args:
        method: What the method is called.
        validation: What it was given: examples in a Trainer, batches in a loop of one's own.

    Raises:
        UserError: There are none, they have no index, they are empty, or they are one example instead of many.
    """
    cure = f"pass {method}(validation=...), examples that are held out of the training data"
    if validation is None:
        raise UserError(f"{method} needs validation data; {cure}")
    if isinstance(validation, Mapping):
        keys = ", ".join(map(str, list(validation)[:3])) or "nothing"
        raise UserError(
            f"the validation data of {method} are one mapping ({type(validation).__name__} of {keys}), and it draws "
            f"examples by index; {cure}: a single batch in a list, [batch]; one split of a DatasetDict; columns as "
            "datasets.Dataset.from_dict(columns)"
        )
    if isinstance(validation, str | bytes):
        raise UserError(f"the validation data of {method} are a text, {validation!r:.60}; {cure}, loaded from there")
    if not isinstance(validation, Sized) or not callable(getattr(type(validation), "__getitem__", None)):
        raise UserError(
            f"{method} draws validation data by index, and {type(validation).__name__} has none; {cure}, as a list or "
            "a data set (the batches of a loader: list(loader))"
        )
    if not len(validation):
        raise UserError(f"the validation data of {method} are empty; {cure}")
    first = validation[0] if isinstance(validation, list | tuple | range) else {}  # others may do work for it
    if first is None or isinstance(first, int | float):
        raise UserError(
            f"the validation data of {method} hold {type(first).__name__} ({first!r}, ...), which is no example; {cure}"
        )


def check_batch(batch: Any) -> None:
    """Refuse what a model cannot be called with.

    Raises:
        UserError: The batch is no mapping, or holds no tensor.
    """
    if isinstance(batch, Mapping) and any(_holds_tensor(value) for value in batch.values()):
        return
    what = type(batch).__name__
    if isinstance(batch, Mapping):
        what += " of " + (", ".join(f"{key} ({type(value).__name__})" for key, value in batch.items()) or "nothing")
    raise UserError(
        f"a validation batch must be a mapping of tensors, such as input_ids and labels, and this one is a {what}; in "
        "a loop of your own, validation holds batches as the model takes them (those of a loader: list(loader)), in a "
        "Trainer it holds examples"
    )


def _holds_tensor(value: Any) -> bool:
    """Whether an argument of a model is a tensor, or several."""
    return isinstance(value, Tensor) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def check_labels(batch: Mapping[str, Any]) -> None:
    """Refuse a batch from which nothing can be learned.

    Raises:
        UserError: All its labels are -100.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel():
        return
    if bool((labels == IGNORED).all()):
        raise UserError(NO_LABELS)


def loss_of(output: Any) -> Tensor:
    """Return the loss that a model has computed.

    Raises:
        UserError: It has computed none.
    """
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise UserError("the model returned no loss: batches must hold labels (or what the model's loss needs)")
    return loss


def check_loss(loss: Tensor) -> None:
    """Refuse a loss from which nothing can be learned.

    Raises:
        UserError: It is not finite.
    """
    if not torch.isfinite(loss).all():
        raise UserError(
            f"the model's loss of the first validation batch is {loss.item():g}, and from that no ranks can be "
            "learned; look for labels that are NaN, or all -100 but the first position's, for infinite inputs, and for "
            "fp16 that overflows (use bf16)"
        )
