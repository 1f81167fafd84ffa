"""Is the Hugging Face Hub within reach? Asked once, with one request and a short limit.

The Hub's own libraries retry a missing connection for some 20 seconds per file, and a model is half a dozen
files. One request without retries settles the question first, so that a machine without a network fails, or
falls back on its cache, at once.
"""

from __future__ import annotations

from typing import Literal

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

from loralloc.errors import UserError

PROBE_SECONDS = 5.0


def out_of_reach() -> str:
    """Say why something that was not downloaded before cannot be downloaded now, and what to do."""
    if is_offline_mode():
        return "HF_HUB_OFFLINE is set, so nothing is downloaded: unset it, or give a path on this machine."
    return "The Hub cannot be reached: connect to the network, or give a path on this machine."


def is_reachable(name: str, kind: Literal["model", "dataset"], token: str | bool | None = None) -> bool:
    """Ask the Hub for one repository.

    Args:
        name: Name of the repository, as in `google-bert/bert-base-uncased`.
        kind: What the repository holds.
        token: What to log in with; by default what `hf auth login` has kept.

    Returns:
        Whether the Hub answered and has it. False means that the cache is all there is.

    Raises:
        UserError: The Hub answered that there is no such repository, or the name cannot be one.
    """
    try:
        if is_offline_mode():
            return False
        HfApi(token=token).repo_info(name, repo_type=kind, timeout=PROBE_SECONDS)
    except HFValidationError as error:
        raise UserError(f'"{name}" is neither a path on this machine nor the name of a {kind}.') from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f'The Hub has no {kind} "{name}" that you may read. Check the spelling; '
            "if it is private or gated, run `hf auth login` first."
        ) from error
    except Exception:
        # No route, a proxy, a time-out, an overloaded server: whatever the reason, only the cache is left.
        return False
    return True
