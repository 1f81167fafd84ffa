"""Cut an adapter folder of PEFT down to a budget, without its base model and without data."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loralloc._version import __version__
from loralloc.adapter.export import Factors, move_into_place, plain_config, ragged, without_left_out
from loralloc.adapter.folders import ADAPTER_WEIGHTS as WEIGHTS
from loralloc.adapter.folders import check_target, record_export, recorded_modules
from loralloc.adapter.stored import StoredAdapter, read_adapter
from loralloc.budget import Budget, Modules
from loralloc.errors import UserError
from loralloc.methods.truncate import Truncate, balanced, decompose, keep_largest
from loralloc.peft_layers import PREFIX
from loralloc.plain_lora import check_plain_config
from loralloc.plan import ModuleRank, RankPlan


@dataclass(frozen=True)
class Truncation:
    """What was written.

    Attributes:
        path: The folder.
        plan: Ranks before and after, of the modules that had any.
        kept: Share of Σ ‖ΔW‖²_F over all modules that is still there.
        modules: Number of adapted modules, those that had no rank included; None if the source has no record of them.
    """

    path: Path
    plan: RankPlan
    kept: float
    modules: int | None


def truncate_adapter(source: str | Path, output: str | Path, budget: Budget) -> Truncation:
    """Write a smaller copy of a plain LoRA adapter, with the largest singular values that the budget allows.

    Scales (`alpha_pattern`, `rank_pattern`, rsLoRA) are respected. The copy is a plain adapter in which each module has
    its own rank, with `ranks.json` beside it; heads that were saved with the adapter are copied.

    Args:
        source: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        output: Folder to write; an export that is there is replaced.
        budget: What the copy may cost. An `average_rank` counts all modules of an export of loralloc, and of other
            adapters those that have a rank. A `fraction` is relative to the source. Bytes follow from each tensor's
            dtype, which stays. A `share_of_base` is not possible: there is no base model here.

    Raises:
        UserError: The source is not plain LoRA, the budget is above what it holds, or the output is something else.
    """
    source, output = Path(source).resolve(), Path(output).resolve()
    check_target(output)
    if output == source:
        raise UserError(f"{source}: the adapter cannot be replaced by its own truncation; choose another --output")
    stored = _read(source)
    names = list(stored.factors)
    parts = decompose([(f.A.double(), f.B.double() * stored.scales[name]) for name, f in stored.factors.items()])
    values = [sigma for _, sigma, _ in parts]
    rankless = _rankless(source, stored)
    modules = _modules(values, list(stored.factors.values()), len(rankless or ()))
    ranks = [*modules.ranks]
    keep = keep_largest(values, budget, modules, budget.resolve(modules)).split(ranks)
    factors, kept_ranks = {}, {}
    for name, part, kept in zip(names, parts, keep, strict=True):
        A, B = balanced(*part)
        factors[name] = Factors(A[kept], B[:, kept])
        kept_ranks[name] = ModuleRank(int(kept.sum()), len(kept), A.shape[1], B.shape[0], stored.scales[name])
    provenance = {"loralloc": __version__, "base_model": stored.config.base_model_name_or_path}
    plan = RankPlan(Truncate.id, kept_ranks, budget.to_dict(), sum(ranks), provenance)
    energy = torch.cat(values).square()
    kept_energy = float(energy[torch.cat(keep)].sum() / energy.sum()) if energy.any() else 1.0
    _write(output, stored, factors, plan, rankless or ())
    return Truncation(output, plan, kept_energy, None if rankless is None else len(names) + len(rankless))


def _rankless(source: Path, stored: StoredAdapter) -> list[str] | None:
    """The adapted modules that have no rank; None if there is no record of them, or one of another adapter."""
    recorded = recorded_modules(source)
    if recorded is None or not stored.factors.keys() <= set(recorded):
        return None
    return [name for name in recorded if name not in stored.factors]


def _modules(values: Sequence[Tensor], factors: Sequence[Factors], rankless: int) -> Modules:
    """The modules as `Budget` needs them; bytes follow from the dtypes of the stored tensors."""
    sizes = [(f.A.shape[1], f.B.shape[0]) for f in factors]
    return Modules(
        ranks=[len(sigma) for sigma in values],
        parameters=[inputs + outputs for inputs, outputs in sizes],
        bytes=[
            inputs * f.A.element_size() + outputs * f.B.element_size()
            for f, (inputs, outputs) in zip(factors, sizes, strict=True)
        ],
        rankless=rankless,
    )


def _read(folder: Path) -> StoredAdapter:
    """Read an adapter; refuse what is not plain LoRA."""
    stored = read_adapter(folder)
    try:
        check_plain_config(stored.config)
    except UserError as error:
        raise UserError(f"{folder} is no plain LoRA, which alone can be truncated: {error}") from error
    if others := [key for key in stored.others if ".lora_" in key]:
        raise UserError(f"{folder}: {others[0]} is no factor of a linear layer: only plain LoRA can be truncated")
    return stored


def _write(
    output: Path, stored: StoredAdapter, factors: Mapping[str, Factors], plan: RankPlan, rankless: Sequence[str]
) -> None:
    """Write a temporary folder beside the output, then move it into place as a whole."""
    fields, kept = ragged(factors)
    tensors = without_left_out(stored.others, factors, kept)
    for name, factor in kept.items():
        for symbol, value in (("A", factor.A), ("B", factor.B)):
            dtype = getattr(stored.factors[name], symbol).dtype
            narrow = tensors[f"{PREFIX}{name}.lora_{symbol}.weight"] = value.to(dtype).contiguous()
            if not torch.isfinite(narrow).all():
                raise UserError(f"the update of {name} is too large for {dtype}, in which it is stored")
    config = plain_config(stored.config, fields, list(factors), kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "export"
        config.save_pretrained(str(folder))
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        plan.save(folder / "ranks.json")
        ranks = plan.ranks | dict.fromkeys(rankless, 0)
        record_export(folder, {"loralloc": __version__, "profile": "ragged", "ranks": ranks})
        move_into_place(folder, output)
