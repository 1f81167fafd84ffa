"""What may differ when a run is resumed: keys that do not affect training, and what the user allows to differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from loralloc.errors import UserError
from loralloc.files import leaves

if TYPE_CHECKING:
    from loralloc.recipe.schema import Recipe

ALLOWED = ("data", "versions")
"""What `--allow-changed` takes."""

FREE = (
    *("output", "compare"),
    *("data.train", "data.validation", "data.test", "data.also"),  # paths: what counts is what is in the rows
    *("evaluate", "training.eval_every"),
    *("training.log_every", "training.save_every"),
    *(f"training.trainer.{name}" for name in ("disable_tqdm", "report_to", "run_name", "project", "save_total_limit")),
    *(f"training.trainer.{name}" for name in ("logging_first_step", "log_level", "push_to_hub")),
)
"""Keys and sections that do not affect what is trained."""
JUDGING = ("evaluate", "training.eval_every")
"""Keys of `FREE` that do affect it if the recipe sets `keep_best`, `early_stopping` or `load_best_model_at_end`."""


class NotResumableError(UserError):
    """A run cannot be resumed: its checkpoints are damaged, or something that it depends on has changed."""


def settings(recipe: Recipe, *, all_keys: bool = False) -> dict[str, Any]:
    """Return the dotted keys of a recipe that decide what is trained, with their values.

    Args:
        recipe: The recipe.
        all_keys: Whether to include the keys that do not affect training.
    """
    flat = dict(leaves(recipe.model_dump(mode="json", exclude_none=True)))
    free = () if all_keys else free_keys(recipe)
    return {key: value for key, value in flat.items() if not _inside(key, free)}


def free_keys(recipe: Recipe) -> tuple[str, ...]:
    """Keys and sections of a recipe that may differ in a resumed run."""
    training = recipe.training
    judged = training.keep_best or training.early_stopping or training.trainer.get("load_best_model_at_end")
    return tuple(key for key in FREE if not (judged and key in JUDGING))


def split_changes(theirs: Recipe, mine: Recipe) -> tuple[dict[str, tuple[Any, Any]], dict[str, tuple[Any, Any]]]:
    """Return (keys that must not differ but do, other keys that differ) of two recipes, each key with both values."""
    changes = compare(settings(theirs, all_keys=True), settings(mine, all_keys=True))
    free = set(free_keys(theirs)) & set(free_keys(mine))
    may = {key: pair for key, pair in changes.items() if _inside(key, free)}
    return {key: pair for key, pair in changes.items() if key not in may}, may


def compare(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two mappings differ, with both values; None where one of them lacks the key.

    >>> compare({"a": 1, "b": 2}, {"a": 1, "c": 3})
    {'b': (2, None), 'c': (None, 3)}
    """
    keys = dict.fromkeys((*theirs, *mine))
    return {key: (theirs.get(key), mine.get(key)) for key in keys if theirs.get(key) != mine.get(key)}


def lines_without(text: str, keys: Collection[str]) -> list[str]:
    r"""Return the lines of a recipe that was written by loralloc, without those of some of its keys and sections.

    >>> lines_without("lora:\n  r: 4\nplan: a.json\noutput: run\n", ("lora", "output"))
    ['plan: a.json']
    """
    kept, inside = [], False
    for line in text.splitlines():
        inside = line.partition(":")[0] in keys or (inside and line[:1] in (" ", "-"))
        if not inside:
            kept.append(line)
    return kept


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Say what differs.

    >>> in_words({"training.steps": (16, 99), "lora.dropout": (0.1, None)})
    'training.steps is 99 and was 16; lora.dropout is not set and was 0.1'
    """

    def word(value: Any) -> str:
        return "not set" if value is None else str(value)

    return "; ".join(f"{key} is {word(mine)} and was {word(theirs)}" for key, (theirs, mine) in changes.items())


def check_unchanged(
    theirs: Mapping[str, Any], mine: Mapping[str, Any], allowed: Collection[str], place: object
) -> list[str]:
    """Refuse to resume from a checkpoint if something that it depends on has changed.

    Args:
        theirs: What the checkpoint was written with (`fingerprints.depends_on`).
        mine: The same for the resumed run.
        allowed: Which of `ALLOWED` may differ.
        place: The checkpoint, for the message.

    Returns:
        A description of each allowed difference.

    Raises:
        NotResumableError: Something differs that is not allowed; the message lists it, and the flags if they can
            allow all of it.
    """
    found = {kind: words for kind in mine if (words := difference(kind, theirs.get(kind), mine[kind]))}
    refused = {kind: words for kind, words in found.items() if kind not in allowed}
    if refused:
        can = [kind for kind in refused if kind in ALLOWED]
        flags = " ".join(f"--allow-changed {kind}" for kind in can)
        cure = f", or say that they may differ: {flags}" if len(can) == len(refused) else ""
        raise NotResumableError(
            f"{place} belongs to a different run: {'; '.join(refused.values())}. Resume with what that run began with"
            f"{cure}, or start over with --replace"
        )
    return [words for kind, words in found.items() if kind in allowed]


def difference(kind: str, theirs: Any, mine: Any) -> str:
    """Describe a difference in what a run depends on; an empty string if there is none.

    Args:
        kind: A key of `fingerprints.depends_on`.
        theirs: Its value before; None if it is not known.
        mine: Its value now.
    """
    if theirs == mine:
        return ""
    if theirs is None:
        return f"it has no record of its {kind}"
    if kind == "data":
        return "; ".join(_rows(f"data.{name}", *pair) for name, pair in compare(theirs, mine).items())
    if kind == "base":
        return "the base model has other weights"
    if kind == "plan":
        return "the plan has other ranks or scales"
    return in_words(compare(theirs, mine))


def _rows(name: str, theirs: Any, mine: Any) -> str:
    if not (isinstance(theirs, Mapping) and isinstance(mine, Mapping)) or "rows" not in theirs or "rows" not in mine:
        return f"{name} has other content"
    if theirs["rows"] != mine["rows"]:
        return f"{name} has {mine['rows']:,} examples and had {theirs['rows']:,}"
    return f"{name} has as many examples as before, but different ones or another order"


def _inside(key: str, sections: Collection[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)
