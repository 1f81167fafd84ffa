"""What a model writes: answers before and after training, predictions in a file, a chat. And what a run will take."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from transformers import AutoModelForCausalLM

from loralloc.cli import chat
from loralloc.errors import UserError
from loralloc.recipe import from_recipe, stages

from .command import LANGUAGE, RECIPE, build_tokenizer, done, read_json, read_rows, refused
from .test_cli_language import write_data

Write = Callable[[str], Path]
GENERATE = ("--evaluate.generate", "{max_new_tokens: 4, metrics: [exact_match, chrf], samples: 3}")


@pytest.mark.usefixtures("unreported")
def test_answers_before_and_after(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    words = ("--data.streaming", "false", "--steps", 12, "--training.learning_rate", 0.05)
    plain = done("train", recipe, *words, "--output", "plain")
    said = done("train", recipe, *words, *GENERATE)
    record = read_json(here / "run" / "metrics.json")["generation"]
    assert record["prompts"] == 1  # all rows have the same
    assert record["untrained"]["exact_match"] == 0
    assert record["trained"]["exact_match"] == 1
    (sample,) = record["samples"]
    assert sample["prompt"] == "user : the film was </s> assistant :".replace("</s> ", "")
    assert sample["after"] in ("yes", "no")
    assert sample["before"] != sample["after"]
    for word in ("reference", "before", "after", "exact_match"):
        assert word in said
    assert "generation" not in read_json(here / "plain" / "metrics.json")
    assert "reference" not in plain
    for name in ("adapter/adapter_model.safetensors", "losses.json"):  # training has not noticed
        assert (here / "run" / name).read_bytes() == (here / "plain" / name).read_bytes()
    file = here / "predictions.jsonl"
    said = done("evaluate", here / "run", "--predictions", file)
    assert "generated" in said
    (row,) = read_rows(file)
    assert (row["prompt"], row["prediction"]) == (sample["prompt"], sample["after"])


def test_predictions_of_a_classifier(run: Path, here: Path) -> None:
    done("evaluate", run, "--predictions", here / "predictions.jsonl")
    rows = read_rows(here / "predictions.jsonl")
    assert len(rows) == 15
    accuracy = sum(row["label"] == row["prediction"] for row in rows) / 15
    assert accuracy == pytest.approx(read_json(run / "metrics.json")["test"]["accuracy"])
    assert all(sum(row["scores"].values()) == pytest.approx(1, abs=1e-5) for row in rows)
    assert all(max(row["scores"], key=row["scores"].__getitem__) == row["prediction"] for row in rows)


@pytest.mark.usefixtures("unreported")
def test_predictions_of_a_language_model_and_of_preferences(write: Write, here: Path) -> None:
    done("train", write_data("chat", write, here), "--steps", 4)
    done("evaluate", "run", "--predictions", "predictions.jsonl")
    rows = read_rows(here / "predictions.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(read_json(here / "run" / "losses.json")["losses"])
    done("train", write_data("preference", write, here), "--steps", 4, "--replace")
    with patch.object(from_recipe, "load_adapted", side_effect=AssertionError("loaded")):
        said = refused("evaluate", "run", "--predictions", "more.jsonl")
    assert said == "--predictions: this task compares answers and predicts none; evaluate without it"


@pytest.mark.parametrize("text", [RECIPE, LANGUAGE])
def test_generation_that_cannot_be(text: str, write: Write) -> None:
    said = refused("train", write(text), *GENERATE)
    if text == RECIPE:
        expected = "evaluate.generate is for task causal-lm or seq2seq, but the task is sequence-classification"
        assert expected in said
    else:
        assert "evaluate.generate needs prompts, and in plain text everything is learned" in said


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{after: x}", "evaluate.generate.after is for exact_match: add it to evaluate.generate.metrics"),
        ("{top_p: 0.5}", "evaluate.generate.top_p is for sampling, and temperature 0 does not sample: set"),
        ("{length_penalty: 2.0}", "evaluate.generate.length_penalty compares beams, and there is one: set"),
        ("{min_new_tokens: 129}", "evaluate.generate.min_new_tokens is 129, above max_new_tokens, which is 128; lower"),
    ],
)
def test_settings_of_answers_that_would_mean_nothing(settings: str, expected: str, write: Write, here: Path) -> None:
    recipe = write_data("chat", write, here)
    assert expected in refused("train", recipe, "--evaluate.generate", settings)
    right = (
        "{after: x, metrics: [exact_match], top_p: 0.5, temperature: 1.0, num_beams: 2, length_penalty: 2.0, "
        "min_new_tokens: 128}"
    )
    done("train", recipe, "--evaluate.generate", right, "--dry-run")


@pytest.mark.usefixtures("unreported")
def test_a_chat(write: Write, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_data("streamed", write, here)
    done("train", recipe, "--data.streaming", "false", "--steps", 12, "--training.learning_rate", 0.05)
    answer = done("chat", "run", "--prompt", "the film was", "--max-new-tokens", 4).strip()
    assert answer in ("yes", "no")
    assert done("chat", "run", "--prompt", "the film was", "--max-new-tokens", 4, "--base").strip() != answer
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was\n/reset\nthe film was\n/exit\nnever\n"))
    said = done("chat", "run", "--max-new-tokens", 4)
    assert said.count(answer) == 2
    assert "/reset forgets what was said" in said
    monkeypatch.setattr("sys.stdin", io.StringIO("the film was\n"))  # ends without a word
    assert answer in done("chat", "run", "--max-new-tokens", 4)


def test_a_line_that_is_no_unicode_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = io.BytesIO(b"the film\nthe \xff film\ncaf\xc3\xa9\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    asked = []
    chat.converse(lambda messages: asked.append(messages[-1]["content"]) or "yes", remembers=True)
    assert asked == ["the film", "café"]
    assert capsys.readouterr().err == (
        "this line is not answered: it must be Unicode text; in a shell of another encoding, set LC_ALL=C.UTF-8\n"
    )


@pytest.mark.usefixtures("unreported")
def test_texts_are_continued_and_chats_answered_whichever_columns_were_recognised(write: Write, here: Path) -> None:
    recipe = write_data("chat", write, here)
    chats = (here / "train.jsonl").read_text(encoding="utf-8")
    texts = '{"text": "the film was fine and warm"}\n' * 48
    for name in ("train", "held-out"):
        (here / f"{name}.jsonl").write_text(texts, encoding="utf-8")
    done("train", recipe, "--steps", 3)

    def templated() -> bool:
        with patch("loralloc.cli.chat.write", return_value="") as written:
            done("chat", "run", "--prompt", "the film was")
        return written.call_args.kwargs["templated"]

    assert not templated()
    assert refused("chat", "run", "--prompt", os.fsdecode(b"the \xff film")) == (
        "--prompt: must be Unicode text; in a shell of another encoding, set LC_ALL=C.UTF-8"
    )
    (here / "train.jsonl").write_text(chats, encoding="utf-8")
    assert templated()
    (here / "train.jsonl").unlink()
    assert templated()


def test_a_prompt_without_tokens_begins_with_the_first_token(decoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(decoder)
    starts = build_tokenizer("$A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    nothing, settings = [{"role": "user", "content": ""}], {"max_new_tokens": 3, "do_sample": False}
    answer = chat.write(model, starts, nothing, settings, templated=False)
    first = [{"role": "user", "content": "<s>"}]
    assert answer == chat.write(model, starts, first, settings, templated=False)
    assert answer in capsys.readouterr().out
    without = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")
    with pytest.raises(UserError) as error:
        chat.write(model, without, nothing, settings, templated=False)
    expected = "the prompt has no tokens, and the tokenizer none that begins a text; write a word at least"
    assert str(error.value) == expected


def test_a_classifier_does_not_chat(run: Path) -> None:
    said = refused("chat", run)
    assert "is a run of task sequence-classification, which generates no text; use loralloc evaluate" in said
    assert "nowhere" in refused("chat", "nowhere")


@pytest.mark.parametrize("kind", ["chat", "streamed", "preference"])
def test_an_estimate(kind: str, write: Write, here: Path) -> None:
    said = done("estimate", write_data(kind, write, here))
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "budget 28 ranks" in lines["adapter"]
    assert ("streamed" if kind == "streamed" else "48 examples, ") in lines["data"]
    assert "16, with " in lines["steps"]
    for part in ("weights", "adapter", "gradients", "optimizer", "at most"):
        assert part in lines["memory"]
    assert "s a step, at most" in lines["time"]
    assert [path.name for path in here.iterdir() if path.is_dir()] == []


def test_an_estimate_does_nothing_beside_steps(write: Write, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr("loralloc.training.trainer.RunTrainer.evaluate", never)
    monkeypatch.setattr("loralloc.training.trainer.write_manifest", never)
    often = ("--eval_every", 1, "--save_every", 1, "--training.trainer", "{push_to_hub: true, report_to: tensorboard}")
    assert "s a step" in done("estimate", write_data("chat", write, here), *often)


def test_what_would_be_refused_is_not_estimated(recipe: Path) -> None:
    assert "unknown key" in refused("estimate", recipe, "--training.stepz", 3)
    assert "no such file" in refused("estimate", recipe, "--data.train", "none.jsonl")


def test_a_search_is_estimated(recipe: Path) -> None:
    assert "steps" in done("estimate", recipe, "--method", "{name: autolora}")


def test_a_line_before_training(recipe: Path) -> None:
    said = done("train", recipe, "--dry-run")
    assert "steps     16 of 8 examples, 128 tokens at most" in said


def test_answers_of_one_process_are_refused_where_the_base_is_sharded(
    write: Write, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "under_fsdp2", lambda trainer: True)
    recipe = write_data("streamed", write, here)
    said = refused("train", recipe, "--data.streaming", "false", "--steps", 2, *GENERATE)
    assert (
        "evaluate.generate: one process writes the answers, and of a base model that FSDP2 shards it has a part; "
        "remove it, and let loralloc chat RUN answer"
    ) in said
