"""Causal language modelling on plain texts, on prompts with completions, or on chats.

- **Text**: documents are joined, an end-of-sequence token after each, and cut into blocks of `max_length`
  tokens; the last block may be shorter. Every token is learned.
- **Prompt and completion**: joined with nothing between them, so a separator belongs into the data. Each is
  tokenized by itself, which gives the prompt the same tokens as at inference. Only the completion and the
  end-of-sequence token after it are learned.
- **Chat**: see `chat`.

A row longer than `max_length` loses its end, so a cut completion is not taught to stop there. Where nothing to
learn is left, the row is dropped and counted in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import List, Value
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.tasks import metrics
from loralloc.tasks.base import CHUNK, Logits, ModelSection, TaskData, evaluation_of, to_dataset
from loralloc.tasks.chat import Tokens, check_template, read_chats, tokenize_chats
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import LanguageModelData

logger = logging.getLogger(__name__)

Example = dict[str, list[int]]


def prepare(model: ModelSection, data: LanguageModelData, seed: int) -> TaskData:
    """Make everything a Trainer needs for a causal language model.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut.

    Returns:
        Model, data and metrics. The metric is the perplexity.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    contents = [_read(rows, data) for rows in splits.all()]

    checkpoint = locate(model)
    check_length(data.max_length, load_config(checkpoint), model.name)
    tokenizer = load_tokenizer(checkpoint)
    if data.messages is not None:
        check_template(tokenizer, model.name)
    elif tokenizer.eos_token_id is None:
        raise UserError(
            f'The tokenizer of model "{model.name}" has no end-of-sequence token to end a text with. '
            "Set eos_token in its tokenizer_config.json."
        )
    encoded = [to_dataset(tokenize(tokenizer), List(Value("int32"))) for tokenize in contents]

    def load() -> PreTrainedModel:
        return load_model("causal-lm", checkpoint, tokenizer, seed)

    return TaskData(
        model=load(),
        again=load,
        tokenizer=tokenizer,
        train=encoded[0],
        validation=encoded[1],
        test=encoded[2] if splits.test is not None else None,
        collator=PaddingCollator(cast(int, tokenizer.pad_token_id)),
        compute_metrics=language_model_metrics,
        preprocess_logits=token_scores,
        metric="perplexity",
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: LanguageModelData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained causal language model; see `tasks.prepare_evaluation`."""
    encoded = to_dataset(_read(read_rows(source), data)(tokenizer), List(Value("int32")))
    return evaluation_of(
        encoded,
        model=model,
        tokenizer=tokenizer,
        collator=PaddingCollator(cast(int, tokenizer.pad_token_id)),
        compute_metrics=language_model_metrics,
        preprocess_logits=token_scores,
        metric="perplexity",
    )


def _read(rows: Rows, data: LanguageModelData) -> Callable[[PreTrainedTokenizerBase], Iterator[Example]]:
    """Read the columns that the recipe names; what is returned tokenizes them."""
    named = [key for key in ("text", "prompt", "messages") if getattr(data, key) is not None]
    if len(named) != 1 or (data.prompt is None) != (data.completion is None):
        raise UserError(
            "A causal language model needs exactly one of data.text, data.prompt with data.completion, "
            "or data.messages."
        )
    length = data.max_length
    if data.messages is not None:
        chats = read_chats(rows, data.messages)
        return lambda tokenizer: fit(tokenize_chats(tokenizer, chats, rows), rows, length)
    if data.prompt is not None and data.completion is not None:
        prompts = rows.strings(data.prompt, "data.prompt")
        completions = rows.strings(data.completion, "data.completion")
        return lambda tokenizer: fit(tokenize_completions(tokenizer, prompts, completions), rows, length)
    documents = rows.strings(str(data.text), "data.text", blank=True)
    if not any(document.strip() for document in documents):
        raise UserError(f'{rows.source} has no text: column "{data.text}" (data.text) is empty in every row.')
    return lambda tokenizer: blocks(tokenizer, documents, length)


def blocks(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], max_length: int) -> Iterator[Example]:
    """Join documents and cut them into blocks.

    Args:
        tokenizer: The tokenizer.
        documents: Plain texts; those without any text are left out.
        max_length: Length of a block, in tokens.

    Yields:
        Blocks in which every token is learned.
    """
    lead = leading_tokens(tokenizer)
    # Some models begin every text with the token that ends it: one of them between two texts is enough.
    end = _end(tokenizer) if lead[-1:] != _end(tokenizer) else []
    pending: list[int] = []
    for start in range(0, len(documents), CHUNK):
        texts = [text for text in documents[start : start + CHUNK] if text.strip()]
        for ids in _plain_ids(tokenizer, texts):
            pending += lead + ids + end
        whole = len(pending) - len(pending) % max_length
        for at in range(0, whole, max_length):
            yield _example(pending[at : at + max_length])
        pending = pending[whole:]
    if len(pending) > 1:  # one token alone predicts nothing
        yield _example(pending)


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> Iterator[Tokens]:
    """Tokenize prompts and completions, each by itself.

    Args:
        tokenizer: The tokenizer.
        prompts: Not learned; each begins as the tokenizer begins a text.
        completions: Learned, with the end-of-sequence token added.

    Yields:
        The tokens of each pair.
    """
    lead, end = leading_tokens(tokenizer), _end(tokenizer)
    for start in range(0, len(prompts), CHUNK):
        chunk = slice(start, start + CHUNK)
        pairs = zip(_plain_ids(tokenizer, prompts[chunk]), _plain_ids(tokenizer, completions[chunk]), strict=True)
        for prompt, completion in pairs:
            ids = lead + prompt + completion + end
            learned = len(completion) + 1
            yield ids, [False] * (len(ids) - learned) + [True] * learned


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
            yield _example(ids[:max_length], learn[:max_length])
    dropped = len(rows) - kept
    if not kept:
        raise UserError(
            f"{rows.source}: in none of the {len(rows)} rows is anything to learn within the first {max_length} "
            "tokens. Raise data.max_length or shorten the prompts."
        )
    if cut or dropped:
        logger.warning(
            "%s: of %d rows, %d are longer than data.max_length = %d tokens and lose their end; "
            "%d are dropped because nothing to learn is left.",
            rows.source,
            len(rows),
            cut,
            max_length,
            dropped,
        )


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the special tokens that a tokenizer puts before a text, such as a beginning-of-sequence token.

    Args:
        tokenizer: The tokenizer.

    Returns:
        Their ids; what it puts after a text is not among them.
    """
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = range(len(full) - len(plain) + 1)
    return full[: next(at for at in starts if full[at : at + len(plain)] == plain)]


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [cast(int, tokenizer.eos_token_id)]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    # Not verbose: texts longer than the model are expected here, and cut later.
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _example(ids: list[int], learn: list[bool] | None = None) -> Example:
    labels = ids if learn is None else [i if keep else IGNORED for i, keep in zip(ids, learn, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


@dataclass(frozen=True)
class PaddingCollator:
    """Pads examples on the right to the longest of a batch.

    The attention mask tells padding from text: the padding token may be one that texts use.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            examples: Mappings with `input_ids`, `attention_mask` and `labels`.

        Returns:
            The same keys, each `[len(examples), longest]`.
        """
        fillers = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        longest = max(len(example["input_ids"]) for example in examples)
        return {
            key: torch.tensor([[*row[key], *[filler] * (longest - len(row[key]))] for row in examples])
            for key, filler in fillers.items()
        }


def token_scores(logits: Logits, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduce logits to two numbers a token, so that an evaluation never holds them all.

    Args:
        logits: `[n, length, vocabulary]`, or a tuple that begins with it.
        labels: `[n, length]`.

    Returns:
        Loss of every token after the first, and whether it was the likeliest; `[n, length - 1]` each.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    scores, targets = scores[:, :-1], labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        scores.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return losses, (scores.argmax(dim=-1) == targets).long()


def language_model_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Compute perplexity and accuracy over the learned tokens.

    Every token counts the same, unlike in a Trainer's `eval_loss`, which averages over batches.

    Args:
        prediction: What `token_scores` gave, and the labels.

    Returns:
        `perplexity` and `token_accuracy`.
    """
    losses, hits = cast(tuple[Any, Any], prediction.predictions)
    learned = np.asarray(prediction.label_ids)[:, 1:] != IGNORED
    return {
        "perplexity": metrics.perplexity(losses[learned]),
        "token_accuracy": float(np.mean(hits[learned])),
    }
