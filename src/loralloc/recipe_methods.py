"""The `method` section of a recipe: one class per method. A further method is one class here.

Imports neither torch nor transformers, so that `--help` stays fast.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def is_number(value: Any) -> bool:
    """Whether a value is a number, which a bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_phase(value: Any) -> Any:
    if is_number(value) and value >= 0 and (isinstance(value, int) or value < 1):
        return value
    raise ValueError("must be a fraction of the run below 1, such as 0.1, or a whole number of steps")


def _check_length(value: Any) -> Any:
    if is_number(value) and (value >= 2 if isinstance(value, int) else 0 < value <= 1):
        return value
    raise ValueError("must be a share of the training that follows, such as 0.5 or 1.0, or a number of steps from 2 on")


Count = Annotated[int, Field(ge=1)]
Number = int | float  # keeps 8 apart from 8.0, so that a resolved recipe reads as it was written
Positive = Annotated[Number, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Phase = Annotated[Number, BeforeValidator(_check_phase)]


class Section(BaseModel):
    """A mapping in a recipe: no unknown keys, nothing coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class BudgetConfig(Section):
    """What the ranks may cost at the end: exactly one of four units."""

    average_rank: Positive | None = Field(default=None, description="ranks per adapted layer, on average")
    total_rank: Count | None = Field(default=None, description="ranks of all adapted layers together")
    parameters: Count | None = Field(default=None, description="parameters of all kept ranks together")
    fraction: Annotated[Number, Field(gt=0, le=1)] | None = Field(
        default=None, description="fraction of the starting parameters"
    )


class AdaLoRAConfig(Section):
    """AdaLoRA: prune singular values by their importance while the budget falls."""

    name: Literal["adalora"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")
    warmup: Phase = Field(default=0.15, description="start at full rank: fraction of the run, or steps")
    cooldown: Phase = Field(default=0.45, description="end at the final budget: fraction of the run, or steps")
    interval: Count | None = Field(
        default=None, description="steps between two allocations; null: about 500 allocations over the run"
    )
    beta1: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.85, description="smoothing of the sensitivity")
    beta2: Annotated[float, Field(gt=0, lt=1)] = Field(default=0.85, description="smoothing of the uncertainty")
    importance: Literal["smoothed", "sensitivity", "magnitude"] = Field(
        default="smoothed", description="score of a rank: smoothed is sensitivity times uncertainty"
    )
    order: Literal["paper", "reference"] = Field(
        default="paper", description="score weights before the update (paper) or after it (reference code)"
    )
    penalty: Literal["reference", "paper"] = Field(
        default="reference", description="orthogonality penalty: mean norm (reference code) or summed squares (paper)"
    )
    gamma: Annotated[float, Field(ge=0)] = Field(default=0.1, description="weight of the penalty; 0 turns it off")
    parity: Literal["adam", "sgd", "none"] = Field(
        default="adam", description="optimizer whose LoRA learning rate is to fit; none is the paper's step"
    )


class AutoLoRAConfig(Section):
    """AutoLoRA: learn selection variables on held-out data, then train plain LoRA at the ranks they keep."""

    name: Literal["autolora"] = Field(description="the method")
    search: Annotated[Number, BeforeValidator(_check_length)] = Field(
        default=0.5, description="length of the search: share of the training that follows, or steps"
    )
    validation: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.3, description="share of the training data that the search learns the ranks on"
    )
    budget: BudgetConfig | None = Field(
        default=None, description="null: ranks with at least an equal share stay; or the largest shares under a budget"
    )
    mode: Literal["fast", "paper", "exact", "first_order", "reference"] = Field(
        default="fast", description="gradient of the selection variables; a step costs 3, 5, 5, 2 or 5 of LoRA"
    )
    logit_learning_rate: Annotated[float, Field(gt=0)] = Field(
        default=3e-4, description="learning rate of the selection variables"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.5, description="Adam's beta1 for them")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.999, description="Adam's beta2 for them")
    radius: Annotated[float, Field(gt=0)] = Field(
        default=0.01, description="how far weights move for the difference of gradients"
    )
    check_every: Count | None = Field(
        default=None, description="steps between two looks at the plan; null: about 50 looks over the search"
    )
    patience: Count | None = Field(
        default=None, description="end the search when the plan was the same at this many looks; null: never"
    )
    parity: bool = Field(default=True, description="start with LoRA's scale; false is the paper's, r times smaller")


class LoRAConfigSection(Section):
    """Plain LoRA, the baseline: every layer keeps rank lora.r."""

    name: Literal["lora"] = Field(description="the method")


MethodConfig = AdaLoRAConfig | AutoLoRAConfig | LoRAConfigSection  # a further method is one class here
METHODS: dict[str, type[Section]] = {
    get_args(method.model_fields["name"].annotation)[0]: method for method in get_args(MethodConfig)
}
