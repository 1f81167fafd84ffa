"""`loralloc frontier`: quality over size, from one run."""

from __future__ import annotations

import math
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loralloc.adapter.folders import check_target
from loralloc.cli import completion
from loralloc.errors import UserError
from loralloc.files import check_writable

if TYPE_CHECKING:
    from loralloc.frontier.run import Settings
    from loralloc.frontier.source import Source


class Order(StrEnum):
    """The orders of loralloc.frontier.orders, spelled out so that --help imports no torch."""

    singular_value = "singular_value"
    sensitivity = "sensitivity"
    ablation = "ablation"


def frontier(
    run: Annotated[
        Path, typer.Argument(help="The run folder, or the folder of any LoRA adapter.", autocompletion=completion.runs)
    ],
    recover: Annotated[
        float | None,
        typer.Option(
            help="Share of the run's steps that each size is trained on after the cut, 0.2 by default; 0 for none."
        ),
    ] = None,
    recover_rate: Annotated[
        float | None,
        typer.Option(
            "--recover_rate", help="Highest learning rate of that training, as a share of the run's, 0.3 by default."
        ),
    ] = None,
    order: Annotated[
        Order | None,
        typer.Option(
            help="Which ranks are dropped first: those of which the loss has least, beside the others and "
            "alone (ablation, the default) or beside the others (sensitivity), or those of small singular values."
        ),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Average ranks to try, such as 8,4,2,1; by default twelve, down to 1/32.")
    ] = None,
    export: Annotated[
        float | None,
        typer.Option(metavar="AVERAGE_RANK", help="Write the adapter of this size; measured first if it is not there."),
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="With --export: folder to write; by default FRONTIER/adapter.")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Of an adapter without a run: the recipe with its base model and data.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the frontier; by default RUN/frontier.")] = None,
) -> None:
    """Cut a trained adapter to many sizes, train each a little more, and say which size is small enough."""
    from loralloc.cli.checks import check_inputs
    from loralloc.frontier.source import Source

    if recover is not None and not 0 <= recover < 1:
        raise UserError(f"--recover is a share of the run's steps, from 0 to below 1, got {recover:g}")
    if recover_rate is not None and not 0 < recover_rate <= 10:
        raise UserError(
            f"--recover_rate is a share of the run's learning rate, above 0 and at most 10, got {recover_rate:g}"
        )
    if recover_rate is not None and recover == 0:
        raise UserError("--recover_rate is for a recovery, and --recover 0 leaves it out")
    if to is not None and export is None:
        raise UserError("--to is where --export writes: give the average rank to export as well")
    if ranks is not None and export is not None:
        raise UserError("--ranks are the sizes to compare, --export takes one of them: leave one of the two out")
    if export is not None and not 0 < export < math.inf:
        raise UserError(f"--export is an average rank, above 0, got {export:g}")
    averages = None if ranks is None else _averages(ranks)
    source = Source.of(run, recipe, output)
    check_writable(source.folder, "--output", "name another folder")
    target = (to or source.folder / "adapter").resolve()
    if export is not None:
        if target == source.adapter.resolve():
            raise UserError(f"{to or target} is the adapter that is to be cut; choose another folder with --to")
        check_target(target)
    check_inputs(source.recipe, trained=True)
    from loralloc.cli import terminal
    from loralloc.frontier.export import as_measured
    from loralloc.frontier.run import Settings
    from loralloc.recipe.lock import locked

    terminal.quiet_libraries()
    given = None if order is None else order.value
    with locked(source.folder):
        if export is not None:
            _export(source, as_measured(source, given, recover, recover_rate, export), target)
        else:
            default = Settings()
            share = default.recover if recover is None else recover
            rate = default.rate if recover_rate is None else recover_rate
            _measure(source, Settings(given, share, averages, rate=rate))


def _averages(words: str) -> list[float]:
    """Average ranks as they are written on the command line."""
    try:
        averages = [float(word) for word in words.replace(",", " ").split()]
    except ValueError:
        averages = []
    if not averages:
        raise UserError(f"--ranks: give average ranks such as 8,4,2,1; {words!r} are none")
    return averages


def _measure(source: Source, settings: Settings) -> None:
    from loralloc.cli import terminal
    from loralloc.frontier.page import point_in_words, write_page
    from loralloc.frontier.run import make_frontier

    found = make_frontier(source, settings, terminal.Terminal(), lambda one: typer.echo(point_in_words(one)))
    found.save(source.folder / "frontier.json")
    typer.echo(found.verdict())
    typer.echo(f"page:   {write_page(found, source.folder)}")
    typer.echo(f"export: loralloc frontier {source.named} --export {found.average(found.choice):.3g}")


def _export(source: Source, settings: Settings, target: Path) -> None:
    from loralloc.cli import terminal
    from loralloc.frontier.export import export_point
    from loralloc.frontier.page import point_in_words
    from loralloc.frontier.run import folder_of, make_frontier

    found = make_frontier(source, settings, terminal.Terminal(), lambda one: typer.echo(point_in_words(one)))
    smallest = found.points[-1]
    exported = export_point(source, folder_of(source, smallest.ranks) / "adapter", target)
    typer.echo(f"wrote {exported.path} ({smallest.ranks:,} ranks, the largest {exported.max_rank})")
    typer.echo(f"checked: reloaded by stock PEFT, largest difference of a logit {exported.difference:.1e}")
    for line in exported.serving:
        typer.echo(f"serve:  {line}")
