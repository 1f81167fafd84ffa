"""What an ALLoRA run remembers, and what it asks of an adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.naming import named, selecting
from loralloc.patterns import key_of


@dataclass(eq=False)
class Group:
    """Sites whose factors can be stacked.

    Attributes:
        sites: The sites.
        A: Their factors, [r, in] each. The optimizer holds the same objects, so they stay.
        B: Likewise, [out, r] each.
    """

    sites: Sequence[Site]
    A: Sequence[nn.Parameter]
    B: Sequence[nn.Parameter]
    _gates: Tensor | None = field(default=None, init=False)

    def gates(self, fixed: bool) -> Tensor:
        """Gates times scales, [n, r]; looked up once if they are `fixed`: for small layers that is most of the time."""
        if not fixed or self._gates is None or self._gates.device != self.A[0].device:
            self._gates = stacked([site.gate for site in self.sites]) * self.scales()
        return self._gates

    def scales(self) -> Tensor:
        """The fixed scales, [n, r]; 0 where a rank is closed for good."""
        return stacked([site.scale for site in self.sites])


@dataclass(eq=False)
class ALLoRAState:
    """What changes during a run.

    Attributes:
        sites: The gated layers.
        groups: The same, by shape and device.
        inner: State of the allocating method; None without one.
        before: The factors as they were before the optimizer's step (`hybrid`, `post`).
        stretch: What to multiply the next step with, less 1: s̄ for each A, s for the rows of each B (`post`).
        optimizer_seen: Whether the optimizer's name is known, and the warning given where it is due.
    """

    sites: Sequence[Site]
    groups: Sequence[Group]
    inner: Any = None
    before: list[Tensor] | None = None
    stretch: list[Tensor] = field(default_factory=list)
    optimizer_seen: bool = False

    def factors(self) -> list[Tensor]:
        """A and B of every site in turn, one group after the other."""
        return [factor for group in self.groups for pair in zip(group.A, group.B, strict=True) for factor in pair]


def groups_of(sites: Sequence[Site]) -> list[Group]:
    """Group sites by shape and device; those that have lost all ranks have nothing to scale."""
    groups: dict[tuple[int, int, int, torch.device], list[Site]] = {}
    for site in (site for site in sites if site.rank):
        groups.setdefault((site.rank, site.inputs, site.outputs, site.A.device), []).append(site)
    return [Group(of, [site.A for site in of], [site.B for site in of]) for of in groups.values()]


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """As `torch.stack`, without its view of every tensor: for many small ones, these take longer than the copy."""
    return torch.cat([*tensors]).view(len(tensors), *tensors[0].shape)


def check_dropout(sites: Sequence[Site]) -> None:
    """Refuse dropout: ALLoRA trains without."""
    found = [site for site in sites if site.dropout]
    if found:
        where = named([site.name for site in found], [site.name for site in sites if not site.dropout])
        raise UserError(
            f"{where}: lora_dropout is {found[0].dropout:g}, but ALLoRA trains without dropout: its gradients take "
            "over what dropout is for; set LoraConfig(lora_dropout=0.0)"
        )


def check_scales(sites: Sequence[Site]) -> None:
    """Refuse a scale other than 1: PEFT's scaling times the factor of the allocating method (`ablora` has one)."""
    wrong = [site for site in sites if not math.isclose(site.plan_scale, 1.0, rel_tol=1e-5)]
    if not wrong:
        return
    names: dict[str, list[str]] = {}
    for site in sites:
        names.setdefault(f"{_unscaled_alpha(site):g}", []).append(site.name)
    usual = max(names, key=lambda alpha: len(names[alpha]))
    pattern: dict[str, str] = {}
    for alpha in names.keys() - {usual}:
        others = [name for other in names if other != alpha for name in names[other]]
        ends = selecting(names[alpha], others)
        pattern |= {key_of(end, others): alpha for end in (ends if isinstance(ends, list) else names[alpha])}
    entries = ", ".join(f"{json.dumps(key)}: {pattern[key]}" for key in sorted(pattern))
    where = named([site.name for site in wrong], [site.name for site in sites if site not in wrong])
    raise UserError(
        f"{where}: the adapter is scaled by {wrong[0].plan_scale:g}, but ALLoRA has no scaling factor; set "
        f"LoraConfig(lora_alpha={usual}, use_rslora=False, alpha_pattern={{{entries}}}) (eta and the learning rate "
        "take its place)"
    )


def _unscaled_alpha(site: Site) -> float:
    """The lora_alpha with which a site would have the scale 1: its rank, or what the allocating method divides by."""
    share = site.scaling / site.plan_scale  # that divisor over the rank; the roots of both with rsLoRA
    return site.rank * (share**2 if site.layer.use_rslora.get(site.adapter, False) else share)
