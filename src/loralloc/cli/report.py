"""`loralloc report`: write the page of a run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.cli import completion
from loralloc.files import check_writable


def report(
    run: Annotated[Path, typer.Argument(help="The run folder.", autocompletion=completion.runs)],
) -> None:
    """Write RUN/report.html and the figures beside it.

    RUN is what `loralloc train`, RankAllocation(folder=...) or run.write_report(...) has written.
    """
    from loralloc.recipe.run_folder import RunFolder

    folder = RunFolder(run)
    if not (folder.plan.is_file() or folder.trace.is_file()):
        folder = RunFolder.existing(run)
    check_writable(folder.root, str(run), "copy the run to where you may")
    from loralloc.report import write_report

    typer.echo(f"wrote {write_report(folder.root)}")
