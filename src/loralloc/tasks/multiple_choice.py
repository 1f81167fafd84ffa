"""Multiple choice by likelihood: of several answers to a question, the one that a causal model finds the likeliest.

Training is on the right answers alone, as on prompts with completions (see `causal_lm`). An evaluation scores every
choice of every question and takes the likeliest: by the sum of its tokens' log-probabilities, by their mean, or by the
sum per character, which does not put long answers at a disadvantage. The end of the turn, or of the text, is learned,
but is no part of the score.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, List, Value, concatenate_datasets
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.tasks.base import Evaluated, ModelSection, TaskData, evaluation_of, to_dataset
from loralloc.tasks.causal_lm import fit, tokenize_answers
from loralloc.tasks.chat import Tokens, as_chats
from loralloc.tasks.choices import Question, chance, read_questions
from loralloc.tasks.data import load_splits, read_rows
from loralloc.tasks.forms import Pairs
from loralloc.tasks.pretrained import check_length, check_stacks, load_config, load_model, load_tokenizer, locate
from loralloc.tasks.rows import Rows
from loralloc.tasks.spec import LikelihoodChoiceData


def prepare(model: ModelSection, data: LikelihoodChoiceData, seed: int) -> TaskData:
    """Make everything a Trainer needs to answer multiple-choice questions with a causal language model.

    Args:
        model: The recipe's model section.
        data: The recipe's data section.
        seed: Seed of the validation cut.

    Returns:
        Model, data and metrics. The metric is the accuracy, with that of guessing as its reference.

    Raises:
        UserError: The recipe, the data or the model is at fault.
    """
    # All data are read and checked before the model is loaded: a mistake should show in a second.
    splits = load_splits(data, seed)
    sources = list(splits.all())
    read = list(zip(sources, read_questions(sources, data), strict=True))

    checkpoint = locate(model)
    config = load_config(checkpoint)
    check_stacks("multiple-choice", config, model.name)
    check_length(data.max_length, config, model.name)
    tokenizer = load_tokenizer(checkpoint)
    learned = [_right_answers(tokenizer, rows, questions, data, model.name) for rows, questions in read[:2]]
    judged = [_all_choices(tokenizer, rows, questions, data, model.name) for rows, questions in read[1:]]

    def load() -> PreTrainedModel:
        return load_model("multiple-choice", checkpoint, tokenizer, seed)

    return TaskData(
        model=load(),
        again=load,
        tokenizer=tokenizer,
        train=learned[0],
        validation=judged[0],
        learned_validation=learned[1],
        test=judged[1] if splits.test is not None else None,
        reference={"chance": chance(read[-1][1])},
        **_trained_with(tokenizer),
    )


def prepare_evaluation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: LikelihoodChoiceData, source: str
) -> TaskData:
    """Make everything a Trainer needs to evaluate a trained model; see `tasks.prepare_evaluation`."""
    rows = read_rows(source)
    (questions,) = read_questions([rows], data)
    judged = _all_choices(tokenizer, rows, questions, data, str(model.name_or_path))
    return evaluation_of(judged, model=model, tokenizer=tokenizer, **_trained_with(tokenizer))


def _trained_with(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fields of `TaskData` on the trainer: its arguments, options and metrics."""
    return {
        "arguments": {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None},
        "options": {"processing_class": tokenizer, "compute_metrics": choice_metrics},
        "metric": "accuracy",
        "example_losses": example_losses,
        "predictions": predictions,
    }


def _right_answers(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, questions: Sequence[Question], data: LikelihoodChoiceData, name: str
) -> Dataset:
    """Examples to learn from: every question with its right answer; those that are too long lose their end."""
    tokens = _tokens(tokenizer, rows, [(one.prompt, one.choices[one.right]) for one in questions], data, name)
    return to_dataset(fit(tokens, rows, data.max_length), List(Value("int32")))


def _all_choices(
    tokenizer: PreTrainedTokenizerBase, rows: Rows, questions: Sequence[Question], data: LikelihoodChoiceData, name: str
) -> Dataset:
    """Examples to judge by: every question with each of its choices, one example each.

    Raises:
        UserError: One is too long: choices that are cut cannot be compared.
    """
    places = [(i, n) for i, question in enumerate(questions) for n in range(len(question.choices))]
    pairs = [(questions[i].prompt, questions[i].choices[n]) for i, n in places]
    repeated = rows.select([i for i, _ in places])
    tokens = list(_tokens(tokenizer, repeated, pairs, data, name))
    lengths = [len(ids) for ids, _ in tokens]
    if (longest := max(lengths)) > data.max_length:
        raise UserError(
            f"{repeated.place(lengths.index(longest))}: the question with its choice takes {longest} tokens, and "
            f"choices that are cut at data.max_length = {data.max_length} cannot be compared; raise it"
        )
    examples = to_dataset(_judged(tokens, tokenizer), List(Value("int32")))
    columns = {
        "question": [i for i, _ in places],
        "right": [questions[i].right == n for i, n in places],
        "prompt": [prompt for prompt, _ in pairs],
        "choice": [choice for _, choice in pairs],
    }
    return concatenate_datasets([examples, Dataset.from_dict(columns)], axis=1)


def _tokens(
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    pairs: Sequence[tuple[str, str]],
    data: LikelihoodChoiceData,
    name: str,
) -> Iterator[Tokens]:
    """Tokenize pairs of a question and a choice; without a chat template, a space is put between them if need be."""
    if not as_chats(tokenizer, data.chat):
        pairs = [_apart(*pair) for pair in pairs]
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    return tokenize_answers(tokenizer, Pairs(prompts, answers), rows, data.chat, name)


def _apart(prompt: str, choice: str) -> tuple[str, str]:
    """A question and a choice with white space between them.

    A space belongs to the choice: tokenizers join it to the first word of some choices only, and all should be compared
    from the same place.

    >>> _apart("is it?", "yes"), _apart("is it? ", "yes")
    (('is it?', ' yes'), ('is it?', ' yes'))
    """
    if prompt[-1].isspace() and prompt[-1] != " ":
        return prompt, choice
    return prompt.removesuffix(" "), f" {choice}"


def _judged(tokens: Sequence[Tokens], tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, list[int]]]:
    """Examples whose labels are the tokens of the choice, without those that end the turn or the text."""
    special = set(tokenizer.all_special_ids)
    for ids, learn in tokens:
        kept = list(learn)
        last = max((at for at, one in enumerate(ids) if learn[at] and one in special), default=len(ids))
        if not str(tokenizer.decode(ids[last:], skip_special_tokens=True)).strip():
            kept[last:] = [False] * (len(ids) - last)
        yield {"input_ids": ids, "labels": [one if keep else IGNORED for one, keep in zip(ids, kept, strict=True)]}


def scores(evaluated: Evaluated) -> dict[str, list[NDArray[np.floating]]]:
    """The scores by which the choices of every question are compared.

    Args:
        evaluated: Sums of every choice, [n, 3] (loss, tokens, hits), with columns `question` and `choice`.

    Returns:
        By the name of the accuracy metric: one array of scores per question; the greatest is the likeliest choice.
    """
    losses, tokens = np.asarray(evaluated.predictions, dtype=np.float64)[:, :2].T
    characters = np.array([len(choice) for choice in evaluated.examples["choice"]])
    by = {"accuracy": -losses, "accuracy_token": -losses / tokens, "accuracy_character": -losses / characters}
    return {name: _by_question(values, evaluated) for name, values in by.items()}


def _by_question(values: NDArray[Any], evaluated: Evaluated) -> list[NDArray[Any]]:
    """Split values of all choices into one array per question."""
    return np.split(values, np.flatnonzero(np.diff(evaluated.examples["question"])) + 1)


def _right(evaluated: Evaluated) -> list[int]:
    """The index of the right choice of every question."""
    return [int(right.argmax()) for right in _by_question(np.array(evaluated.examples["right"]), evaluated)]


def choice_metrics(evaluated: Evaluated) -> dict[str, float]:
    """Compute the share of questions whose likeliest choice is the right one, and the loss of the right answers.

    Args:
        evaluated: See `scores`.

    Returns:
        `accuracy` (of the sums of log-probabilities), `accuracy_token`, `accuracy_character`, and `loss`, the mean over
        the tokens of the right answers.
    """
    right = _right(evaluated)
    losses, tokens, _ = np.asarray(evaluated.predictions, dtype=np.float64)[np.array(evaluated.examples["right"])].sum(
        0
    )
    found: dict[str, float] = {"loss": losses / tokens}
    for name, values in scores(evaluated).items():
        hits = [not np.isnan(one).any() and one.argmax() == answer for one, answer in zip(values, right, strict=True)]
        found[name] = float(np.mean(hits))
    return found


def example_losses(evaluated: Evaluated) -> NDArray[np.floating]:
    """The loss of every question, [questions]: minus the logarithm of the right choice's share of the likelihood."""
    values = zip(scores(evaluated)["accuracy"], _right(evaluated), strict=True)
    return np.array([np.logaddexp.reduce(one) - one[answer] for one, answer in values])


def predictions(evaluated: Evaluated) -> list[dict[str, Any]]:
    """For every question: the prompt, the right choice, the likeliest one, and the log-probability of each choice."""
    rows, at = [], 0
    for sums, right in zip(scores(evaluated)["accuracy"], _right(evaluated), strict=True):
        choices = evaluated.examples["choice"][at : at + len(sums)]
        rows.append(
            {
                "prompt": evaluated.examples["prompt"][at],
                "label": choices[right],
                "prediction": choices[int(sums.argmax())],
                "scores": {choice: round(float(value), 6) for choice, value in zip(choices, sums, strict=True)},
            }
        )
        at += len(sums)
    return rows
