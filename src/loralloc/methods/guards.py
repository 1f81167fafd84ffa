"""What several methods ask of an adapter before they begin, and of a loop. Refusals of modules name all of them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.naming import excluding, named

STARTS_AT_ZERO = (True, "gaussian", "eva")
"""Values of `init_lora_weights` with which a fresh B is zero; with the others that can be attached, it is not."""

FROM_THE_START = "start from a fresh adapter, or finish the run it belongs to from its checkpoint"
"""Advice for a trained adapter, from methods that need a fresh one."""


def check_fresh(sites: Sequence[Site], reason: str, cure: str, closed: Sequence[Tensor] | None = None) -> None:
    """Refuse an adapter whose update is not zero.

    Args:
        sites: The gated layers.
        reason: Why the method does not allow that.
        cure: What to do with an adapter that has been trained.
        closed: Boolean [r] of each site: the ranks that must be fresh; None for all.

    Raises:
        UserError: With the modules whose B is not zero.
    """
    masks = [slice(None)] * len(sites) if closed is None else closed
    found = [site.name for site, mask in zip(sites, masks, strict=True) if site.B.detach()[:, mask].any()]
    if not found:
        return
    where = named(found, [site.name for site in sites if site.name not in found])
    start = sites[0].start
    if start in STARTS_AT_ZERO:
        raise UserError(f"{where}: the adapter has been trained already (B is not zero), and {reason}; {cure}")
    shown = f'"{start}"' if isinstance(start, str) else start
    raise UserError(
        f"{where}: B is not zero with init_lora_weights={shown}, trained or not, and {reason}; use "
        "LoraConfig(init_lora_weights=True), under which an adapter starts as no change of the model"
    )


def check_drawn_at_random(sites: Sequence[Site], reason: str) -> None:
    """Refuse an adapter whose A was computed from data.

    Args:
        sites: The gated layers.
        reason: Why the method does not allow that.

    Raises:
        UserError: It was.
    """
    if sites[0].start == "eva":
        raise UserError(
            f'init_lora_weights="eva" computes A from data, and {reason}; use LoraConfig(init_lora_weights=True), or a '
            "method that trains A as it is, such as ABLoRA"
        )


def check_capacity(sites: Sequence[Site], reason: str) -> None:
    """Refuse modules with more ranks than dimensions.

    Args:
        sites: The gated layers.
        reason: Why the method does not allow that.

    Raises:
        UserError: With all such modules.
    """
    found = {site.name: min(site.inputs, site.outputs) for site in sites if site.rank > min(site.inputs, site.outputs)}
    if not found:
        return
    others = [site.name for site in sites if site.name not in found]
    least = min(found.values())
    cure = f"lower LoraConfig.r (lora.r in a recipe) to {least}"
    if others:
        left_out = excluding(list(found), others, sites[0].left_out)
        cure = f"leave them out, LoraConfig({left_out}) (lora.exclude_modules in a recipe), or {cure}"
    dimensions = ", ".join(map(str, sorted(set(found.values()))))
    rank = max(site.rank for site in sites if site.name in found)
    where = named(list(found), others)
    raise UserError(f"{where}: rank {rank} is above the smaller dimension ({dimensions}), and {reason}; {cure}")


def gradients_gone(use: str) -> UserError:
    """The refusal of a loop that clears gradients which are used after the optimizer's step.

    Args:
        use: What they are used for: a clause that ends with them.
    """
    return UserError(f"{use}, which are gone: call run.after_step(optimizer) before optimizer.zero_grad()")


def is_cleared(parameter: Tensor, version: int) -> bool:
    """Whether a parameter has lost its gradient since, or holds zeros that were written over it.

    Args:
        parameter: A parameter that had a gradient.
        version: The gradient's `_version` then: `zero_grad(set_to_none=False)` writes, torch's optimizers do not.
    """
    gradient = parameter.grad
    return gradient is None or (gradient._version != version and not gradient.any())
