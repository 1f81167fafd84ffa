"""From a rank plan to a fresh LoRA adapter."""

from __future__ import annotations

import copy
import re
from typing import Any

from peft import LoraConfig
from torch import nn

from loralloc.errors import UserError, closest
from loralloc.patterns import keyed
from loralloc.peft_layers import is_adapted, unwrapped
from loralloc.plan import RankPlan

DECIDED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
)
"""Fields of LoraConfig that a plan decides."""


def lora_config(plan: RankPlan, model: nn.Module, **settings: Any) -> LoraConfig:
    """Return the LoraConfig of a fresh adapter at the ranks of a plan, with the plan's scale.

        plan = RankPlan.load("runs/NAME/ranks.json")  # or allocation.plan
        model = get_peft_model(base, lora_config(plan, base, task_type="CAUSAL_LM"))

    Every module gets its rank in the plan; modules of rank 0 get no adapter. The scale of B·A is the plan's, whatever
    the rank.

    Args:
        plan: The ranks.
        model: The base model, without an adapter.
        settings: Other fields of LoraConfig: `lora_dropout`, `modules_to_save`, `task_type`, ...

    Raises:
        UserError: The plan belongs to another model, the model has an adapter, or a setting is the plan's to decide.
    """
    model = unwrapped(model)
    if is_adapted(model):
        raise UserError(
            f"{type(model).__name__} has an adapter already, and the plan is for one on the base model alone; load the "
            "base model anew, without an adapter"
        )
    if taken := [name for name in DECIDED if name in settings]:
        raise UserError(f"{', '.join(taken)}: the plan decides that; leave it out of lora_config(plan, model, ...)")
    _check_model(plan, model)
    kept = {name: planned for name, planned in plan.modules.items() if planned.rank > 0}
    return LoraConfig(
        **copy.deepcopy(settings),  # PEFT appends to the lists that it is given
        r=max(planned.rank for planned in kept.values()),
        target_modules=_targets(list(kept), model),
        rank_pattern=keyed({name: planned.rank for name, planned in kept.items()}),
        alpha_pattern=keyed({name: planned.scale * planned.rank for name, planned in kept.items()}),
    )


def _check_model(plan: RankPlan, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for name, planned in plan.modules.items():
        shape = _shape(modules.get(name))
        if shape != sorted((planned.inputs, planned.outputs)):
            found = f"there is no such module.{closest(name, modules)}" if shape is None else f"the model's is {shape}"
            raise UserError(
                f"the plan belongs to another model: {name} is {planned.inputs} x {planned.outputs}, {found}"
            )


def _shape(module: nn.Module | None) -> list[int] | None:
    """Inputs and outputs of a linear layer, the smaller first; a 4-bit weight is packed, and has another shape."""
    if isinstance(module, nn.Linear):
        return sorted((module.in_features, module.out_features))
    weight = getattr(module, "weight", None)
    return None if weight is None else sorted(weight.shape)


def _targets(kept: list[str], model: nn.Module) -> list[str] | str:
    """The modules to adapt: PEFT matches the ends of listed names, so only a pattern tells `fc` from `block.fc`."""
    others = {name for name, _ in model.named_modules()} - set(kept)
    if any(other.endswith(f".{name}") for name in kept for other in others):
        return "|".join(map(re.escape, kept))
    return kept
