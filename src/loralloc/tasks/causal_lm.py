"""Causal language modelling on plain texts, on prompts with answers, or on chats, with TRL's SFTTrainer.

- **Text**: every token is learned, and an end-of-sequence token after each text.
- **Prompt and completion**: only the completion and the end-of-sequence token after it are learned. Where the model has
  a chat template, they are turns of a chat (`data.chat`).
- **Chat**: the assistant's turns are learned; see `chat`.

What is learned is decided here; packing, padding and the loss are TRL's. A row longer than `max_length` loses its end,
so a cut completion is not taught to stop there. Where nothing to learn is left, the row is dropped and counted in a
warning; of streamed rows, at the end of the first pass.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length, pack_dataset

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.tasks.base import ModelSection, TaskData, evaluation_of, to_dataset, warn_of_cuts
from loralloc.tasks.chat import Tokens, as_chats, check_template, tokenize_chats
from loralloc.tasks.data import first_pieces, load_splits, read_rows, stream_rows
from loralloc.tasks.forms import Chats, Form, Pairs, Texts, read_form
from loralloc.tasks.pretrained import (
    check_end,
    check_length,
    check_stacks,
    load_config,
    load_model,
    load_tokenizer,
    locate,
)
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import LanguageModelData
from loralloc.tasks.token_sums import example_losses, language_model_metrics, token_predictions

logger = logging.getLogger(__name__)

Example = dict[str, list[int]]
Tell = Callable[[int], None]

SHUFFLED = 1000
"""Size of the shuffle buffer for streamed examples."""


def prepare(model: ModelSection, data: LanguageModelData, seed: int) -> TaskData:
    """Make everything a Trainer needs for a causal language model.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut, and of the order of streamed examples.

    Returns:
        Model, data and metrics. The metric is the perplexity.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    forms = [(rows, read_form(rows, data)) for rows in splits.all()]

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_stacks("causal-lm", config, model.name)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    encoder = Encoder(tokenizer, data, model.name)
    encoded = [encoder.dataset(rows, form) for rows, form in forms]
    train = encoder.stream(seed) if data.streaming else encoded.pop(0)

    def load() -> PreTrainedModel:
        return load_model("causal-lm", checkpoint, tokenizer, seed)

    return TaskData(
        model=load(),
        again=load,
        tokenizer=tokenizer,
        train=train,
        validation=encoded[0],
        test=encoded[1] if splits.test is not None else None,
        packed=encoder.packed,
        **encoder.trained_with(),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: LanguageModelData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained causal language model; see `tasks.prepare_evaluation`."""
    rows, encoder = read_rows(source), Encoder(tokenizer, data, str(model.name_or_path))
    encoded = encoder.dataset(rows, read_form(rows, data))
    return evaluation_of(encoded, model=model, tokenizer=tokenizer, **encoder.trained_with())


class Encoder:
    """Turns rows into examples of `input_ids` and `labels`, as a recipe says.

    Args:
        tokenizer: The model's tokenizer.
        data: The recipe's data section.
        name: Name of the model, for messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: LanguageModelData, name: str) -> None:
        self._tokenizer, self._data, self._name = tokenizer, data, name

    def dataset(self, rows: Rows, form: Form) -> Dataset:
        """Tokenize rows.

        Raises:
            UserError: The tokenizer does not fit them, or nothing to learn is left.
        """
        if isinstance(form, Texts) and not any(text.strip() for text in form.texts):
            column = self._data.text or "text"
            raise UserError(f'{rows.source} has no text: column "{column}" (data.text) is empty in every row.')
        tokens = self._tokens(rows, form)
        if self._packing(form) == "wrapped":
            return self._blocks(to_dataset(map(_example, tokens), List(Value("int32"))))
        return to_dataset(fit(tokens, rows, self._data.max_length), List(Value("int32")))

    def stream(self, seed: int) -> IterableDataset:
        """Tokenize the training rows while they are read, over and over.

        The stream has no end, because a Trainer that resumes can skip batches of one pass only. The beginning of every
        source is read at once: a mistake should not show in the middle of a training.

        Raises:
            UserError: A source cannot be read, is empty, or does not fit the tokenizer, or what to learn is not known.
        """
        first = first_pieces(self._data)
        forms = [read_form(rows, self._data) for rows in first]
        for rows, form in zip(first, forms, strict=True):
            deque(self._tokens(rows, form, lambda _: None), maxlen=0)  # what does not fit the tokenizer is refused here
        columns, wrapped, told = first[0].columns, self._packing(forms[0]) == "wrapped", False
        source, max_length = " and ".join(rows.source for rows in first), self._data.max_length

        def examples() -> Iterator[Example]:
            nonlocal told
            count = cut = kept = 0
            joined: list[int] = []
            for rows in stream_rows(self._data, columns):
                count += len(rows)
                for ids, learn in self._tokens(rows, read_form(rows, self._data), joined.append):
                    length = None if wrapped else max_length
                    cut += len(ids) > max_length
                    if any(learn[1:length]):
                        kept += 1
                        yield _example((ids[:length], learn[:length]))
            if not kept:
                raise UserError(f"{source}: in none of the streamed rows is anything to learn")
            if not told:
                told = True
                if not wrapped:
                    warn_of_cuts(source, count, max_length, cut, count - kept)
                _tell_joined(sum(joined))

        stream: Any = IterableDataset.from_generator(examples).repeat(None).shuffle(seed, buffer_size=SHUFFLED)
        return self._blocks(stream) if wrapped else stream

    def _blocks(self, examples: Any) -> Any:
        """Join examples and cut them into blocks; those in which nothing is learned are left out."""
        blocks: Any = pack_dataset(examples, self._data.max_length, "wrapped")
        return blocks.filter(lambda block: any(label != IGNORED for label in block["labels"][1:]))

    def packed(self, examples: Dataset) -> int:
        """How many rows the trainer makes of some examples."""
        if self._data.packing != "bfd":
            return len(examples)
        return len(pack_dataset(examples.select_columns(["input_ids", "labels"]), self._data.max_length, "bfd"))

    def trained_with(self) -> dict[str, Any]:
        """The fields of `TaskData` on the trainer: its arguments, options and metrics."""
        arguments: dict[str, Any] = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
        if self._data.packing == "bfd":
            arguments = {"packing": True, "packing_strategy": "bfd", "eval_packing": False}
            arguments["max_length"] = self._data.max_length
        return {
            "arguments": arguments,
            "options": {"processing_class": self._tokenizer, "compute_metrics": language_model_metrics},
            "metric": "perplexity",
            "example_losses": example_losses,
            "predictions": token_predictions,
        }

    def _packing(self, form: Form) -> str:
        return self._data.packing or ("wrapped" if isinstance(form, Texts) else "none")

    def _tokens(self, rows: Rows, form: Form, tell: Tell | None = None) -> Iterator[Tokens]:
        tokenizer, data = self._tokenizer, self._data
        if isinstance(form, Chats) and data.chat is False:
            raise UserError(f"data.chat: false is for texts, and the rows of {rows.source} are chats; take it out")
        if isinstance(form, Pairs) and (data.learn == "all" or as_chats(tokenizer, data.chat)):
            return tokenize_answers(tokenizer, form, rows, data.chat, self._name, tell)
        if isinstance(form, Chats):
            check_template(tokenizer, self._name)
            return tokenize_chats(tokenizer, form.chats, rows, data.learn)
        if data.learn == "last" or data.chat:
            key = "learn: last" if data.learn == "last" else "chat: true"
            raise UserError(f"data.{key} is for chats, and the rows of {rows.source} are texts; take it out")
        assert isinstance(form, Texts)
        check_end(tokenizer, self._name)
        return tokenize_texts(tokenizer, form.texts)


def tokenize_answers(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Pairs,
    rows: Rows,
    chat: bool | None,
    name: str,
    tell: Tell | None = None,
) -> Iterator[Tokens]:
    """Tokenize prompts with the answers to learn, as chats of two turns or as plain text.

    Args:
        tokenizer: The model's tokenizer.
        pairs: Prompts and answers.
        rows: Where they came from, for messages.
        chat: Whether they become turns of a chat; None: if the tokenizer has a template.
        name: Name of the model, for messages.
        tell: See `tokenize_pairs`.

    Raises:
        UserError: The tokenizer renders no chats, or has no end-of-sequence token.
    """
    if as_chats(tokenizer, chat):
        check_template(tokenizer, name)
        return tokenize_chats(tokenizer, pairs.chats(), rows)
    check_end(tokenizer, name)
    return tokenize_pairs(tokenizer, pairs.prompts, pairs.completions, tell)


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[Tokens]:
    """Tokenize texts; all of their tokens are learned. Blank texts are left out."""
    end = _end(tokenizer)
    for text in texts:
        if text.strip():
            ids = _ids(tokenizer, text, end)
            yield ids, [True] * len(ids)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], completions: Iterable[str], tell: Tell | None = None
) -> Iterator[Tokens]:
    """Tokenize prompts with the completions to learn, as TRL does.

    The completion begins at the first token that differs from the tokens of the prompt alone: a token that holds both
    the end of the prompt and the start of the completion is learned.

    Args:
        tokenizer: The model's tokenizer.
        prompts: The prompts.
        completions: A completion for each.
        tell: Takes the number of rows with such a token at the end; by default a warning says it.

    Yields:
        The tokens of each pair.
    """
    end, joined = _end(tokenizer), 0
    for prompt, completion in zip(prompts, completions, strict=True):
        ids, alone = _ids(tokenizer, prompt + completion, end), _ids(tokenizer, prompt)
        before = common_prefix_length(alone, ids)
        joined += before < len(alone) - (not end)  # the end that the tokenizer adds is no part of the prompt
        yield ids, [False] * before + [True] * (len(ids) - before)
    (tell or _tell_joined)(joined)


def _tell_joined(count: int) -> None:
    """Warn of rows in which prompt and completion share a token, if there are any."""
    if count:
        logger.warning(
            "in %d rows the end of the prompt and the start of the completion are one token, which the model will not "
            "see when it is given the prompt alone: end prompts with a new line, or without a space and begin "
            'completions with one (data.completion: " {column}")',
            count,
        )


def _end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The end of a text: the end-of-sequence token, or nothing where the tokenizer adds it itself."""
    return "" if tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id else str(tokenizer.eos_token)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, end: str = "") -> list[int]:
    # Not verbose: texts longer than the model are expected here, and cut later.
    return tokenizer(text if text.endswith(end) else text + end, verbose=False)["input_ids"]


def fit(tokenized: Iterable[Tokens], rows: Rows, max_length: int) -> Iterator[Example]:
    """Cut examples to `max_length` and drop those that have nothing left to learn.

    Args:
        tokenized: Ids, and for each whether to learn it.
        rows: Where they came from, for messages.
        max_length: Longest example, in tokens.

    Yields:
        The examples that are left.

    Raises:
        UserError: None is left.
    """
    cut = kept = 0
    for ids, learn in tokenized:
        cut += len(ids) > max_length
        # The first token of all has no context to be predicted from.
        if any(learn[1:max_length]):
            kept += 1
            yield _example((ids[:max_length], learn[:max_length]))
    dropped = len(rows) - kept
    if not kept:
        raise UserError(
            f"{rows.source}: in none of the {len(rows)} rows is anything to learn within the first {max_length} "
            "tokens. Raise data.max_length or shorten the prompts."
        )
    warn_of_cuts(rows.source, len(rows), max_length, cut, dropped)


def _example(tokens: Tokens) -> Example:
    ids, learn = tokens
    return {"input_ids": ids, "labels": [i if keep else IGNORED for i, keep in zip(ids, learn, strict=True)]}
