"""Extractive question answering: find the answer to a question in a text, or that the text has none."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.tasks import metrics
from loralloc.tasks.answer_search import Scored, answer_metrics, best_span
from loralloc.tasks.base import Evaluated, ModelSection, TaskData, evaluation_of, to_dataset
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate
from loralloc.tasks.questions import Answer, Questions, read_questions
from loralloc.tasks.rows import quote
from loralloc.tasks.spec import QuestionData
from loralloc.tasks.windows import Window, by_row, check_fast, windows

SILENT = "may_not_answer"
"""Key of a model's configuration: whether its training data have questions without an answer."""

ENDS = {"start_positions": Value("int32"), "end_positions": Value("int32")}
COLUMNS = {
    "row": Value("int32"),
    "starts": List(Value("int32")),
    "ends": List(Value("int32")),
    "question": Value("string"),
    "context": Value("string"),
    "answers": List(Value("string")),
}
"""Columns of evaluation examples for metrics: the index of the row, the character offsets of each token of the context
(-1 for other tokens), and, in a row's first window only, its question, context and answers."""


def prepare(model: ModelSection, data: QuestionData, seed: int) -> TaskData:
    """Make everything a Trainer needs to answer questions.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut and of the new head.

    Returns:
        Model, data and metrics. The metric is SQuAD's F1.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    sources = [read_questions(rows, data) for rows in splits.all()]
    known = sources[: 1 if isinstance(data.validation, str) else 2]  # a split that is cut off is training data too
    if not any(answers for source in known for answers in source.answers):
        raise UserError(
            f"{known[0].rows.source}: no question has an answer (data.answers), so there is nothing to learn"
        )

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    check_fast(tokenizer, model.name)
    tokenizer.padding_side = "right"  # positions of answers are counted from the first token
    silent = not all(source.all_answered for source in known)

    def load() -> PreTrainedModel:
        reader = load_model("question-answering", checkpoint, tokenizer, seed)
        setattr(reader.config, SILENT, silent)
        return reader

    reader = load()
    encoder = _Encoder(tokenizer, data, inspect.signature(reader.forward).parameters.keys())
    judge = Judge(data.answer_length, data.no_answer_threshold if silent else None)
    return TaskData(
        model=reader,
        again=load,
        tokenizer=tokenizer,
        train=encoder.training(sources[0]),
        validation=encoder.evaluation(sources[1]),
        test=encoder.evaluation(sources[2]) if splits.test is not None else None,
        **_trained_with(tokenizer, judge),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: QuestionData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained model; see `tasks.prepare_evaluation`."""
    questions = read_questions(read_rows(source), data)
    encoder = _Encoder(tokenizer, data, inspect.signature(model.forward).parameters.keys())
    judge = Judge(data.answer_length, data.no_answer_threshold if getattr(model.config, SILENT, False) else None)
    return evaluation_of(
        encoder.evaluation(questions),
        model=model,
        tokenizer=tokenizer,
        **_trained_with(tokenizer, judge),
    )


def _trained_with(tokenizer: PreTrainedTokenizerBase, judge: Judge) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its options, metrics and predictions."""
    options = {
        "data_collator": DataCollatorWithPadding(tokenizer),
        "preprocess_logits_for_metrics": both_ends,
        "compute_metrics": judge.metrics,
    }
    return {
        "options": options,
        "metric": "f1",
        "example_losses": example_losses,
        "predictions": judge.predictions,
    }


def both_ends(logits: tuple[torch.Tensor, ...], labels: Any) -> tuple[torch.Tensor, ...]:
    """Keep the start and end logits, and drop what some models return beside them.

    Args:
        logits: Outputs of a batch.
        labels: Not needed.
    """
    del labels
    return logits[:2]


@dataclass(frozen=True)
class _Encoder:
    """Turns questions into examples."""

    tokenizer: PreTrainedTokenizerBase
    data: QuestionData
    keys: Collection[str]

    def training(self, questions: Questions) -> Dataset:
        """Examples to learn from: every window, also those without the answer."""
        made = ({**window.inputs, **self._ends(questions, window)} for window in self._windows(questions))
        return to_dataset(made, None, **ENDS)

    def evaluation(self, questions: Questions) -> Dataset:
        """Examples to evaluate on, with what metrics need."""
        return to_dataset(self._judged(questions), None, **ENDS, **COLUMNS)

    def _judged(self, questions: Questions) -> Iterator[dict[str, Any]]:
        last = -1
        for window in self._windows(questions):
            row, first = window.row, window.row > last
            places = _places(window)
            yield {
                **window.inputs,
                **self._ends(questions, window),
                "row": row,
                "starts": [start for start, _ in places],
                "ends": [end for _, end in places],
                "question": questions.questions[row] if first else "",
                "context": questions.contexts[row] if first else "",
                "answers": [answer.text for answer in questions.answers[row]] if first else [],
            }
            last = row

    def _ends(self, questions: Questions, window: Window) -> dict[str, int]:
        """The first and the last token of the first answer; token 0 for both if the window does not hold it."""
        answers = questions.answers[window.row]
        start, end = answer_tokens(_places(window), answers[0]) if answers else (0, 0)
        return {"start_positions": start, "end_positions": end}

    def _windows(self, questions: Questions) -> Iterator[Window]:
        self._check_room(questions)
        return windows(
            self.tokenizer,
            questions.questions,
            questions.contexts,
            keys=self.keys,
            max_length=self.data.max_length,
            stride=self._stride,
        )

    @property
    def _stride(self) -> int:
        return self.data.max_length // 3 if self.data.stride is None else self.data.stride

    def _check_room(self, questions: Questions) -> None:
        """Refuse a question so long that windows could not advance: they would share all their context tokens."""
        special = self.tokenizer.num_special_tokens_to_add(pair=True)
        asked: Any = self.tokenizer(questions.questions, add_special_tokens=False)["input_ids"]
        for i, ids in enumerate(asked):
            room = self.data.max_length - special - len(ids)
            if room <= self._stride:
                raise UserError(
                    f"{questions.rows.place(i)}: the question has {len(ids)} tokens; of data.max_length, which is "
                    f"{self.data.max_length}, it leaves {max(0, room)} for the context, and windows share "
                    f"{self._stride} of them (data.stride). Raise data.max_length: {quote(questions.questions[i])}"
                )


def _places(window: Window) -> list[tuple[int, int]]:
    """The character offsets of each token of the context; (-1, -1) for other tokens."""
    encoding = window.encoding
    pairs = zip(encoding.sequence_ids, encoding.offsets, strict=True)
    return [offsets if sequence == 1 else (-1, -1) for sequence, offsets in pairs]


def answer_tokens(places: list[tuple[int, int]], answer: Answer) -> tuple[int, int]:
    """Find the tokens of an answer.

    Args:
        places: The character offsets of each token of the context; (-1, -1) for other tokens.
        answer: The answer.

    Returns:
        Its first and its last token; (0, 0) where not all of it is in the window.
    """
    start, end = answer.end - len(answer.text.lstrip()), answer.start + len(answer.text.rstrip())
    inside = [i for i, (first, last) in enumerate(places) if first < end and last > start]
    if not inside or places[inside[0]][0] > start or places[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]


@dataclass(frozen=True)
class Judge:
    """Scores predicted answers.

    Attributes:
        longest: Tokens of an answer, at most.
        threshold: The margin above which the prediction is that there is no answer; None: always an answer.
    """

    longest: int
    threshold: float | None

    def metrics(self, evaluated: Evaluated) -> dict[str, float]:
        """Compute `f1` and `exact_match`, and more with questions that have no answer; see `answer_metrics`."""
        return answer_metrics([scored for _, scored in self._read(evaluated)], self.threshold)

    def predictions(self, evaluated: Evaluated) -> list[dict[str, Any]]:
        """For every question: the predicted answer (empty for none), and the scores of the best answer and of none."""
        return [
            {
                "question": question,
                "answer": scored.predicted(self.threshold),
                "score": scored.score,
                "no_answer_score": scored.no_answer,
                "references": list(scored.references),
            }
            for question, scored in self._read(evaluated)
        ]

    def _read(self, evaluated: Evaluated) -> list[tuple[str, Scored]]:
        """The text of every question, and the best answer over all its windows."""
        examples = evaluated.examples
        starts, ends = (np.asarray(side) for side in evaluated.predictions)
        found = []
        for of_row in by_row(examples["row"]):
            first, score, answer = examples[of_row[0]], -np.inf, ""
            for window in of_row:
                example: Mapping[str, Any] = examples[window]
                count = len(example["starts"])
                allowed = np.array(example["starts"]) >= 0
                best = best_span(starts[window, :count], ends[window, :count], allowed, self.longest)
                if best is not None and best.score > score:
                    score = best.score
                    answer = first["context"][example["starts"][best.start] : example["ends"][best.end]]
            no_answer = min(float(starts[window, 0] + ends[window, 0]) for window in of_row)
            found.append((first["question"], Scored(answer, score, no_answer, first["answers"])))
        return found


def example_losses(evaluated: Evaluated) -> NDArray[np.floating]:
    """The loss of every question, [n]: the mean over its windows of the mean of start and end loss."""
    sides = zip(evaluated.predictions, evaluated.label_ids, strict=True)
    lengths = [len(starts) for starts in evaluated.examples["starts"]]
    losses = np.mean([_losses(np.asarray(logits), np.asarray(labels), lengths) for logits, labels in sides], axis=0)
    return np.array([losses[of_row].mean() for of_row in by_row(evaluated.examples["row"])])


def _losses(logits: NDArray[np.floating], labels: NDArray[np.integer], lengths: list[int]) -> NDArray[np.floating]:
    """Cross-entropy of the start or the end in every window, [windows]; padding is left out."""
    behind = np.arange(logits.shape[1])[None, :] >= np.array(lengths)[:, None]
    return metrics.cross_entropy(np.where(behind, -np.inf, logits), labels)
