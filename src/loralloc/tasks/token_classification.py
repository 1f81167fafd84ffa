"""Token classification: a tag for every word, such as its part of speech, or its place in the span of an entity."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from transformers import DataCollatorForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError, closest
from loralloc.methods.validation import IGNORED
from loralloc.tasks import metrics
from loralloc.tasks.base import Evaluated, ModelSection, TaskData, evaluation_of, first_output, to_dataset
from loralloc.tasks.classes import sort_labels
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate, replaces_head
from loralloc.tasks.rows import quote
from loralloc.tasks.sentences import Sentences, in_scheme, places_of_words, read_sentences, scheme_of
from loralloc.tasks.spans import span_metrics
from loralloc.tasks.spec import TokenClassificationData
from loralloc.tasks.tags import OUTSIDE, Scheme, recognise, spans_of, tag_set
from loralloc.tasks.windows import Window, by_row, check_fast, windows

logger = logging.getLogger(__name__)

COLUMNS = {
    "row": Value("int32"),
    "places": List(Value("int32")),
    "words": List(Value("string")),
    "tags": List(Value("string")),
    "text": Value("string"),
}
"""Columns of evaluation examples for metrics: the index of the row, the words that have labels, and, in a row's first
window only, its words, tags and text."""


def prepare(model: ModelSection, data: TokenClassificationData, seed: int) -> TaskData:
    """Make everything a Trainer needs to tag words.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of the new head.

    Returns:
        Model, data and metrics. The metric is the F1 of spans; or, where every tag stands alone, the accuracy, with
        the share of the training data's most frequent tag as its reference.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    read = [read_sentences(rows, data) for rows in splits.all()]
    scheme = scheme_of(read, data.scheme)
    sources = [in_scheme(sentences, scheme) for sentences in read]
    # Rows that are cut off for validation are training data too: a rare tag may occur only there.
    known = sources[: 1 if isinstance(data.validation, str) else 2]
    names = _names(known, scheme)
    for sentences in sources:
        _check_known(sentences, names)

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    check_fast(tokenizer, model.name)
    options: dict[str, Any] = {
        "num_labels": len(names),
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "ignore_mismatched_sizes": replaces_head(checkpoint, config, "ForTokenClassification", len(names)),
    }

    def load() -> PreTrainedModel:
        return load_model("token-classification", checkpoint, tokenizer, seed, **options)

    tagger = load()
    encoder = _Encoder(tokenizer, data, names, inspect.signature(tagger.forward).parameters.keys())
    judge = Judge(tuple(names), scheme)
    return TaskData(
        model=tagger,
        again=load,
        tokenizer=tokenizer,
        train=encoder.training(sources[0]),
        validation=encoder.evaluation(sources[1]),
        test=encoder.evaluation(sources[2]) if splits.test is not None else None,
        **_trained_with(tokenizer, judge),
        reference=_majority(sources[0], sources[-1]) if scheme == "plain" else {},
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: TokenClassificationData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained tagger; see `tasks.prepare_evaluation`."""
    names = [str(name) for _, name in sorted((model.config.id2label or {}).items())]
    learned = recognise(names) or "plain"
    read = read_sentences(read_rows(source), data)
    scheme = data.scheme or ("iob1" if learned == "bio" and recognise(read.found) == "iob1" else learned)
    sentences = in_scheme(read, scheme)
    _check_known(sentences, names)
    keys = inspect.signature(model.forward).parameters.keys()
    judge = Judge(tuple(names), scheme)
    return evaluation_of(
        _Encoder(tokenizer, data, names, keys).evaluation(sentences),
        model=model,
        tokenizer=tokenizer,
        **_trained_with(tokenizer, judge),
    )


def _trained_with(tokenizer: PreTrainedTokenizerBase, judge: Judge) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its options, metrics and predictions."""
    options = {
        "data_collator": DataCollatorForTokenClassification(tokenizer),
        "preprocess_logits_for_metrics": first_output,
        "compute_metrics": judge.metrics,
    }
    return {
        "options": options,
        "metric": judge.metric,
        "example_losses": example_losses,
        "predictions": judge.predictions,
    }


def _names(sources: Sequence[Sentences], scheme: Scheme) -> list[str]:
    """The tags to learn, in the order of the model's outputs."""
    found: set[str] = set().union(*(sentences.found for sentences in sources))
    if len(found) < 2:
        raise UserError(
            f"Token classification needs two tags or more; {sources[0].rows.source} has {', '.join(found)} alone."
        )
    return sort_labels(list(found)) if scheme == "plain" else tag_set(found, scheme)


def _check_known(sentences: Sentences, names: Sequence[str]) -> None:
    for i, tags in enumerate(sentences.tags):
        for word, tag in zip(sentences.words[i], tags, strict=True):
            if tag not in names:
                raise UserError(
                    f'{sentences.rows.place(i)}: tag "{tag}" of the word {quote(word)} is not among the tags of the '
                    f"training data ({quote(list(names))[1:-1]}).{closest(tag, names)}"
                )


def _majority(train: Sentences, judged: Sentences) -> dict[str, float]:
    """The accuracy of always predicting the training data's most frequent tag."""
    commonest = Counter(tag for tags in train.tags for tag in tags).most_common(1)[0][0]
    target = [tag for tags in judged.tags for tag in tags]
    return {"majority": target.count(commonest) / len(target)}


@dataclass(frozen=True)
class _Encoder:
    """Turns sentences into examples."""

    tokenizer: PreTrainedTokenizerBase
    data: TokenClassificationData
    names: Sequence[str]
    keys: Collection[str]

    def training(self, sentences: Sentences) -> Dataset:
        """Examples to learn from: windows in which a word has a label."""
        index = {name: i for i, name in enumerate(self.names)}
        examples = [
            {**window.inputs, "labels": _labels(window, places, sentences.tags[window.row], index)}
            for window, places in self._windows(sentences)
            if places
        ]
        if not examples:
            raise UserError(f"{sentences.rows.source}: no word gives a token, so there is nothing to learn")
        return to_dataset(examples, List(Value("int32")))

    def evaluation(self, sentences: Sentences) -> Dataset:
        """Examples to evaluate on, with the columns for metrics; every row has at least one example."""
        return to_dataset(self._judged(sentences), List(Value("int32")), **COLUMNS)

    def _judged(self, sentences: Sentences) -> Iterator[dict[str, Any]]:
        index, last = {name: i for i, name in enumerate(self.names)}, -1
        for window, places in self._windows(sentences):
            row, first = window.row, window.row > last
            if not first and not places:
                continue
            yield {
                **window.inputs,
                "labels": _labels(window, places, sentences.tags[row], index),
                "row": row,
                "places": list(places.values()),
                "words": sentences.words[row] if first else [],
                "tags": sentences.tags[row] if first else [],
                "text": sentences.texts[row] if first and sentences.texts else "",
            }
            last = row

    def _windows(self, sentences: Sentences) -> Iterator[tuple[Window, dict[int, int]]]:
        """Yield the windows, each with a mapping from the tokens that have a label to their words."""
        words: list[list[str]] = sentences.words
        backend: Any = self.tokenizer.backend_tokenizer
        if "ByteLevel" in repr(backend.pre_tokenizer):
            # Its tokens hold the space before a word; without one, words would be tokenized as if glued together.
            words = [[f" {word}" if word else word for word in row] for row in words]
        made = windows(
            self.tokenizer,
            words,
            keys=self.keys,
            max_length=self.data.max_length,
            stride=self.data.stride,
            is_split_into_words=True,
        )
        of_row: list[Window] = []
        cut, lost = 0, 0
        for window in made:
            if of_row and window.row != of_row[0].row:
                yield from zip(of_row, _where_judged(of_row), strict=True)
                of_row = []
            of_row.append(window)
            if self.data.stride is None and (rest := _rest(window, len(words[window.row]))):
                cut, lost = cut + 1, lost + rest
        yield from zip(of_row, _where_judged(of_row), strict=True)
        if cut:
            logger.warning(
                "%s: %d of %d sentences are longer than data.max_length, which is %d; %d of their words are cut off: "
                "not learned, and missed in metrics. Raise it, or set data.stride to read them in windows.",
                sentences.rows.source,
                cut,
                len(words),
                self.data.max_length,
                lost,
            )


def _rest(window: Window, count: int) -> int:
    """The number of words that the only window of a row does not reach."""
    overflows = bool(window.encoding.overflowing)
    reached = max((word for word in window.encoding.word_ids if word is not None), default=-1)
    return count - reached - 1 if overflows else 0


def _where_judged(of_row: Sequence[Window]) -> list[dict[int, int]]:
    """For each window of a row, which token has the label of which word.

    A word is labelled at its first token, in the window with the most context: the tokens on the side that has fewer. A
    window may begin in the middle of a word; it has no context there, so the window where the word begins is preferred.
    """
    best: dict[int, tuple[int, int, int]] = {}
    for number, window in enumerate(of_row):
        real = [(token, word) for token, word in enumerate(window.encoding.word_ids) if word is not None]
        before = None
        for order, (token, word) in enumerate(real):
            context = min(order, len(real) - 1 - order)
            if word != before and (word not in best or context > best[word][0]):
                best[word] = (context, number, token)
            before = word
    found: list[dict[int, int]] = [{} for _ in of_row]
    for word, (_, number, token) in sorted(best.items()):
        found[number][token] = word
    return found


def _labels(window: Window, places: Mapping[int, int], tags: Sequence[str], index: Mapping[str, int]) -> list[int]:
    labels = [IGNORED] * len(window.encoding.ids)
    for token, word in places.items():
        labels[token] = index[tags[word]]
    return labels


@dataclass(frozen=True)
class Judge:
    """Scores predicted tags.

    Attributes:
        names: The tags, in the order of the model's outputs.
        scheme: How they write spans.
    """

    names: tuple[str, ...]
    scheme: Scheme

    @property
    def metric(self) -> str:
        """The first of its metrics."""
        return "accuracy" if self.scheme == "plain" else "f1"

    def metrics(self, evaluated: Evaluated) -> dict[str, float]:
        """Compute the metrics of an evaluation.

        Returns:
            With spans, `f1`, `precision` and `recall` of all spans and of each type (`f1_TYPE`); with tags that stand
            alone, `macro_f1`; the `accuracy` of words; and `loss`, the mean over all words that have a token.
        """
        rows, (losses, judged) = self._read(evaluated), word_losses(evaluated)
        target = np.array([tag for row in rows for tag in row.tags])
        predicted = np.array([tag or "" for row in rows for tag in row.predicted])
        found = {"accuracy": metrics.accuracy(predicted, target), "loss": float(losses[judged].mean())}
        if self.scheme == "plain":
            occurring = sorted(set(target) | set(predicted) - {""})  # a word that was cut off has no tag
            each = [metrics.f1(predicted == tag, target == tag) for tag in occurring]
            return {**found, "macro_f1": float(np.mean(each))}
        spans = span_metrics(
            [spans_of(row.tags) for row in rows], [spans_of([tag or OUTSIDE for tag in row.predicted]) for row in rows]
        )
        return {**spans, **found}

    def predictions(self, evaluated: Evaluated) -> list[dict[str, Any]]:
        """The prediction for every sentence: a tag per word (null if it was cut off), and the spans of a text."""
        return [self._shown(row) for row in self._read(evaluated)]

    def _shown(self, row: _Judged) -> dict[str, Any]:
        shown: dict[str, Any] = {"words": row.words, "tags": row.tags, "predicted": row.predicted}
        if not row.text:
            return shown
        places, spans = places_of_words(row.text), spans_of([tag or OUTSIDE for tag in row.predicted])
        ends = [(places[span.start].start, places[span.end - 1].end, span.label) for span in spans]
        shown["spans"] = [
            {"start": start, "end": end, "label": label, "text": row.text[start:end]} for start, end, label in ends
        ]
        return {"text": row.text, **shown}

    def _read(self, evaluated: Evaluated) -> list[_Judged]:
        """Join the windows of every sentence."""
        examples = evaluated.examples
        logits, labels = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
        # argmax returns the place of a NaN: without this, a broken model would predict some tag.
        chosen = np.where(np.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))
        rows = []
        for of_row in by_row(examples["row"]):
            first = examples[of_row[0]]
            predicted: list[str | None] = [None] * len(first["words"])
            for window in of_row:
                tags = chosen[window][labels[window] != IGNORED]
                for word, tag in zip(examples[window]["places"], tags, strict=True):
                    predicted[word] = self.names[tag] if tag >= 0 else None
            rows.append(_Judged(first["words"], first["tags"], predicted, first["text"]))
        return rows


@dataclass(frozen=True)
class _Judged:
    """A sentence with its tags and its predicted tags."""

    words: list[str]
    tags: list[str]
    predicted: list[str | None]
    text: str


def word_losses(evaluated: Evaluated) -> tuple[NDArray[np.floating], NDArray[np.bool_]]:
    """Return (the loss of every token, [windows, length], 0 where it has no label; whether it has one)."""
    logits, labels = np.asarray(evaluated.predictions), np.asarray(evaluated.label_ids)
    judged, losses = labels != IGNORED, np.zeros(labels.shape)
    losses[judged] = metrics.cross_entropy(logits[judged], labels[judged])
    return losses, judged


def example_losses(evaluated: Evaluated) -> NDArray[np.floating]:
    """The mean loss of the words of every sentence, [n]; 0 where none has a token."""
    losses, judged = word_losses(evaluated)
    rows = by_row(evaluated.examples["row"])
    return np.array([losses[row].sum() / max(1, judged[row].sum()) for row in rows])
