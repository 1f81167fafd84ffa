"""Checks that a run resumes from its own state: complete, of the same settings, and saved with the loaded weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loralloc.errors import UserError
from loralloc.gating import Site


def described(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype and shape of every tensor of a state, by its name."""
    return {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}


def check_state(
    tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], fresh: Mapping[str, Tensor], mine: Mapping[str, Any]
) -> None:
    """Refuse a state of another run, or one that no run can have written.

    Args:
        tensors: The tensors of the state (see `AllocationRun.state_dict`).
        numbers: Its numbers.
        fresh: The tensors of the run that resumes, before it takes the state up.
        mine: Its numbers, with its weights loaded.

    Raises:
        UserError: With what differs, or what is wrong.
    """
    lacking = [key for key in mine if key not in numbers]
    if lacking:
        raise _damaged(f"it lacks {', '.join(lacking)}")
    check_same_run(numbers, mine)
    total, ranks = mine["schedule"]["total_steps"], numbers["ranks"]
    capacities = [capacity for capacity, *_ in mine["sites"].values()]
    _check_count("step", numbers["step"], total)
    _check_count("bad_steps", numbers["bad_steps"], numbers["step"])
    _check_count("bad_in_a_row", numbers["bad_in_a_row"], numbers["bad_steps"])
    if not isinstance(ranks, list) or len(ranks) != len(capacities):
        raise _damaged(f"it does not have one rank for each of {len(capacities)} modules")
    for name, rank, capacity in zip(mine["sites"], ranks, capacities, strict=True):
        _check_count(f"the rank of {name}", rank, capacity)
    _check_count("peak", numbers["peak"], sum(capacities), least=sum(ranks))
    if numbers["budget"] is not None:
        _check_count("budget", numbers["budget"])
    if mine["data"] is not None:
        _check_count("the number of batches drawn", (numbers["data"] or {}).get("drawn"))
    _check_tensors(tensors, numbers["tensors"], described(fresh))


def _check_tensors(tensors: Mapping[str, Tensor], recorded: Mapping[str, Any], fresh: Mapping[str, Any]) -> None:
    """Compare tensors with what was written and with what the run has; scores are finite as long as steps are."""
    found = described(tensors)
    for name in (*recorded, *found):
        if name not in found or name not in recorded:
            raise _damaged(f"the tensor {name} is {'missing' if name in recorded else 'unexpected'}")
        if found[name] != list(recorded[name]):
            raise _damaged(f"{name} is {_shape(found[name])}, and was written as {_shape(recorded[name])}")
        if name in fresh and found[name] != fresh[name]:
            raise _damaged(f"{name} is {_shape(found[name])}, and this run has {_shape(fresh[name])}")
        if not tensors[name].isfinite().all():
            raise _damaged(f"{name} holds numbers that are not finite")


def _check_count(name: str, value: Any, most: int | None = None, least: int = 0) -> None:
    """Refuse what is no whole number, or is out of range."""
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise _damaged(f"{name} is {value!r} and should be a whole number {bounds}")


def _damaged(reason: str) -> UserError:
    return UserError(f"the allocation's state is damaged: {reason}; resume from another checkpoint")


def _shape(described: Any) -> str:
    dtype, shape = described
    return f"{dtype.removeprefix('torch.')} {shape}"


def check_same_run(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Refuse the state of another run.

    Args:
        theirs: The numbers of the state (see `AllocationRun.state_dict`).
        mine: Those of the run that resumes, with its weights loaded.

    Raises:
        UserError: They are of another method, model, schedule or of other weights; the message says what differs.
    """
    for key in ("method", "settings", "sites", "schedule"):
        if theirs[key] != mine[key]:
            raise UserError(
                f"the checkpoint belongs to another run: its {key} {_difference(theirs[key], mine[key])}; resume "
                "with the settings it was made with"
            )
    if theirs["gates"] != mine["gates"]:
        raise UserError(
            "the allocation's state was taken with other weights than those loaded; resume from the folder in "
            "which both were saved"
        )


def gate_checksum(sites: Sequence[Site]) -> str:
    """Tie a state to the weights it was taken with: the gates, or B where the gates are not trained.

    Zeros are left out, as compact runs do not have those of closed ranks.
    """
    digest = hashlib.sha256()
    for site in sites:
        weights = site.gate if site.gate_is_trained else site.B.to(site.gate.dtype)
        digest.update(weights[weights != 0].detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _difference(theirs: Any, mine: Any) -> str:
    """Name the first entry in which two records differ."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in [*theirs, *mine]:
            if theirs.get(key) != mine.get(key):
                return f"has {key}={json.dumps(theirs.get(key))} where this run has {json.dumps(mine.get(key))}"
    return f"is {theirs!r}, this run's is {mine!r}"
