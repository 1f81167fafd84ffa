"""Write a model's prediction for every example of an evaluation to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loralloc.files import finite, write_atomically
from loralloc.tasks.base import TaskData
from loralloc.tasks.generation import Generation
from loralloc.training.trainer import RunTrainer


def write_predictions(path: Path, data: TaskData, trainer: RunTrainer, answered: Generation | None) -> None:
    """Write one JSON object a line, in the order of the examples of the last evaluation.

    Args:
        path: The file; it is replaced.
        data: The data that were evaluated, of a task that predicts something for each example.
        trainer: The trainer that evaluated them.
        answered: Generated answers, if there are any; they are then written instead of `data.predictions`.
    """
    rows: Iterable[Mapping[str, Any]]
    if answered is not None:
        pairs = zip(answered.prompts, answered.answers, strict=True)
        rows = [{"prompt": one.text, "references": one.references, "prediction": answer} for one, answer in pairs]
    else:
        assert data.predictions is not None
        assert trainer.evaluated is not None
        rows = data.predictions(trainer.evaluated)
    write_atomically(path, "".join(json.dumps(finite(dict(row)), ensure_ascii=False) + "\n" for row in rows))
