"""Promises: a task is found by its name, and finding it costs no import of torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from loralloc.errors import UserError
from loralloc.tasks import TASKS, prepare
from loralloc.tasks.base import TaskData


def test_an_unknown_task_is_named_with_those_that_exist() -> None:
    message = r'No task "causal_lm". Tasks: sequence-classification, .*causal-lm, .*\. Did you mean "causal-lm"\?'
    nothing: Any = None
    with pytest.raises(UserError, match=message):
        prepare("causal_lm", nothing, nothing, 0)


def test_names_are_known_without_torch() -> None:
    code = "import sys; from loralloc.tasks import TASKS; print(sorted(TASKS), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert output.strip() == f"{sorted(TASKS)} False"


def test_a_task_is_dispatched_by_its_name(
    decoder: str,
    model_section: Callable[..., Any],
    data_section: Callable[..., Any],
    write: Callable[..., str],
) -> None:
    train = write([{"text": "a b c d"}] * 8)
    prepared = prepare("causal-lm", model_section(decoder), data_section(train, text="text"), 0)
    assert isinstance(prepared, TaskData)
    assert prepared.metric == "perplexity"
