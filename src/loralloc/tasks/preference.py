"""Preference learning (DPO, arXiv 2305.18290): learn the better of two answers to a prompt, with TRL's DPOTrainer.

Prompts and answers are texts or chats; where the model has a chat template, texts become turns of a chat
(`data.chat`). Without a prompt column, the common beginning of both answers is the prompt. The reference model is the
base model: the adapter is switched off for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import extract_prompt

from loralloc.errors import UserError
from loralloc.tasks.base import ModelSection, TaskData, evaluation_of
from loralloc.tasks.chat import as_chats, check_template, check_turns
from loralloc.tasks.conversations import Message, is_learned, read_messages
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.forms import read_texts, turn
from loralloc.tasks.pretrained import check_length, check_stacks, load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import Rows, quote
from loralloc.tasks.spec import PreferenceData
from loralloc.tasks.templates import is_template

logger = logging.getLogger(__name__)

Side = list[str] | list[list[Message]]
"""The prompts, or the answers, of all rows."""


def prepare(model: ModelSection, data: PreferenceData, seed: int) -> TaskData:
    """Make everything a Trainer needs to learn preferences.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut.

    Returns:
        Model, data and metrics. The metric is the loss, which is ln 2 before training.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    splits = load_splits(data, seed)
    read = [read_pairs(rows, data) for rows in splits.all()]

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_stacks("preference", config, model.name)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    sources = [rows.source for rows in splits.all()]
    train, validation, *test = [
        _examples(pairs, data, tokenizer, model.name, source) for pairs, source in zip(read, sources, strict=True)
    ]

    def load() -> PreTrainedModel:
        return load_model("preference", checkpoint, tokenizer, seed)

    return TaskData(
        model=load(),
        again=load,
        tokenizer=tokenizer,
        train=train,
        validation=validation,
        test=test[0] if test else None,
        **_trained_with(tokenizer, data),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: PreferenceData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate preferences; see `tasks.prepare_evaluation`."""
    examples = _examples(read_pairs(read_rows(source), data), data, tokenizer, str(model.name_or_path), source)
    return evaluation_of(examples, model=model, tokenizer=tokenizer, **_trained_with(tokenizer, data))


def _trained_with(tokenizer: PreTrainedTokenizerBase, data: PreferenceData) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its arguments, options and metric."""
    options = {"processing_class": tokenizer}
    return {"metric": "loss", "options": options, "arguments": {"max_length": data.max_length}}


def read_pairs(rows: Rows, data: PreferenceData) -> dict[str, Side]:
    """Read prompts and answers; rows whose answers are equal are left out, counted in a warning.

    Args:
        rows: The rows.
        data: The recipe's data section. Where it names no columns, they are prompt (if there is one), chosen, rejected.

    Returns:
        `chosen`, `rejected` and, where there are prompts, `prompt`: all texts, or all chats.

    Raises:
        UserError: A column is missing, or a row cannot be read.
    """
    named = {"prompt": data.prompt, "chosen": data.chosen, "rejected": data.rejected}
    if not data.chosen and not data.rejected:
        named |= {"chosen": "chosen", "rejected": "rejected"}
        named["prompt"] = data.prompt or ("prompt" if "prompt" in rows.columns else None)
    sides = {key: _read_side(rows, words, key) for key, words in named.items() if words is not None}
    if any(isinstance(side[0], list) for side in sides.values()):
        sides = _answers_alone(_chats(sides), rows)
    kept = [i for i, (a, b) in enumerate(zip(sides["chosen"], sides["rejected"], strict=True)) if a != b]
    if not kept:
        raise UserError(f"{rows.source}: in every row both answers are the same: there is nothing to prefer")
    if len(kept) < len(rows):
        logger.warning(
            "%s: of %d rows, %d are dropped because both answers are the same.",
            rows.source,
            len(rows),
            len(rows) - len(kept),
        )
    return {key: [side[i] for i in kept] for key, side in sides.items()}  # type: ignore[return-value]


def _read_side(rows: Rows, words: str, key: str) -> Side:
    if is_template(words) or not isinstance(rows.values(words, f"data.{key}")[0], list):
        return read_texts(rows, words, f"data.{key}")
    chats = []
    for i, value in enumerate(rows.values(words, f"data.{key}")):
        where = f'{rows.place(i)}: column "{words}" (data.{key})'
        chats.append(read_messages(value, where))
        if any("tool_calls" in message for message in chats[-1]):
            raise UserError(f"{where}: calls of tools cannot be learned by preference here; task causal-lm learns them")
        if any(message["role"] == "assistant" and not is_learned(message) for message in chats[-1]):
            raise UserError(f"{where}: a preference is learned whole; take the weight 0 out of its messages")
    return chats


def _answers_alone(sides: Mapping[str, list[list[Message]]], rows: Rows) -> dict[str, Side]:
    """Remove the prompt from answers that are whole chats, so that they begin with the assistant.

    Raises:
        UserError: Without the prompt, which is removed if both answers begin with it, an answer does not begin with the
            assistant; or there is no prompt: no column has it, and both answers have no common beginning.
    """
    prompts, answers = [], {key: [] for key in ("chosen", "rejected")}
    for i, pair in enumerate(zip(sides["chosen"], sides["rejected"], strict=True)):
        given = sides["prompt"][i] if "prompt" in sides else None
        turns = [n for n, (a, b) in enumerate(zip(*pair, strict=False)) if a != b]
        shared = turns[0] if turns else min(map(len, pair))
        whole = given is None or all(chat[: len(given)] == given for chat in pair)
        prompt = pair[0][:shared] if given is None else given
        for key, chat in zip(answers, pair, strict=True):
            answers[key].append(chat[len(prompt) :] if whole else chat)
        if not prompt or any(answers[key][-1] and answers[key][-1][0]["role"] != "assistant" for key in answers):
            raise UserError(
                f"{rows.place(i)}: both answers must begin with the prompt, or with the assistant's turn after it: "
                f"{quote(pair)}"
            )
        prompts.append(prompt)
    return {"prompt": prompts, **answers}


def _chats(sides: Mapping[str, Side]) -> dict[str, list[list[Message]]]:
    """The same with texts as turns: prompts are the user's, answers the assistant's."""
    return {
        key: [turn("user" if key == "prompt" else "assistant", one) if isinstance(one, str) else one for one in side]
        for key, side in sides.items()
    }


def _examples(
    pairs: Mapping[str, Side], data: PreferenceData, tokenizer: PreTrainedTokenizerBase, name: str, source: str
) -> Dataset:
    """What the trainer takes: texts, or chats where the model's template renders them."""
    texts = isinstance(pairs["chosen"][0], str)
    if texts and as_chats(tokenizer, data.chat):
        if "prompt" not in pairs:
            raise UserError(
                "data.prompt: answers become turns of a chat, which begins with a prompt; name its column, or set "
                "data.chat: false"
            )
        pairs, texts = _chats(pairs), False
    elif not texts and data.chat is False:
        raise UserError("data.chat: false is for texts, and these rows are chats; take it out")
    if not texts:
        check_template(tokenizer, name)
    rows = [extract_prompt(row) if "prompt" not in row else row for row in Dataset.from_dict({**pairs}).to_list()]
    checked: set[str] = set()
    for row in [] if texts else rows:
        check_turns(tokenizer, [*row["prompt"], *row["chosen"]], source, checked)
    fitting = [row for row in rows if _tokens(tokenizer, row["prompt"]) < data.max_length]
    if not fitting:
        raise UserError(
            f"in all {len(rows)} rows the prompt alone takes data.max_length = {data.max_length} tokens; raise it"
        )
    if len(fitting) < len(rows):
        logger.warning(
            "of %d rows, %d are dropped because their prompts take all of data.max_length = %d tokens.",
            len(rows),
            len(rows) - len(fitting),
            data.max_length,
        )
    return Dataset.from_list(fitting)


def _tokens(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> int:
    """Tokens of a prompt, as the trainer counts them."""
    if isinstance(prompt, str):
        return len(tokenizer(prompt, verbose=False)["input_ids"])
    ids: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return len(ids["input_ids"])
