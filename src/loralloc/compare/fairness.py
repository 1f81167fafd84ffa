"""The page's sentences on what a comparison has made equal, what it could not, and how far to trust its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loralloc.compare.cells import HELD_OUT
from loralloc.compare.grid import PEERS, Shapes, section_of, tuning_seeds
from loralloc.compare.results import Entry, Row, Trial, criterion, differs_by_row, rows_have_losses
from loralloc.errors import listed
from loralloc.methods.registry import held_out_for
from loralloc.recipe.schema import Recipe
from loralloc.report.wording import count
from loralloc.tasks.spec import TASKS


def fairness(recipe: Recipe, shapes: Shapes, found: Sequence[Entry]) -> list[str]:
    """Return how the comparison was made fair."""
    section, training = section_of(recipe), recipe.training
    judged = "the same, since there are no test data" if shapes.test is None else "the test data"
    if isinstance(recipe.data.test, float):
        judged = f"a share of {recipe.data.test:g} of the training data, the same rows in all runs"
    rates, seeds = count(len(section.learning_rates or ()), "learning rate"), count(len(section.seeds), "seed")
    tuning = len(tuning_seeds(recipe))
    some = tuning < len(section.seeds)
    by, each = criterion(recipe).replace("_", " "), training.batch_size * training.accumulation
    told = [
        "Every final adapter may cost what plain LoRA costs at the budget: the parameters of its matrices. None costs "
        "more; one rank of the widest module is the most that any falls short.",
        f"Each contender tries the same {rates} with the same {f'{tuning} of ' if some else ''}{seeds}, for "
        f"{shapes.steps:,} steps of {each} examples. The rate is chosen on the validation data by the mean {by}, and "
        f"judged on {judged}.{' The other seeds train at the chosen rate alone.' if some else ''}",
        "Runs with the same seed start from the same head and see the same examples in the same order.",
    ]
    if differs_by_row(found):
        split = "validation" if shapes.test is None else "test"
        told.append(
            f"The {split} loss is that of the task. Differences are of the loss of a row, and percentages of its mean: "
            f"{TASKS[recipe.task].row_loss}."
        )
    told.append(_difference(found))
    if looking := _looking(found):
        look, train = ("looks", "it trains") if len(looking) == 1 else ("look", "they train")
        told.append(
            f"{listed(looking)} {look} at held-out examples, which are cut from the training data (a share of "
            f"{HELD_OUT} unless the recipe says another): {train} on fewer, in another order. After a search, plain "
            "LoRA is trained on all of them."
        )
    if any(entry.contender.id == "dora" for entry in found):
        told.append("DoRA has plain LoRA's rank; its magnitudes come on top, see the parameters.")
    if any(entry.contender.id == "eva" for entry in found):
        told.append("EVA has plain LoRA's rank in every module: its redistribution of ranks is off.")
    if any(entry.contender.kind == "plan" for entry in found):
        told.append(
            "The time of plain LoRA at a method's ranks is that of its own training; the run that found the ranks "
            "comes on top."
        )
    if any(entry.chosen.rows[0].cell.recipe.method.name == "allora" for entry in found):
        told.append(
            "ALLoRA trains without dropout and at scale 1, whatever the recipe says: both are part of the method. "
            "Plain LoRA has the recipe's, at ALLoRA's ranks too."
        )
    return told


def _difference(found: Sequence[Entry]) -> str:
    """What a difference is, and what its interval is made of."""
    if rows_have_losses(found):
        return (
            "A difference is the mean over seeds and rows of a contender's loss minus plain LoRA's, in runs with the "
            "same seed and on the same row. Its variance is the sum of what seeds and rows contribute, and its "
            "interval Student's, with the degrees of freedom that so few seeds leave. p is corrected for all "
            "contenders at a budget (Holm)."
        )
    return (
        "A difference is the mean over seeds of a contender's loss minus plain LoRA's, in runs with the same seed. Its "
        "variance is what the seeds contribute, and its interval Student's, with a degree of freedom less than seeds. "
        "p is corrected for all contenders at a budget (Holm)."
    )


def _looking(found: Sequence[Entry]) -> list[str]:
    labels = {}
    for entry in found:
        if held_out_for(entry.chosen.rows[0].cell.recipe.method) is not None:
            labels[entry.contender.label] = None
    return list(labels)


def _passed_over(found: Sequence[Entry]) -> list[str]:
    """Rates at which a contender was not judged because tuning runs have failed: a phrase for each contender."""
    told, several = [], len({entry.point for entry in found}) > 1
    for entry in found:
        rates = [
            f"{trial.learning_rate:g}"
            for trial in entry.trials
            if _failed(trial) > _failed(entry.chosen) and math.isfinite(entry.chosen.score)
        ]
        if rates:
            told.append(f"{listed(rates)} of {entry.contender.label}{f' at {entry.point.label}' if several else ''}")
    return told


def _failed(trial: Trial) -> int:
    return sum(not row.finished for row in trial.tuning)


def notes(recipe: Recipe, shapes: Shapes, rows: Sequence[Row], found: Sequence[Entry]) -> list[str]:
    """Return what a reader must know before the numbers."""
    section, told, by_row = section_of(recipe), [], rows_have_losses(found)
    if not by_row:
        split = "validation" if shapes.test is None else "test"
        told.append(
            f"Intervals are over the seeds alone: of the {split} data only the mean loss of a run is known, so nothing "
            "says how much other rows would change it. A difference that is clear here may be one of these rows alone."
        )
    if len(section.seeds) == 1:
        told.append(
            f"One seed: {'intervals are over the rows alone' if by_row else 'there are no intervals'}. Another seed "
            "changes the order of the data and the start of the adapter, and with them every number here; nothing says "
            "by how much."
        )
    elif len(section.seeds) == 2:
        told.append("Two seeds: the variance between seeds is estimated from two numbers, so the intervals are wide.")
    tuning = len(tuning_seeds(recipe))
    if tuning < min(3, len(section.seeds)):
        told.append(
            f"Learning rates are chosen by {count(tuning, 'seed')} of {len(section.seeds)}: with others, another rate "
            "may be the best of a contender."
        )
    if passed := _passed_over(found):
        told.append(f"Learning rates at which a run has failed were passed over: {listed(passed)}.")
    if len(section.learning_rates or ()) == 1:
        told.append(
            "One learning rate: it may suit one method better than another. Differences between untuned methods are "
            "often differences between learning rates."
        )
    elif len(section.learning_rates or ()) == 2:
        told.append(
            "Two learning rates: the best of them is the smaller or the larger, and a better one may lie beyond."
        )
    edges = dict.fromkeys(entry.contender.label for entry in found if entry.at_edge)
    if edges:
        told.append(
            f"The best learning rate of {listed(list(edges))} is the smallest or the largest that was tried: a better "
            "one may lie beyond."
        )
    if shapes.test is None:
        told.append(
            "There are no test data: losses are of the validation data, on which the learning rates were chosen, so "
            "that all of them are optimistic."
        )
    judged = shapes.validation if shapes.test is None else shapes.test
    told += [
        f"{repeated:,} of the {judged:,} rows on which methods are judged are among the {name} data too."
        for name, repeated in shapes.repeated.items()
        if repeated
    ]
    points = dict.fromkeys(entry.point for entry in found)
    if section.peers and any(point.whole is None for point in points):
        names = listed([PEERS[name] for name in section.peers])
        told.append(f"Where the budget is no whole rank for every module, {names} did not take part.")
    if not any(entry.contender.kind == "plan" for entry in found):
        told.append("No method has finished with uneven ranks, so no plan was trained again as plain LoRA.")
    short = [
        row for row in rows
        if row.finished and row.cell.contender.kind != "peer"
        and not 0 <= row.cell.point.parameters - row.parameters < max(shapes.costs)
    ]  # fmt: skip
    if short:
        names = listed(list(dict.fromkeys(row.cell.contender.label for row in short)))
        told.append(f"{names} did not keep to the budget, and cannot be compared with the others as if it had.")
    if failed := sum(not row.finished for row in rows):
        told.append(f"{count(failed, 'run')} of {len(rows):,} failed; the reasons are below.")
    return told
