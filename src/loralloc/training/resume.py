"""Whether a run resumes from its own state: the same settings, and the weights that the state was taken with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from loralloc.errors import UserError
from loralloc.gating import Site


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
