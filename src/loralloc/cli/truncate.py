"""`loralloc truncate`: cut an existing adapter down to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loralloc.adapter.folders import check_adapter_folder, check_target
from loralloc.cli import completion


def truncate(
    adapter: Annotated[
        Path, typer.Argument(help="Folder of a plain LoRA adapter of PEFT.", autocompletion=completion.adapters)
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    average_rank: Annotated[
        float | None, typer.Option("--average_rank", help="Ranks per adapted layer, on average over all of an export.")
    ] = None,
    total_rank: Annotated[int | None, typer.Option("--total_rank", help="Ranks of all layers together.")] = None,
    parameters: Annotated[int | None, typer.Option(help="Parameters of all kept ranks together.")] = None,
    fraction: Annotated[float | None, typer.Option(help="Fraction of the parameters that are there.")] = None,
    adapter_bytes: Annotated[
        int | None, typer.Option("--adapter_bytes", help="Bytes of all kept ranks, without the file's header.")
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option("--max_rank", help="Most ranks of a layer; beside one of the others, or alone.")
    ] = None,
) -> None:
    """Keep the largest singular values of all updates under a budget. Needs neither the base model nor data."""
    check_adapter_folder(adapter)
    check_target(output)
    from loralloc.adapter.truncation import truncate_adapter
    from loralloc.budget import Budget
    from loralloc.cli import terminal

    terminal.quiet_libraries()
    budget = Budget(average_rank, total_rank, parameters, fraction, adapter_bytes, max_rank=max_rank)
    done = truncate_adapter(adapter, output, budget)
    plan = done.plan
    share = plan.parameters / plan.start_parameters
    typer.echo(f"wrote {done.path}")
    with_ranks = f"the {len(plan.modules)} modules that have a rank"
    over = with_ranks if done.modules is None else f"{done.modules} modules"
    typer.echo(f"  ranks   {plan.total_rank:,} of {plan.peak:,} over {over}")
    typer.echo(f"  size    {plan.parameters:,} parameters, {share:.0%} of the start")
    typer.echo(f"  kept    {done.kept:.2%} of the updates' squared norm")
