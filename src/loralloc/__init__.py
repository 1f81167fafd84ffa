"""Fine-tune language models with LoRA ranks that allocate themselves.

    from loralloc import AdaLoRA, Budget, RankAllocation, export_adapter

The names below are the public API. They are loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loralloc._version import __version__

if TYPE_CHECKING:
    from loralloc.adapter.export import export_adapter
    from loralloc.adapter.from_plan import lora_config
    from loralloc.adapter.truncation import truncate_adapter
    from loralloc.budget import Budget
    from loralloc.errors import UserError
    from loralloc.methods.ablora import ABLoRA
    from loralloc.methods.adalora import AdaLoRA
    from loralloc.methods.allora import ALLoRA
    from loralloc.methods.autolora import AutoLoRA
    from loralloc.methods.controls import DepthLinear, Random, Uniform
    from loralloc.methods.truncate import Truncate
    from loralloc.plan import RankPlan
    from loralloc.sharding import kept_whole
    from loralloc.training.callback import RankAllocation
    from loralloc.training.run import attach

__all__ = [
    "ABLoRA",
    "ALLoRA",
    "AdaLoRA",
    "AutoLoRA",
    "Budget",
    "DepthLinear",
    "Random",
    "RankAllocation",
    "RankPlan",
    "Truncate",
    "Uniform",
    "UserError",
    "__version__",
    "attach",
    "export_adapter",
    "kept_whole",
    "lora_config",
    "truncate_adapter",
]

_HOME = {
    "ABLoRA": "loralloc.methods.ablora",
    "ALLoRA": "loralloc.methods.allora",
    "AdaLoRA": "loralloc.methods.adalora",
    "AutoLoRA": "loralloc.methods.autolora",
    "Budget": "loralloc.budget",
    "DepthLinear": "loralloc.methods.controls",
    "Random": "loralloc.methods.controls",
    "RankAllocation": "loralloc.training.callback",
    "RankPlan": "loralloc.plan",
    "Truncate": "loralloc.methods.truncate",
    "Uniform": "loralloc.methods.controls",
    "UserError": "loralloc.errors",
    "attach": "loralloc.training.run",
    "export_adapter": "loralloc.adapter.export",
    "kept_whole": "loralloc.sharding",
    "lora_config": "loralloc.adapter.from_plan",
    "truncate_adapter": "loralloc.adapter.truncation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loralloc' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
