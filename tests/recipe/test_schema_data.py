"""Promises: what the data sections of tasks allow, and what speaks against it is told with its line."""

from __future__ import annotations

import pytest
from recipe_texts import LANGUAGE_MODEL, Write, edit, problems

from loralloc.errors import UserError
from loralloc.recipe.schema import load_recipe


def test_columns_of_language_models_need_not_be_named(write: Write) -> None:
    assert load_recipe(write(edit("text: text", "max_length: 5", LANGUAGE_MODEL))).data.text is None


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("training.steps=null", "so their number is not known; set training.steps"),
        ("data.validation=0.1", "so nothing can be cut off; name a file in data.validation"),
        ("data.test=0.1", "so nothing can be cut off; name a file in data.test"),
        (
            "data.train=[{source: a.jsonl, weight: 2}]",
            "one source after the other; take the weights out",
        ),
    ],
)
def test_what_a_stream_cannot_do(write: Write, new: str, expected: str) -> None:
    text = edit("text: text", "text: text\n  validation: b.jsonl\n  streaming: true", LANGUAGE_MODEL)
    assert load_recipe(write(text)).data.streaming
    flags = [f"--{new}", "--training.epochs=1"] if "steps" in new else [f"--{new}"]
    with pytest.raises(UserError) as error:
        load_recipe(write(text), flags)
    assert f"data.streaming reads the training data while training, {expected}" in str(error.value)


def test_rows_to_test_on_are_not_cut_off_what_weights_mix_anew(write: Write) -> None:
    path = write(edit("text: text", "text: text\n  test: 0.1", LANGUAGE_MODEL))
    assert load_recipe(path, ["--data.train", "[a.jsonl, b.jsonl]"]).data.test == 0.1
    with pytest.raises(UserError) as error:
        load_recipe(path, ["--data.train", "[{source: a.jsonl, weight: 2}]"])
    assert str(error.value) == (
        "recipe.yaml:6: data.test is 0.1, but training data mixed by weights are others for every training.seed; name "
        "data to test on, or take the weights out of data.train"
    )


@pytest.mark.parametrize("name", ["validation", "test"])
def test_more_data_have_names_of_their_own(write: Write, name: str) -> None:
    path = write(edit("text: text", f"text: text\n  also:\n    maths: a.jsonl\n    {name}: b.jsonl", LANGUAGE_MODEL))
    assert problems(path) == [
        f"recipe.yaml:8: data.also.{name}: the results have data.{name} by this name; choose another"
    ]
    assert load_recipe(path, ["--data.also", "{maths: a.jsonl}"]).data.also == {"maths": "a.jsonl"}


@pytest.mark.parametrize("method", ["ablora", "autolora"])
def test_methods_that_look_at_data_do_not_learn_preferences(write: Write, method: str) -> None:
    text = edit("task: causal-lm", "task: preference", edit("text: text", "prompt: text", LANGUAGE_MODEL))
    assert load_recipe(write(text)).task == "preference"
    with pytest.raises(UserError, match=rf"{method} learns ranks from the loss of a batch, which task preference"):
        load_recipe(write(text), ["--method", f"{{name: {method}, budget: {{average_rank: 8}}}}"])


@pytest.mark.parametrize("score", ["gate", "sensitivity"])
def test_scores_that_look_at_no_data_learn_preferences_and_streams(write: Write, score: str) -> None:
    method = f"{{name: ablora, score: {score}, validation: 0.1, budget: {{average_rank: 8}}}}"
    for text in (
        edit("task: causal-lm", "task: preference", edit("text: text", "prompt: text", LANGUAGE_MODEL)),
        edit("text: text", "text: text\n  validation: b.jsonl\n  streaming: true", LANGUAGE_MODEL),
    ):
        assert load_recipe(write(text), ["--method", method]).method.score == score


def test_who_allocates_for_allora_is_told_to_need_the_loss_of_a_batch(write: Write) -> None:
    text = edit("task: causal-lm", "task: preference", edit("text: text", "prompt: text", LANGUAGE_MODEL))
    method = "{name: allora, allocate: ablora, validation: 0.1, budget: {average_rank: 8}}"
    with pytest.raises(UserError) as error:
        load_recipe(write(text), ["--method", method, "--lora.alpha", "8"])
    assert str(error.value) == (
        "--method: ablora learns ranks from the loss of a batch, which task preference does not have: its loss "
        "compares two answers; use adalora or allora"
    )


@pytest.mark.parametrize("method", ["ablora", "autolora"])
def test_nothing_is_cut_off_a_stream_for_a_method(write: Write, method: str) -> None:
    text = edit("text: text", "text: text\n  validation: b.jsonl\n  streaming: true", LANGUAGE_MODEL)
    with pytest.raises(
        UserError, match=r"method.validation is 0\.\d+, but nothing can be cut off data that are streamed"
    ):
        load_recipe(write(text), ["--method", f"{{name: {method}, validation: 0.2, budget: {{average_rank: 8}}}}"])


@pytest.mark.parametrize("train", ["[]", "[a.jsonl, {source: b.jsonl, weight: 1}]", "3"])
def test_sources_that_are_none(write: Write, train: str) -> None:
    with pytest.raises(UserError, match=r"data.train must be a path or hub:NAME, a list of them, or a list of {source"):
        load_recipe(write(LANGUAGE_MODEL), [f"--data.train={train}"])
    assert load_recipe(write(LANGUAGE_MODEL), ["--data.train=[a.jsonl, b.jsonl]"]).data.train == [
        "a.jsonl",
        "b.jsonl",
    ]


@pytest.mark.parametrize(
    ("train", "told"),
    [
        ("[{source: a.jsonl, weight: 0}]", ["data.train[0].weight must be above 0, got 0"]),
        ("[{source: a.jsonl, weight: .inf}]", ["data.train[0].weight must be a finite number, got Infinity"]),
        ("[{source: a.jsonl, weight: 1}, {source: 5, weight: 1}]", ["data.train[1].source must be text, got 5"]),
        ("[{source: a.jsonl}]", ['missing "weight" in "data.train[0]"']),
        (
            "[{source: a.jsonl, wieght: 1}]",
            ['missing "weight" in "data.train[0]"', 'unknown key "wieght" in "data.train[0]".'],
        ),
    ],
)
def test_a_fault_in_a_source_is_told_under_its_own_name(write: Write, train: str, told: list[str]) -> None:
    path = write(LANGUAGE_MODEL)
    assert problems(path, f"--data.train={train}") == [f"--data.train: {one}" for one in told]


WORDS = edit("text: text", "tokens: a\n  tags: b", edit("causal-lm", "token-classification", LANGUAGE_MODEL))
QUESTIONS = edit(
    "text: text", "question: a\n  context: b\n  answers: c", edit("causal-lm", "question-answering", LANGUAGE_MODEL)
)


@pytest.mark.parametrize(
    ("text", "new", "expected"),
    [
        (WORDS, "stride: 128",
         "7: data.stride is 128, but windows have data.max_length tokens, which is 128, and share fewer"),
        (QUESTIONS, "max_length: 64\n  stride: 70",
         "9: data.stride is 70, but windows have data.max_length tokens, which is 64"),
        (WORDS, "text: c\n  spans: d",
         "7: data needs exactly one of tokens with tags, text with spans for task token-classification; got tokens"),
        (WORDS, "spans: c", "7: data.spans needs data.text as well"),
        (WORDS, "scheme: iob", "7: data.scheme must be"),
        (WORDS, "max_length: 2", "7: data.max_length must be at least 3: a word stands between two special tokens"),
        (WORDS, "answer_length: 5",
         "7: data.answer_length is for task question-answering, but the task is token-classification"),
        (QUESTIONS, "tags: b", "8: data.tags is for task token-classification, but the task is question-answering"),
        (QUESTIONS, "answer_length: 0", "8: data.answer_length must be"),
    ],
)  # fmt: skip
def test_words_and_questions(write: Write, text: str, new: str, expected: str) -> None:
    load_recipe(write(text))
    last = "tags: b" if text is WORDS else "answers: c"
    found = problems(write(edit(last, f"{last}\n  {new}", text)))
    assert any(line.startswith(f"recipe.yaml:{expected}") for line in found), found


def test_a_scheme_is_for_tags(write: Write) -> None:
    spans = edit("tokens: a\n  tags: b", "text: a\n  spans: b\n  scheme: bilou", WORDS)
    assert problems(write(spans)) == [
        "recipe.yaml:7: data.scheme is for data.tags; data.spans become BIO tags: take data.scheme out"
    ]
    assert load_recipe(write(edit("scheme: bilou", "scheme: bio", spans))).data.spans == "b"
    assert load_recipe(write(edit("tags: b", "tags: b\n  scheme: bilou", WORDS))).data.scheme == "bilou"


def test_every_column_of_questions_is_needed(write: Write) -> None:
    (line,) = problems(write(edit("  answers: c\n", "", QUESTIONS)))
    assert 'missing "answers" in "data": column with the answers' in line


class TestClassWeights:
    @pytest.mark.parametrize(
        ("written", "found"),
        [
            ("balanced", "balanced"),
            ("{good: 2, bad: 0.5}", {"good": 2, "bad": 0.5}),
            ("{0: 1, 1: 5}", {"0": 1, "1": 5}),
            ("{true: 2}", {"true": 2}),
        ],
    )
    def test_classes_go_by_their_names(self, write: Write, written: str, found: object) -> None:
        path = write(edit("  label: label", f"  label: label\n  class_weights: {written}"))
        assert load_recipe(path).data.class_weights == found

    @pytest.mark.parametrize("written", ["heavy", "{}", "{good: 0}", "{good: x}", "[1, 2]", "3"])
    def test_what_is_no_weights(self, write: Write, written: str) -> None:
        path = write(edit("  label: label", f"  label: label\n  class_weights: {written}"))
        (told,) = problems(path)
        assert "data.class_weights must be balanced, or a mapping from classes to numbers above 0" in told

    @pytest.mark.parametrize("weight", [".inf", "1e400"])
    def test_a_weight_that_is_not_finite(self, write: Write, weight: str) -> None:
        path = write(edit("  label: label", f"  label: label\n  class_weights: {{float: {weight}, good: 1}}"))
        assert problems(path) == [f"{path}:8: data.class_weights.float must be a finite number, got Infinity"]
