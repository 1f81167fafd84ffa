"""`loralloc export`: write the adapter of a run for another consumer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loralloc.cli import completion
from loralloc.errors import UserError

if TYPE_CHECKING:
    from loralloc.recipe.run_folder import RunFolder


class Profile(StrEnum):
    """The profiles of loralloc.adapter.export, spelled out so that --help imports no torch."""

    ragged = "ragged"
    uniform = "uniform"
    merged = "merged"


def export(
    run: Annotated[Path, typer.Argument(help="The run folder.", autocompletion=completion.runs)],
    profile: Annotated[
        Profile,
        typer.Option(
            help="ragged: each module at its rank (PEFT, vLLM >= 0.32, llama.cpp); uniform: padded to the largest rank "
            "(everything that reads LoRA); merged: the whole model."
        ),
    ] = Profile.ragged,
    to: Annotated[Path | None, typer.Option(help="Folder to write; by default RUN/PROFILE.")] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME", help="Push it to the Hub too; the run's own adapter as it is, with its card."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: a repository that only its owner sees.")
    ] = False,
) -> None:
    """Write the adapter for its consumer, reload it with stock PEFT and compare the logits."""
    from loralloc.recipe.run_folder import RunFolder

    if private and push is None:
        raise UserError("--private is about what is pushed: name a repository with --push OWNER/NAME")
    folder = RunFolder.finished(run)
    if push is not None:
        from loralloc.adapter.hub import check_push

        check_push(push)
    own = push is not None and to is None and profile is Profile.ragged and folder.weights == folder.adapter
    target = folder.adapter if own else _write(folder, profile, to)
    if push is not None:
        _push(target, push, private)


def _push(folder: Path, repository: str, private: bool) -> None:
    from loralloc.adapter.hub import base_of, push

    base = base_of(folder)
    if base is not None and Path(base).is_dir():
        typer.echo(f"note: the files name {base} as their base model, a folder of this machine that others do not have")
    typer.echo(f"pushed {folder} to {push(folder, repository, private=private)}")


def _write(folder: RunFolder, profile: Profile, to: Path | None) -> Path:
    """Write and check an export, and say what became of it; returns its folder."""
    from loralloc.adapter.folders import check_target
    from loralloc.tasks.locations import check_load_in, model_folder

    if to is not None and to.resolve() == folder.adapter.resolve():
        raise UserError(f"{to} is the run's own adapter; choose another folder")
    target = (to or folder.exported(profile.value)).resolve()
    check_target(target)
    base, to_merge = folder.peek_recipe().model, profile is Profile.merged
    stored = model_folder(base.name)
    if stored is not None and stored.resolve() == target:
        raise UserError(f"{to or target} is the base model of the run; choose another folder with --to")
    if not to_merge:
        check_load_in(base.load_in)
    from loralloc.adapter.export import export_adapter
    from loralloc.cli import terminal
    from loralloc.recipe.from_recipe import load_for_export

    terminal.quiet_libraries()
    model, tokenizer = load_for_export(folder, to_merge=to_merge)
    exported = export_adapter(model, target, profile.value, tokenizer=tokenizer)
    typer.echo(f"wrote {exported.path} ({profile.value}, largest rank {exported.max_rank})")
    typer.echo(f"checked: reloaded by stock PEFT, largest difference of a logit {exported.difference:.1e}")
    if to_merge and base.load_in is not None:
        typer.echo(
            f"merged into the weights of {base.name} as they are, and trained over these in {base.load_in}: evaluate "
            "the merged model before you use it"
        )
    for line in exported.serving:
        typer.echo(f"serve:  {line}")
    return exported.path
