"""`loralloc`: the table of verbs, and what happens to errors."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from loralloc._version import __version__
from loralloc.cli import (
    build_kernel,
    chat,
    compare,
    demo,
    env,
    estimate,
    evaluate,
    export,
    frontier,
    init,
    report,
    schema,
    train,
    truncate,
)
from loralloc.cli.streams import lasting_streams, replace_what_cannot_be_shown
from loralloc.errors import UserError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with LoRA ranks that allocate themselves.",
)

LEFTOVER_WORDS = {"allow_extra_args": True, "ignore_unknown_options": True}
"""For verbs that take `--key value` for any key of a recipe; the recipe's reader checks them."""

app.command("demo")(demo.demo)
app.command("init")(init.init)
app.command("train", context_settings=LEFTOVER_WORDS)(train.train)
app.command("compare", context_settings=LEFTOVER_WORDS)(compare.compare)
app.command("estimate", context_settings=LEFTOVER_WORDS)(estimate.estimate)
app.command("evaluate")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("export")(export.export)
app.command("truncate")(truncate.truncate)
app.command("frontier")(frontier.frontier)
app.command("report")(report.report)
app.command("schema")(schema.schema)
app.command("build-kernel")(build_kernel.build_kernel)
app.command("env")(env.env)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"loralloc {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune language models with LoRA ranks that allocate themselves."""
    del version  # acted on by its callback
    if sys.platform == "win32":  # locks, signals and limits of processes are POSIX's
        raise UserError("the command line needs Linux or macOS; on Windows take WSL, or use loralloc from Python")
    if context.invoked_subcommand != "chat":  # a prompt that is edited needs the terminal itself
        context.with_resource(lasting_streams())


def main() -> None:
    """Run the command line: a mistake in the input ends with one message and exit code 2."""
    # On a CPU, bitsandbytes logs missing kernels when it is imported, and a message at every product of an 8-bit layer.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    replace_what_cannot_be_shown()
    try:
        app()
    except (UserError, FloatingPointError, OSError) as error:
        # A gradient that is never finite, a full disk, a file where a folder should be: the message says it all.
        print(f"error: {_printable(str(error))}", file=sys.stderr)
        sys.exit(2)


LONGEST_MESSAGE = 20_000
"""Characters of a message, which may quote what stands in a file."""


def _printable(text: str) -> str:
    r"""Escape what a terminal would act on instead of showing it.

    >>> _printable("a.json: got 'x\x1b[2J'")
    "a.json: got 'x\\x1b[2J'"
    """
    shown = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]}..."
    escaped = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)
    return "".join(escaped)
