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


def _check_validation(value: Any) -> Any:
    if value == "validation" or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError("must be validation (the recipe's validation data), or a fraction to cut from train, such as 0.1")


Share = Annotated[float, Field(ge=0, lt=1)]
Phase = Annotated[Number, BeforeValidator(_check_phase)]
Held = Annotated[float | str, BeforeValidator(_check_validation)]


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


class ABLoRAConfig(Section):
    """ALoRA (AB-LoRA): score ranks by ablation, prune the worst, grow as many elsewhere."""

    name: Literal["ablora"] = Field(description="the method")
    budget: BudgetConfig = Field(description="one of average_rank, total_rank, parameters, fraction")
    validation: Held = Field(
        default="validation", description="data that ranks are scored on: validation, or a fraction cut from train"
    )
    warmup: Phase = Field(default=0.2, description="before the first round: fraction of the run, or steps")
    interval: Phase = Field(default=0.05, description="between rounds: fraction of the run, or steps")
    rounds: Annotated[int, Field(ge=0)] = Field(default=8, description="rounds of pruning and growing")
    n_prune: Count | None = Field(
        default=None, description="ranks that move in a round; null: as many as there are types of modules"
    )
    scope: Literal["global", "block"] = Field(default="global", description="where ranks move: anywhere, or in a block")
    mode: Literal["fast", "exact", "taylor"] = Field(
        default="fast", description="ablate where it could decide (fast), always (exact, the paper) or never (taylor)"
    )
    score: Literal["ablation", "gate", "sensitivity"] = Field(
        default="ablation", description="score of a rank; gate and sensitivity are the paper's comparisons"
    )
    samples: Count | None = Field(
        default=None, description="examples that ranks are scored on; null: 256, with mode exact the paper's 32"
    )
    resample: bool = Field(default=False, description="score each round on other examples")
    protect_rounds: Annotated[int, Field(ge=0)] = Field(
        default=0, description="rounds in which a new rank cannot be pruned again"
    )
    keep_budget: bool = Field(
        default=True,
        description="prune fewer where every module would lose a rank; false: the budget shrinks then, as in the paper",
    )


class ALLoRAConfig(Section):
    """ALLoRA: scale the gradient of each output row by its norm; the ranks are another method's, or all are kept."""

    name: Literal["allora"] = Field(description="the method")
    eta: Positive = Field(default=2.0, description="scale of a row that is still zero")
    mode: Literal["paper", "hybrid", "post"] = Field(
        default="paper", description="paper: scale gradients, fit for SGD; hybrid and post: fit for Adam"
    )
    allocate: Literal["adalora", "ablora", "uniform", "random", "depth_linear", "truncate"] | None = Field(
        default=None, description="a method that allocates the ranks, with its defaults; null keeps them all"
    )
    budget: BudgetConfig | None = Field(default=None, description="the budget of the allocating method")
    validation: Held | None = Field(
        default=None, description="data that ablora scores ranks on: validation, or a fraction cut from train"
    )


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
        default="fast", description="gradient of the selection variables; a step costs 3, 5, 6, 2 or 5 of LoRA"
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


MethodConfig = (  # a further method is one class here
    AdaLoRAConfig
    | ABLoRAConfig
    | AutoLoRAConfig
    | ALLoRAConfig
    | UniformConfig
    | RandomConfig
    | DepthLinearConfig
    | TruncateConfig
    | LoRAConfigSection
)
METHODS: dict[str, type[Section]] = {
    get_args(method.model_fields["name"].annotation)[0]: method for method in get_args(MethodConfig)
}
