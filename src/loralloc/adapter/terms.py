"""A trained adapter as a sum of rank-one terms; its best terms make a smaller adapter.

Every update is s · B A = Σᵢ σᵢ uᵢ vᵢᵀ, its singular value decomposition. Keeping some terms needs no training, so that
trying a budget costs one evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loralloc.methods.truncate import Part, balanced, decompose
from loralloc.plain_lora import PlainSite, plain_sites


@dataclass(frozen=True)
class Terms:
    """The rank-one terms of a plain LoRA adapter.

    Attributes:
        sites: Its layers.
        parts: U [out, k], σ [k] from large to small and V [in, k] of each layer's update.
    """

    sites: Sequence[PlainSite]
    parts: Sequence[Part]

    @classmethod
    def of(cls, model: nn.Module) -> Terms:
        """Decompose the active adapter of a model; in float64, so that equal factors give equal terms.

        Raises:
            UserError: There is no LoRA adapter, or it has layers that are not linear.
        """
        sites = list(plain_sites(model))
        return cls(sites, decompose([(site.A.double(), site.B.double() * site.scaling) for site in sites]))

    @property
    def ranks(self) -> list[int]:
        """Terms of each layer, k."""
        return [len(sigma) for _, sigma, _ in self.parts]

    @property
    def sigma(self) -> Tensor:
        """Singular values of all layers, one layer after the other, [R] on the CPU."""
        return torch.cat([sigma.cpu() for _, sigma, _ in self.parts])

    @property
    def costs(self) -> list[int]:
        """Parameters of one term of each layer, in + out."""
        return [site.A.shape[1] + len(site.B) for site in self.sites]

    @property
    def alive(self) -> Tensor:
        """Whether a term's singular value is above rounding, boolean [R] on the CPU."""
        return torch.cat([(sigma > sigma[:1] * torch.finfo(sigma.dtype).eps * 64).cpu() for _, sigma, _ in self.parts])

    @property
    def count(self) -> int:
        """Number of terms whose singular value is above rounding."""
        return int(self.alive.sum())

    def kept_ranks(self, keep: Tensor) -> list[int]:
        """Count the kept terms of each layer; `keep` is boolean [R]."""
        return [int(kept.sum()) for kept in keep.split(self.ranks)]

    def factors(self, keep: Tensor, scales: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Return each layer's balanced factors A [k, in] and B [out, k] of the kept terms.

        Args:
            keep: Boolean [R].
            scales: The scale of B A in each layer.
        """
        found = []
        for part, kept, scale in zip(self.parts, keep.split(self.ranks), scales, strict=True):
            A, B = balanced(*part)
            kept = kept.to(A.device)
            found.append((A[kept] / scale**0.5, B[:, kept] / scale**0.5))
        return found

    @torch.no_grad()
    def put(self, keep: Tensor) -> None:
        """Write the kept terms, boolean [R], into the model: a layer's term i becomes its rank i; others are 0."""
        for site, part, kept in zip(self.sites, self.parts, keep.split(self.ranks), strict=True):
            A, B = balanced(*part)
            kept, k, scale = kept.to(A.device), len(part[1]), site.scaling**0.5
            site.A.zero_()[:k] = (A * kept[:, None] / scale).to(site.A)
            site.B.zero_()[:, :k] = (B * kept / scale).to(site.B)

    @contextmanager
    def cut(self, keep: Tensor) -> Iterator[None]:
        """Inside, the model computes with the kept terms only, boolean [R]; its factors are restored afterwards."""
        before = [(factor, factor.detach().clone()) for site in self.sites for factor in (site.A, site.B)]
        self.put(keep)
        try:
            yield
        finally:
            with torch.no_grad():
                for factor, value in before:
                    factor.copy_(value)
