"""Whether the adapter is still what the run has attached its gates to: PEFT's own verbs work on it in the meantime.

A verb for a moment, such as `with model.disable_adapter()`, is none of the run's business. What is left behind is: a
step that does not train the adapter would let a method judge ranks by nothing, and a scale that has changed would be
in the file of an adapter but not in what was trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from loralloc.errors import UserError
from loralloc.gating import Site
from loralloc.plain_lora import scale_changed


def check_trained(sites: Sequence[Site]) -> None:
    """Refuse a step that would not train the adapter. PEFT's verbs change all layers alike, so the first one tells.

    Args:
        sites: The gated layers.

    Raises:
        UserError: The adapter is deleted, merged, disabled, or not active, or its scale has changed.
    """
    layer, adapter = sites[0].layer, sites[0].adapter
    check_kept(sites[:1])
    state, cure = "", ""
    if adapter in layer.merged_adapters:
        state, cure = "merged into the base weights", "unmerge_adapter()"
    elif layer.disable_adapters:
        state, cure = "disabled", "enable_adapter_layers()"
    elif adapter not in layer.active_adapters:
        state, cure = f"not active (active: {', '.join(layer.active_adapters)})", f'set_adapter("{adapter}")'
    if state:
        raise UserError(
            f'the adapter "{adapter}" of the rank allocation is {state}, so this step does not train it; call '
            f"model.{cure} before the forward pass"
        )


def check_kept(sites: Sequence[Site]) -> None:
    """Refuse to save or to finish an adapter that is no longer the one that was trained.

    Args:
        sites: The gated layers.

    Raises:
        UserError: The adapter is deleted, or its scale has changed.
    """
    for site in sites:
        if site.is_deleted:
            raise UserError(
                f'the adapter "{site.adapter}" has been deleted, and the gates of the rank allocation with it; add an '
                "adapter and attach the method to it anew"
            )
        if site.scaling != site.attached_scaling:
            raise scale_changed(site.adapter, site.attached_scaling, site.scaling)


def check_unmerged(sites: Sequence[Site]) -> None:
    """Refuse to fold gates whose update is in the base weights: what `unmerge_adapter` subtracts would be another.

    Args:
        sites: The gated layers.

    Raises:
        UserError: The adapter is merged.
    """
    if any(site.adapter in site.layer.merged_adapters for site in sites):
        raise UserError("the adapter is merged into the base weights; call model.unmerge_adapter() before finish()")
