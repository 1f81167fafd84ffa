"""Push an export to the Hugging Face Hub: only the files in its record, which have passed the check."""

from __future__ import annotations

import glob
from pathlib import Path

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from loralloc.adapter.folders import ADAPTER_CONFIG, exported_files
from loralloc.errors import UserError
from loralloc.reading import read_object


def check_push(repository: str) -> None:
    """Refuse what cannot be pushed, before anything is loaded.

    Args:
        repository: OWNER/NAME on the Hub.

    Raises:
        UserError: The name is not valid, the Hub is switched off, or nobody is logged in.
    """
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f'--push takes OWNER/NAME, got "{repository}": {_first_line(error)}') from error
    if "/" not in repository:
        raise UserError(f'--push takes OWNER/NAME, got "{repository}": name the user or the organisation too')
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, so nothing is pushed: unset it")
    if get_token() is None:
        raise UserError("pushing needs a login: run `hf auth login` first, or set HF_TOKEN")


def base_of(folder: Path) -> str | None:
    """Return what an exported adapter calls its base model; None for a merged model, which needs none."""
    path = folder / ADAPTER_CONFIG
    return read_object(path).get("base_model_name_or_path") if path.exists() else None


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Push an export, and make the repository if it does not exist.

    Args:
        folder: The export.
        repository: OWNER/NAME on the Hub.
        private: Whether only its owner may see it; then nothing is pushed to an existing public repository.

    Returns:
        The address of the repository.

    Raises:
        UserError: The folder is no export, the repository is public against `private`, or the Hub refused or could not
            be reached; the message says why.
    """
    files, api = exported_files(folder), HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        public = private and not api.repo_info(url.repo_id).private
    except Exception as error:
        raise _not_pushed(repository, error) from error
    if public:
        raise UserError(
            f"{repository} is there and public; nothing was pushed: make it private, or choose another name"
        )
    upload(api, folder, url.repo_id, files)
    return str(url)


def upload(api: HfApi, folder: Path, repository: str, files: list[str], revision: str | None = None) -> None:
    """Upload files of a folder in one commit.

    Raises:
        UserError: The Hub refused them or could not be reached.
    """
    try:
        api.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(map(glob.escape, files)), revision=revision
        )
    except Exception as error:
        raise _not_pushed(repository, error) from error


def _not_pushed(repository: str, error: Exception) -> UserError:
    """Turn any error of the Hub's client (no route, a proxy, a time-out, no right to write) into one message."""
    return UserError(f"not pushed to {repository}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
