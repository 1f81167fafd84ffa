"""What a gated model writes and reads: plain LoRA for everybody, and the gated factors for a run that resumes.

Stock PEFT knows no gates: it would save the factors as they are and drop the gates at loading, so that an adapter saved
in the middle of a run would be another function. As long as gates are attached, `model.save_pretrained` therefore
writes the adapter with the gates folded into B, as if the run ended there, under PEFT's own names; and the factors and
gates themselves into `FILE` beside it. `model.load_adapter` reads them back from there. A Trainer uses both for its
checkpoints, its `save_model` and its best model. `model.add_weighted_adapter`, which reads the factors, is refused.
PEFT's `get_peft_model_state_dict` is a function, and has uses in which gates beside the factors are right (a copy that
is put back later, accelerate's sharded checkpoints): who calls it is warned.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from loralloc.errors import UserError
from loralloc.gating import Site, folded, is_gated
from loralloc.naming import sorted_names
from loralloc.peft_layers import PREFIX
from loralloc.training.attached import check_kept
from loralloc.unpickling import nothing_unpickled

FILE = "gated_factors.safetensors"
"""A, B and gates of every site, by the names that they have in the model."""

_REPLACED = ("save_pretrained", "load_adapter")


class GatedFiles:
    """Saving and loading of a model while its gates are attached.

    Args:
        model: The `PeftModel`.
        sites: Its gated layers.

    Raises:
        UserError: Another adapter of the model is gated: saving and loading can serve one alone.
    """

    def __init__(self, model: PeftModel, sites: Sequence[Site]) -> None:
        self._model, self._sites = model, sites
        _check_alone(model, sites[0].adapter)
        for name in _REPLACED:
            setattr(model, name, getattr(self, name))
        model.base_model.add_weighted_adapter = self.add_weighted_adapter  # type: ignore[assignment]
        self._warning = model.register_state_dict_pre_hook(_warn_of_gates)

    def close(self) -> None:
        """Leave saving and loading to PEFT: the gates are folded."""
        for name in _REPLACED:
            vars(self._model).pop(name, None)
        vars(self._model.base_model).pop("add_weighted_adapter", None)
        self._warning.remove()

    @torch.no_grad()
    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As PEFT's, with the gates folded; the gated factors beside it.

        Raises:
            UserError: The scale of the adapter has changed.
        """
        if self._sites[0].is_deleted:
            self.close()
            return self._model.save_pretrained(str(save_directory), *args, **kwargs)
        check_kept(self._sites)
        stock = type(self._model).save_pretrained
        arguments = inspect.signature(stock).bind(self._model, str(save_directory), *args, **kwargs).arguments
        arguments.update(arguments.pop("kwargs", {}))
        tensors = arguments.get("state_dict") or self._model.state_dict()
        adapter = self._sites[0].adapter
        with sorted_names(self._model.peft_config[adapter]):
            stock(**{**arguments, "state_dict": self._folded(tensors)})  # type: ignore[arg-type]
        if arguments.get("is_main_process", True) and adapter in (arguments.get("selected_adapters") or [adapter]):
            gated = {key: tensors[key].contiguous().cpu() for site in self._sites for key in _keys(site)}
            save_file(gated, self._place(save_directory) / FILE)

    def load_adapter(self, model_id: str | Path, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's; if the gated adapter is loaded, its gated factors are restored as well.

        Raises:
            UserError: The folder has none: it was not saved while gates were attached.
        """
        if self._sites[0].is_deleted:
            self.close()
            return self._model.load_adapter(str(model_id), adapter_name, *args, **kwargs)
        path = self._place(model_id) / FILE
        if adapter_name == self._sites[0].adapter and not path.is_file():
            raise UserError(
                f"{model_id} has no {FILE}, and the gates of the attached rank allocation would change what its "
                "adapter computes; load it into a model without an allocation, or under another adapter_name"
            )
        with nothing_unpickled("give a folder with adapter_model.safetensors"):
            result = type(self._model).load_adapter(self._model, str(model_id), adapter_name, *args, **kwargs)
        if adapter_name == self._sites[0].adapter:
            self._model.load_state_dict(load_file(path), strict=False)
            result.missing_keys.clear()
        return result

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """As PEFT's, which mixes factors as they are.

        Raises:
            UserError: The gated adapter is among those that are mixed.
        """
        if self._sites[0].adapter in adapters and not self._sites[0].is_deleted:
            raise UserError(
                f'PEFT would mix the factors of "{self._sites[0].adapter}" without the gates of the attached rank '
                "allocation; finish() it first"
            )
        base: Any = self._model.base_model
        type(base).add_weighted_adapter(base, adapters, *args, **kwargs)

    def _place(self, directory: str | Path) -> Path:
        """Where PEFT keeps the adapter in a folder."""
        adapter = self._sites[0].adapter
        return Path(directory) if adapter == "default" else Path(directory) / adapter

    def _folded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dictionary of plain LoRA."""
        plain = dict(tensors)
        for site in self._sites:
            keys = _keys(site)
            A, B, gate = (plain[key] for key in keys)
            plain[keys[0]], plain[keys[1]] = folded(A, B, gate, site.full_scale.to(gate.device), site.scaling)
            del plain[keys[2]]
        return plain


def _warn_of_gates(*_: Any) -> None:
    """Warn where PEFT makes a dictionary of the adapter of what `state_dict()` returns."""
    frame: Any = sys._getframe()
    depth = 1
    while frame is not None and frame.f_code is not get_peft_model_state_dict.__code__:
        frame, depth = frame.f_back, depth + 1
    if frame is not None:
        warnings.warn(
            "get_peft_model_state_dict returns the factors without the gates of the attached rank allocation, and the "
            "gates beside them: for this model, while it trains. Stock PEFT would load a file of it as another "
            "adapter, without a word; write files with model.save_pretrained, or call finish() first",
            stacklevel=depth + 1,
        )


def _check_alone(model: PeftModel, adapter: str) -> None:
    """Refuse a second allocation on one model."""
    for other in model.peft_config:
        if other != adapter and is_gated(model, other):
            raise UserError(
                f'a rank allocation is attached already, to the adapter "{other}" of the same model; finish() it '
                f'before "{adapter}" gets one, or load the base model anew for "{adapter}"'
            )


def _keys(site: Site) -> tuple[str, str, str]:
    """Names of A, B and the gate in the model's state dictionary."""
    layer = PREFIX + site.name
    return (
        f"{layer}.lora_A.{site.adapter}.weight",
        f"{layer}.lora_B.{site.adapter}.weight",
        f"{layer}.lora_gate.{site.adapter}",
    )
