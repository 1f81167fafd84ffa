"""Promises: prompts are what training saw, answers depend on the prompt alone, and metrics are their libraries'."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_models import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc.errors import UserError
from loralloc.methods.validation import IGNORED
from loralloc.recipe.sections import GenerateConfig
from loralloc.tasks.generation import (
    Prompt,
    check_metrics,
    ends,
    exact_match,
    final_answer,
    generate,
    read_prompts,
    room,
    score,
)

TOKENIZER = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def example(prompt: str, answer: str, then: str = "") -> dict[str, list[int]]:
    parts = [TOKENIZER(text)["input_ids"] for text in (prompt, answer, then)]
    labels = [IGNORED] * len(parts[0]) + parts[1] + [IGNORED] * len(parts[2])
    return {"input_ids": [i for part in parts for i in part], "labels": labels}


def settings(**given: Any) -> Any:
    section = GenerateConfig(max_new_tokens=6)
    return section.model_copy(update=given)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # so that what comes next depends on what came before
    )
    return LlamaForCausalLM(config).eval()


def test_prompts_and_references() -> None:
    examples = [example("a b", "yes </s>"), example("c", "no", "a"), example("a b", "no </s>")]
    assert read_prompts(examples, TOKENIZER, None, 64) == [
        Prompt(tuple(TOKENIZER("a b")["input_ids"]), "a b", ("yes", "no")),
        Prompt(tuple(TOKENIZER("c")["input_ids"]), "c", ("no",)),
    ]
    assert [prompt.text for prompt in read_prompts(examples, TOKENIZER, 1, 64)] == ["a b"]


def test_answers_that_may_have_lost_their_end_are_no_references() -> None:
    examples = [example("a b", "yes no yes"), example("c", "no")]
    assert [prompt.text for prompt in read_prompts(examples, TOKENIZER, None, 5)] == ["c"]
    with pytest.raises(UserError, match=r"every held-out answer is cut by data.max_length, which is 5; raise it"):
        read_prompts(examples[:1], TOKENIZER, None, 5)


def test_an_answer_ends_where_the_model_does(model: LlamaForCausalLM) -> None:
    assert room(model, 2000) == 48
    with pytest.raises(UserError, match=r"the model has 2048 positions, and a prompt of 2048 tokens leaves none"):
        room(model, 2048)


def test_plain_texts_have_no_prompts() -> None:
    with pytest.raises(UserError, match=r"evaluate.generate needs prompts, and in plain text everything is learned"):
        read_prompts([example("", "a b")], TOKENIZER, None, 64)


def test_an_answer_depends_on_its_prompt_alone(model: LlamaForCausalLM) -> None:
    texts = ("a", "a b c d e", "good film", "c d", "the film is bad")
    prompts = read_prompts([example(text, "yes") for text in texts], TOKENIZER, None, 64)
    alone = generate(model, TOKENIZER, prompts, settings(), batch_size=1)
    assert len(set(alone)) > 1
    for size in (2, 5):
        assert generate(model, TOKENIZER, prompts, settings(), batch_size=size) == alone
    naive = model.generate(torch.tensor([prompts[1].ids]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert TOKENIZER.decode(naive[0, 5:], skip_special_tokens=True).strip() == alone[1]


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 3, "length_penalty": 3.0},
        {"num_beams": 3, "length_penalty": -3.0},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 24},
    ],
    ids=str,
)
def test_beams_and_lengths_are_those_of_generate(given: dict[str, Any], model: LlamaForCausalLM) -> None:
    prompts = read_prompts([example(text, "yes") for text in ("a b", "c d e", "film")], TOKENIZER, None, 64)
    plain = generate(model, TOKENIZER, prompts, settings(max_new_tokens=24), batch_size=2)
    found = generate(model, TOKENIZER, prompts, settings(max_new_tokens=24, **given), batch_size=2)
    assert found != plain
    options: dict[str, Any] = {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": ends(model, TOKENIZER)}
    for prompt, answer in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.ids])
        naive = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **given)
        assert TOKENIZER.decode(naive[0, len(prompt.ids) :], skip_special_tokens=True).strip() == answer


def test_line_breaks_count_for_rouge_lsum_alone() -> None:
    pytest.importorskip("rouge_score")
    prompts = [Prompt((1,), "", ("a b c\nd e f",))]
    found = score(["d e f\na b c"], prompts, ["rouge"], None)
    assert (found["rougeL"], found["rougeLsum"]) == (0.5, 1.0)


def test_chance_has_a_seed(model: LlamaForCausalLM) -> None:
    prompts = read_prompts([example("a", "yes"), example("b", "yes")], TOKENIZER, None, 64)
    warm = settings(temperature=2.0, max_new_tokens=20)
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        answers.append(generate(model, TOKENIZER, prompts, warm, batch_size=2))
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("text", "after", "expected"),
    [
        ("#### 1,200", "####", "1200"),
        ("#### 3 #### 4 ", "####", "4"),
        ("4", "####", None),
        (" a, b 1,5 ", None, "a, b 15"),
    ],
)
def test_final_answers(text: str, after: str | None, expected: str | None) -> None:
    assert final_answer(text, after) == expected


def test_exact_match_takes_any_reference() -> None:
    assert exact_match(["a", "b", "c"], [["x", "a"], ["c"], ["c "]], None) == {"exact_match": 2 / 3}


def test_metrics_are_their_libraries() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    answers = ["the cat sat on the mat today", "a dog runs in the big park"]
    references = [("the cat sat on the mat", "a cat is on the mat"), ("the dog runs in the park",)]
    prompts = [Prompt((1,), "", one) for one in references]
    found = score(answers, prompts, ["bleu", "chrf", "rouge", "exact_match"], None)
    streams: Any = [["the cat sat on the mat", "the dog runs in the park"], ["a cat is on the mat", None]]
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, streams).score
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, streams).score
    # six words in both: precision 6/7, recall 6/6; five of seven and five of six
    assert found["rouge1"] == pytest.approx((12 / 13 + 10 / 13) / 2)
    assert found["exact_match"] == 0


def test_a_metric_without_its_library() -> None:
    check_metrics(["exact_match", "bleu", "rouge"])
    with (
        patch("importlib.util.find_spec", return_value=None),
        pytest.raises(
            UserError, match=r'evaluate.generate.metrics: rouge comes with an extra: pip install "loralloc\[gen'
        ),
    ):
        check_metrics(["exact_match", "rouge"])
