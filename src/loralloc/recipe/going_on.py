"""Messages of a run that ends early: how it ended, what is saved, and the command that resumes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from loralloc.errors import UserError
from loralloc.files import disk_is_full, file_is_too_large, in_shell
from loralloc.recipe.run_folder import RunFolder
from loralloc.recipe.schema import Recipe
from loralloc.training import processes
from loralloc.training.checkpoint import drop_cut_off
from loralloc.training.manifest import MANIFEST
from loralloc.training.signals import Stopped


@contextmanager
def speaking_of_a_full_disk(recipe: Recipe) -> Iterator[None]:
    """Turn errors about a full disk or too large a file into one message; half-written checkpoints are removed.

    Args:
        recipe: The recipe that runs inside the context.

    Raises:
        UserError: The disk is full, a file would be larger than it may be, or safetensors cannot write or read for
            another reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        folder = RunFolder.of(recipe)
        too_large = file_is_too_large(error)
        if not (too_large or disk_is_full(error)):
            # This is how safetensors, written in Rust, reports an OSError.
            if isinstance(error, SafetensorError) and "os error" in str(error):
                raise UserError(f"{folder.root}: tensors could not be written or read: {error}") from error
            raise
        for one in (folder, folder.search):
            drop_cut_off(one.checkpoints)
        kept = sorted(path.parent.name for path in folder.checkpoints.glob(f"checkpoint-*/{MANIFEST}"))
        verb = "is" if len(kept) == 1 else "are"
        whole = f"; {' and '.join(kept)} in {folder.checkpoints} {verb} not touched" if kept else ""
        again = f"start over with --replace{folder.kept_hint()}" if folder.is_run() else "start again"
        cure = f"go on with {_command(folder)}" if _goes_on(folder, recipe) else again
        if too_large:
            reason, first = f"a file in {folder.root} would be larger than this process may write", "Raise ulimit -f"
        else:
            reason, first = f"the disk with {folder.root} is full", "Make room"
        raise UserError(f"{reason}{whole}. {first}, then {cure}") from error


def farewell(stopped: Stopped, recipe: Recipe) -> str:
    """Say how a signal has ended a run, and how to go on.

    Args:
        stopped: The signal, and the step that was saved.
        recipe: The recipe of the run.
    """
    folder, name = RunFolder.of(recipe), stopped.signal.name
    if stopped.step is not None:
        return f"stopped by {name} after step {stopped.step:,}, which is saved; go on with {_command(folder)}"
    if _goes_on(folder, recipe):
        return f"stopped by {name}; go on from what was saved before with {_command(folder)}"
    kept = folder.kept_hint() if folder.is_run() else ""
    return f"stopped by {name}{kept or ' before there was anything to save'}"


def _goes_on(folder: RunFolder, recipe: Recipe) -> bool:
    return folder.is_run() and (folder.can_go_on or recipe.training.keeps_checkpoints)


def _command(folder: RunFolder) -> str:
    return f"{processes.launcher()}loralloc train {in_shell(folder.recipe)} --resume"
