"""Try whether the libraries accept the values of a recipe's options, before anything is loaded.

Some values are checked by a constructor, others only when a Trainer makes its accelerator, trackers, optimizer and
schedule. All of that is tried here, on a tiny model that is thrown away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import BertConfig, BertForSequenceClassification, Trainer

from loralloc.errors import UserError
from loralloc.plain_lora import check_plain_config
from loralloc.recipe.from_recipe import even_config, training_arguments
from loralloc.recipe.passthrough import PEFT, TRAINER, with_options, without
from loralloc.recipe.schema import Recipe
from loralloc.recipe.source import Key, dotted
from loralloc.tasks.rows import shorten

STEPS = 100
"""Steps of the schedule that is tried if the recipe counts epochs."""

TINY: Any = {
    "vocab_size": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "max_position_embeddings": 2,
}
"""Sizes of the model that options are tried on."""

Trial = Callable[[Recipe], None]


def refused_values(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Yield the options of a recipe whose values a library refuses.

    Args:
        recipe: The recipe, checked for everything else.

    Yields:
        The key and the library's reason. If options are refused only in combination, the key of their mapping.
    """
    tried: tuple[tuple[Key, Mapping[str, Any], Trial], ...] = (
        (PEFT, recipe.lora.peft, _try_adapter),
        (TRAINER, recipe.training.trainer, _try_trainer),
    )
    for key, given, trial in tried:
        yield from _blamed(recipe, key, given, trial)


def _blamed(recipe: Recipe, key: Key, given: Mapping[str, Any], trial: Trial) -> Iterator[tuple[Key, str]]:
    """Yield the options of one mapping whose values are refused, or the mapping itself if no single one is to blame."""

    def reason(names: Iterable[str]) -> str | None:
        return _reason(trial, with_options(recipe, key, {name: given[name] for name in names}))

    told = reason(given) if given else None
    if told is None or reason(()) is not None:  # the recipe's own keys are to blame
        return
    suspects = [name for name in given if reason([name])]
    # An option may be wrong alone, and right beside another one.
    innocent = [name for name in given if name not in suspects]
    found = {(*key, name): reason([*innocent, name]) for name in suspects}
    guilty = {at: why for at, why in found.items() if why is not None} or {key: told}
    yield from ((at, f"{dotted(at)}: {why}") for at, why in guilty.items())


def check_values(recipe: Recipe) -> None:
    """Refuse a recipe with options whose values a library refuses.

    Raises:
        UserError: With all such options and the library's reasons.
    """
    if told := [message for _, message in refused_values(recipe)]:
        raise UserError("\n".join(told))


def _reason(trial: Trial, recipe: Recipe) -> str | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # the real objects will warn later
            trial(recipe)
    except Exception as error:  # libraries raise any kind of error for a bad value
        return shorten(" ".join(str(error).removeprefix("training: ").split()), 400)
    return None


def _try_adapter(recipe: Recipe) -> None:
    config = even_config(recipe)
    check_plain_config(config)
    if config.init_lora_weights == "eva":
        raise UserError(
            'init_lora_weights="eva" is computed from data, for which a script has to call PEFT\'s '
            "initialize_lora_eva_weights; leave it out"
        )


def _try_trainer(recipe: Recipe) -> None:
    recipe = with_options(recipe, TRAINER, without(recipe.training.trainer, ["push_to_hub"]))  # creates a repository
    model = BertForSequenceClassification(BertConfig(**TINY))
    with TemporaryDirectory(prefix="loralloc-") as scratch:
        arguments = training_arguments(recipe, Path(scratch))
        if arguments.load_best_model_at_end and arguments.eval_strategy == "no":
            raise UserError("load_best_model_at_end needs evaluations; set training.eval_every and training.save_every")
        trainer = Trainer(model=model, args=arguments, eval_dataset=[{}])  # type: ignore[arg-type]  # is not looked at
        if arguments.mixed_precision != "no" and not trainer.accelerator.native_amp:
            raise UserError(
                f"accelerate would ignore {arguments.mixed_precision} on this device, which is {arguments.device}; "
                "set training.bf16"
            )
        if arguments.optim_target_modules is None:  # else it looks for the modules of the recipe's own model
            trainer.create_optimizer_and_scheduler(recipe.training.steps or STEPS)
