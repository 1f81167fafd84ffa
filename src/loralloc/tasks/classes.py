"""What a classifier learns for each row: one class of several, any number of classes, or a number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from loralloc.errors import UserError, closest
from loralloc.tasks.data import Splits, load_splits
from loralloc.tasks.rows import Rows, quote
from loralloc.tasks.spec import ClassificationData

_WHOLE = re.compile(r"-?\d{1,4000}")
"""A whole number that Python reads: it refuses texts of 4,301 digits."""

REGRESSION, ONE_LABEL, SEVERAL_LABELS = "regression", "single_label_classification", "multi_label_classification"
"""The problems, as transformers calls them."""


@dataclass(frozen=True)
class Goal:
    """What the head is to learn.

    Attributes:
        problem: The problem, as transformers calls it.
        targets: One target per row, for each split: the index of a class, a 0 or 1 for each class, or a number.
        names: The classes, in the order of the outputs; none in a regression.
        classes: Training rows of every class.
        reference: The accuracy of always answering the training data's most frequent class.
    """

    problem: str
    targets: list[list[Any]]
    names: Sequence[str] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the model's `from_pretrained`."""
        if self.problem == REGRESSION:
            return {"num_labels": 1, "problem_type": REGRESSION}
        index = {name: i for i, name in enumerate(self.names)}
        labels = {"id2label": dict(enumerate(self.names)), "label2id": index}
        return {"num_labels": len(self.names), "problem_type": self.problem, **labels}


def read_goal(data: ClassificationData, seed: int) -> tuple[Splits, Goal]:
    """Read the rows of a run and the targets to learn.

    Args:
        data: The recipe's data section. If the label column holds lists, rows have several labels.
        seed: Seed of the validation cut, which is stratified by class.

    Raises:
        UserError: The data are at fault.
    """
    column = str(data.label)
    if data.labels == REGRESSION:
        splits = load_splits(data, seed)
        return splits, Goal(REGRESSION, [numbers(rows, column) for rows in splits.all()])
    if data.labels is not None and isinstance(data.labels, str):
        raise UserError(
            f'data.labels must be a list of labels or "{REGRESSION}", found "{data.labels}".'
            f"{closest(data.labels, [REGRESSION])}"
        )
    splits = load_splits(data, seed, groups=lambda rows: _groups(rows, column))
    if _holds_lists(next(splits.all()), column):
        return splits, _several_labels(splits, data, column)
    return splits, _one_label(splits, data, column)


def read_targets(rows: Rows, data: ClassificationData, config: PreTrainedConfig) -> list[Any]:
    """Read the targets of an evaluation.

    Args:
        rows: The rows.
        data: The recipe's data section.
        config: The configuration of the trained model, which has its labels.

    Raises:
        UserError: The data are at fault, or have a label that the model does not have.
    """
    column = str(data.label)
    if config.problem_type == REGRESSION:
        return list(numbers(rows, column))
    index = {str(name): int(i) for i, name in sorted((config.id2label or {}).items())}
    if config.problem_type == SEVERAL_LABELS:
        return _to_vectors(rows, label_sets(rows, column), index, listed=False)
    return _to_indices(rows, label_names(rows, column), index, listed=False)


def _one_label(splits: Splits, data: ClassificationData, column: str) -> Goal:
    found = [label_names(rows, column) for rows in splits.all()]
    names = _label_set(data, found[0])
    index, listed = {name: i for i, name in enumerate(names)}, data.labels is not None
    pairs = zip(splits.all(), found, strict=True)
    targets = [_to_indices(rows, labels, index, listed=listed) for rows, labels in pairs]
    counts = Counter(targets[0])
    majority = counts.most_common(1)[0][0]
    return Goal(
        problem=ONE_LABEL,
        targets=targets,
        names=names,
        classes={name: counts[i] for name, i in index.items()},
        reference={"majority": targets[-1].count(majority) / len(targets[-1])},
    )


def _several_labels(splits: Splits, data: ClassificationData, column: str) -> Goal:
    found = [label_sets(rows, column) for rows in splits.all()]
    counts = Counter(name for labels in found[0] for name in labels)
    names = _label_set(data, list(counts))
    index, listed = {name: i for i, name in enumerate(names)}, data.labels is not None
    pairs = zip(splits.all(), found, strict=True)
    targets = [_to_vectors(rows, sets, index, listed=listed) for rows, sets in pairs]
    return Goal(SEVERAL_LABELS, targets, names, classes={name: counts[name] for name in names})


def _holds_lists(rows: Rows, column: str) -> bool:
    return isinstance(rows.values(column, "data.label")[0], list)


def _groups(rows: Rows, column: str) -> list[str]:
    """The groups by which a validation cut is stratified; rows with several labels are not stratified."""
    return [""] * len(rows) if _holds_lists(rows, column) else label_names(rows, column)


def class_weights(goal: Goal, wanted: Mapping[str, float] | str) -> list[float]:
    """The weight of every class in the training loss.

    Args:
        goal: What is learned.
        wanted: Weights by class, 1 for those left out; or `balanced`: n / (classes · rows of the class).

    Returns:
        One weight per class, in the order of the outputs.

    Raises:
        UserError: The rows have several labels each, or numbers; there is no such class; or one has no rows to balance.
    """
    if goal.problem != ONE_LABEL:
        found = "numbers" if goal.problem == REGRESSION else "several labels"
        raise UserError(
            f"data.class_weights weigh the one class of each row, and these rows have {found}; take them out"
        )
    if isinstance(wanted, str):
        if missing := [name for name in goal.names if not goal.classes[name]]:
            raise UserError(
                f"data.class_weights: balanced weighs every class by its training rows, and {missing[0]} has none; "
                "take it out of data.labels, or give weights"
            )
        return [sum(goal.classes.values()) / (len(goal.names) * goal.classes[name]) for name in goal.names]
    for name in wanted:
        if name not in goal.names:
            near = closest(name, goal.names)
            raise UserError(f"data.class_weights: there is no class {name}; there are {', '.join(goal.names)}.{near}")
    return [wanted.get(name, 1.0) for name in goal.names]


def label_names(rows: Rows, column: str) -> list[str]:
    """Read a column of class labels as names.

    Args:
        rows: The rows.
        column: Name of the column: texts, whole numbers or truth values.

    Returns:
        One name per row. A Hub data set that numbers its classes gives their names.

    Raises:
        UserError: No such column, a missing value, or a value of another type.
    """
    names = []
    values = rows.values(column, "data.label")
    for i, (value, classes) in enumerate(zip(values, rows.class_names(column), strict=True)):
        name = _name(value, classes)
        if name is None:
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.label) must hold a text or a whole number, '
                f"found {quote(value)}. For numbers to predict set data.labels: regression."
            )
        names.append(name)
    return names


def label_sets(rows: Rows, column: str) -> list[list[str]]:
    """Read a column with lists of class labels as names, see `label_names`.

    Raises:
        UserError: No such column, a missing value, or a value that is no list of labels, each once.
    """
    sets = []
    values = rows.values(column, "data.label")
    for i, (value, classes) in enumerate(zip(values, rows.class_names(column), strict=True)):
        names = [_name(one, classes) for one in value] if isinstance(value, list) else [None]
        if None in names or len(set(names)) < len(names):
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.label) must hold a list of labels, each a text or a whole '
                f"number and there once, found {quote(value)}"
            )
        sets.append([name for name in names if name is not None])
    return sets


def _name(label: object, classes: Sequence[str] = ()) -> str | None:
    """Name a label; None for what cannot be one."""
    if type(label) is int and 0 <= label < len(classes):
        return classes[label]
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():  # pandas writes 1.0 for 1 if values are missing
        return str(int(label))
    return str(label) if isinstance(label, int) or (isinstance(label, str) and label.strip()) else None


def sort_labels(names: Sequence[str]) -> list[str]:
    """Sort distinct labels: as numbers when all are whole numbers, else as texts; equal numbers as texts.

    The order is the same in every process, also that of `01` and `1`: it is the order of the model's outputs.

    >>> sort_labels(["10", "9", "9"])
    ['9', '10']
    >>> sort_labels(["b", "10", "9"])
    ['10', '9', 'b']
    >>> sort_labels(["1", "2", "01"])
    ['01', '1', '2']
    """
    distinct = set(names)
    whole = all(_WHOLE.fullmatch(name) for name in distinct)
    return sorted(distinct, key=lambda name: (int(name), name)) if whole else sorted(distinct)


def numbers(rows: Rows, column: str) -> list[float]:
    """Read a column of numbers to predict.

    Args:
        rows: The rows.
        column: Name of the column: numbers, or texts that write one.

    Returns:
        One finite number per row.

    Raises:
        UserError: No such column, a missing value, or a value that is not a finite number.
    """
    result = []
    for i, value in enumerate(rows.values(column, "data.label")):
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f'{rows.place(i)}: column "{column}" (data.label) must hold a finite number '
                f"(data.labels: regression), found {quote(value)}"
            )
        result.append(number)
    return result


def _label_set(data: ClassificationData, found: Sequence[str]) -> list[str]:
    names = sort_labels(found) if data.labels is None else [_name(label) or "" for label in data.labels]
    if len(names) < 2:
        raise UserError(
            f"Classification needs two labels or more; {data.train} has {', '.join(names) or 'none'}. "
            "For numbers to predict set data.labels: regression."
        )
    if len(set(names)) < len(names):
        raise UserError(f"data.labels names a label twice: {', '.join(names)}.")
    return names


def _to_indices(rows: Rows, names: Sequence[str], index: Mapping[str, int], *, listed: bool) -> list[int]:
    for i, name in enumerate(names):
        if name not in index:
            owner = "data.labels" if listed else "the labels of the training data"
            raise UserError(
                f'{rows.place(i)}: label "{name}" is not among {owner} ({quote(list(index))[1:-1]}).'
                f"{closest(name, index)}"
            )
    return [index[name] for name in names]


def _to_vectors(
    rows: Rows, sets: Sequence[Sequence[str]], index: Mapping[str, int], *, listed: bool
) -> list[list[float]]:
    """One number per class, 1 where a row has it."""
    for i, names in enumerate(sets):
        if not index.keys() >= set(names):
            _to_indices(rows.select([i] * len(names)), names, index, listed=listed)  # says which
    found = [{index[name] for name in names} for names in sets]
    return [[float(n in row) for n in range(len(index))] for row in found]
