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


class ALLoRAConfig(Section):
    """ALLoRA: scale the gradient of each output row by its norm; the ranks are another method's, or all are kept."""

    name: Literal["allora"] = Field(description="the method")
    eta: Positive = Field(default=2.0, description="scale of a row that is still zero")
    mode: Literal["paper", "hybrid", "post"] = Field(
        default="paper", description="paper: scale gradients, fit for SGD; hybrid and post: fit for Adam"
    )
    allocate: Literal["adalora", "uniform", "random", "depth_linear", "truncate"] | None = Field(
        default=None, description="a method that allocates the ranks, with its defaults; null keeps them all"
    )
    budget: BudgetConfig | None = Field(default=None, description="the budget of the allocating method")


class UniformConfig(Section):
    """A control: the same rank in every layer, from the start."""

    name: Literal["uniform"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")


class RandomConfig(Section):
    """A control: ranks drawn at random, from the start."""

    name: Literal["random"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")
    rank_seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(default=0, description="seed of the draw of the ranks")


class DepthLinearConfig(Section):
    """A control: ranks proportional to the depth of the layer, from the start."""

    name: Literal["depth_linear"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")
    direction: Literal["increasing", "decreasing"] = Field(
        default="increasing", description="whether the last layers or the first get most"
    )


class TruncateConfig(Section):
    """A control: train every rank, keep the largest singular values at the end."""

    name: Literal["truncate"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")


class LoRAConfigSection(Section):
    """Plain LoRA, the baseline: every layer keeps rank lora.r."""

    name: Literal["lora"] = Field(description="the method")


MethodConfig = (  # a further method is one class here
    AdaLoRAConfig | ALLoRAConfig | UniformConfig | RandomConfig | DepthLinearConfig | TruncateConfig | LoRAConfigSection
)
METHODS: dict[str, type[Section]] = {
    get_args(method.model_fields["name"].annotation)[0]: method for method in get_args(MethodConfig)
}
