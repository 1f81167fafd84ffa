"""`loralloc demo`: the main job, offline, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

MINUTES = 4
"""What the demo may take; where one run takes more than half of it, the baseline is left out."""


def demo(
    output: Annotated[Path, typer.Option(help="Folder of the two runs.")] = Path("runs/demo"),
) -> None:
    """Fine-tune a real pretrained encoder on real text, offline: AdaLoRA, beside plain LoRA where time allows.

    The task: from which area of Python's standard library does a docstring come? The data are made from the sources of
    the Python that runs this; the encoder comes with the extra `demo`.
    """
    from loralloc.cli import pipeline, terminal
    from loralloc.config import load_recipe
    from loralloc.recipes import list_recipes

    started = time.perf_counter()
    outcomes = {}
    for method in ("adalora", "lora"):
        recipe = load_recipe(list_recipes()[f"demo/{method}"], ["--output", str(output / method)])
        outcomes[method] = pipeline.run(recipe, start_over=True)
        if 2 * (time.perf_counter() - started) > MINUTES * 60:
            typer.echo(
                "plain LoRA is left out to save time; run it with: loralloc init demo/lora; loralloc train lora.yaml"
            )
            break
    terminal.show_comparison(outcomes)
