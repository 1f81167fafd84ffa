"""Contenders whose blocks are compiled one by one, so that compiling does not take longer the more blocks there are.

Every block runs the same code, so one graph serves all of them but the first, which needs another because its input
needs no gradient. A contender that is compiled again during the run, even in a step that allocates, is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from contenders import CONTENDERS, INTERVAL, Setting, Step
from torch import nn


def build_compiled(name: str, setting: Setting) -> Step | str:
    """Build and check a contender with compiled blocks; return it, or why it cannot be timed."""
    torch._dynamo.config.recompile_limit = 64  # contenders share the code of a block
    try:
        step: Any = CONTENDERS[name](setting)
        before = graphs()
        for block in blocks(step.model):
            block.compile(dynamic=False)
        step.check()
        step.graphs = graphs() - before
        for _ in range(INTERVAL):
            step.step()
        if graphs() - before != step.graphs:
            raise AssertionError(f"compiled again in mid-run: {step.graphs} graphs have become {graphs() - before}")
    except Exception as error:  # whatever goes wrong is a result, and is kept
        return f"{type(error).__name__}: {error}"
    return step


def blocks(model: nn.Module) -> nn.ModuleList:
    """The blocks of a model: its first list of modules."""
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def graphs() -> int:
    """Graphs that have been compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
