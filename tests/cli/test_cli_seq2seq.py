"""An encoder with a decoder, from a recipe to what it writes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5ForConditionalGeneration

from loralloc.cli.progress import Progress
from loralloc.cli.terminal import show_generation
from loralloc.compare.cell import train
from loralloc.recipe.schema import load_recipe

from .command import LANGUAGE, SEQ2SEQ, done, log_rows, ranks, read_json, read_rows, refused
from .deaths import differences, killed_at

Write = Callable[[str], Path]
MODULES = 32
GENERATE = ("--evaluate.generate", "{max_new_tokens: 4, metrics: [rouge, bleu], samples: 6, num_beams: 2}")
KEEP = ("--eval_every", 2, "--save_every", 2, "--keep_best", "true", "--evaluate.metric", "rouge2")
LEARNED = ("--learning_rate", 0.05, "--steps", 40)
HALF = "budget: {average_rank: 2}"
METHODS = {
    "ablora": f"{{name: ablora, validation: validation, rounds: 2, interval: 2, warmup: 4, {HALF}}}",
    "ablora exact": f"{{name: ablora, validation: validation, mode: exact, rounds: 1, warmup: 4, {HALF}}}",
    "autolora": "{name: autolora, check_every: 2}",
    "allora": "{name: allora, mode: hybrid}",
    "lora": "{name: lora}",
    "uniform": f"{{name: uniform, {HALF}}}",
    "random": f"{{name: random, {HALF}}}",
    "depth_linear": f"{{name: depth_linear, {HALF}}}",
    "truncate": f"{{name: truncate, {HALF}}}",
}
FAST = ("ablora", "autolora")
PROMPTED = LANGUAGE.replace("  text: text\n", "  prompt: text\n  completion: completion\n")

pytestmark = pytest.mark.usefixtures("unreported")


def test_answers_come_from_evaluations_and_nothing_is_written_twice(write: Write, here: Path) -> None:
    """Of the untrained model, at step 25, after the last step, and of what is exported: four of each."""
    passes: list[int] = []
    generate = T5ForConditionalGeneration.generate

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(kwargs["input_ids"]))
        return generate(self, *args, **kwargs)

    with patch.object(T5ForConditionalGeneration, "generate", counted):
        said = done("train", write(SEQ2SEQ), *GENERATE, *LEARNED, "--eval_every", 25)
    assert passes == [6, 6, 6, 6]
    metrics = read_json(here / "run" / "metrics.json")
    figures = {"rouge1", "rouge2", "rougeL", "rougeLsum", "bleu"}
    assert figures < metrics["validation"].keys()
    record = metrics["generation"]
    assert record["prompts"] == 6
    assert len(record["samples"]) == 5
    assert record["trained"] == {name: metrics["validation"][name] for name in record["trained"]}
    assert record["trained"]["rouge1"] > record["untrained"]["rouge1"] + 0.3
    within = [row for row in log_rows(here / "run") if "eval_rouge1" in row]
    assert [row["step"] for row in within] == [25, 40, 40]
    assert "perplexity" in said
    assert "vllm" not in said  # it serves decoders


@pytest.mark.parametrize("text", [SEQ2SEQ, PROMPTED], ids=["seq2seq", "causal-lm"])
def test_a_run_of_a_comparison_answers_once_it_is_trained(text: str, write: Write, here: Path) -> None:
    """The untrained model is the same in all runs, and is not looked at in any."""
    recipe = write(text + "evaluate:\n  generate:\n    max_new_tokens: 4\n    samples: 6\n")
    train(recipe, None)
    record = read_json(here / "run" / "metrics.json")["generation"]
    assert record.keys() == {"prompts", "trained", "samples"}
    assert len(record["samples"]) == 5
    assert record["samples"][0].keys() == {"prompt", "reference", "after"}
    show_generation(record)


def test_the_best_state_by_what_is_written(write: Write, here: Path) -> None:
    done("train", write(SEQ2SEQ), *GENERATE, *LEARNED, *KEEP, "--steps", 24)
    found = read_json(here / "run" / "metrics.json")
    values = {row["step"]: row["eval_rouge2"] for row in log_rows(here / "run") if "eval_rouge2" in row}
    assert found["metric"] == "rouge2"
    assert found["validation"]["rouge2"] == max(values.values())
    assert found["reference"]["untrained"] == 0


def test_what_a_trained_run_writes(write: Write, here: Path, encoder_decoder: Path, data: Path) -> None:
    done("train", write(SEQ2SEQ), *GENERATE, *LEARNED)
    found = read_json(here / "run" / "metrics.json")["validation"]
    said = done("evaluate", "run", "--predictions", "out.jsonl")
    assert f"{found['perplexity']:.4f}" in said
    assert f"{found['rouge1']:.4f}" in said
    rows = read_rows(here / "out.jsonl")
    assert len(rows) == 6
    (text, *_) = [row["text"] for row in read_rows(data / "validation.jsonl")]
    assert rows[0]["prompt"] == text
    assert rows[0]["references"][0] in ("yes one", "no two")
    base = AutoModelForSeq2SeqLM.from_pretrained(encoder_decoder)
    model = PeftModel.from_pretrained(base, here / "run" / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder_decoder)
    with torch.no_grad():
        ids = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4, num_beams=2)
    assert rows[0]["prediction"] == tokenizer.decode(ids[0], skip_special_tokens=True)
    said = done("evaluate", "run", "--data", data / "test.jsonl", "--predictions", "more.jsonl")
    assert "rouge1" in said
    assert len(read_rows(here / "more.jsonl")) == 6
    greedy = done("chat", "run", "--prompt", text, "--max-new-tokens", 4).strip()
    assert greedy in ("yes one", "no two")
    assert done("chat", "run", "--prompt", text, "--max-new-tokens", 4, "--base").strip() != greedy
    with patch("sys.stdin", io.StringIO(f"{text}\n{text}\n")):
        assert done("chat", "run", "--max-new-tokens", 4).count(greedy) == 2
    assert "reloaded by stock PEFT" in done("export", "run", "--profile", "merged")


def test_predictions_without_answers_are_losses(write: Write, here: Path) -> None:
    done("train", write(SEQ2SEQ), "--steps", 4)
    done("evaluate", "run", "--predictions", "out.jsonl")
    rows = read_rows(here / "out.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx(read_json(here / "run" / "losses.json")["losses"])
    assert {row["target"] for row in rows} == {"yes one", "no two"}


def test_a_killed_run_goes_on_as_if_it_had_not_been(write: Write, here: Path) -> None:
    recipe = write(SEQ2SEQ)
    words = ("--eval_every", 4, "--save_every", 4, "--evaluate.generate", "{max_new_tokens: 4, temperature: 1.0}")
    done("train", recipe, *words)
    (here / "run").rename(here / "whole")
    with killed_at(11):
        done("train", recipe, *words)
    done("train", recipe, *words, "--resume")
    assert differences(here / "run", here / "whole") == []


@pytest.mark.filterwarnings("ignore:ALLoRA:UserWarning")
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in FAST else pytest.mark.slow) for c in METHODS])
def test_every_method_trains_and_exports(case: str, write: Write, here: Path) -> None:
    alpha = 2 if case.startswith("ablora") else 4
    said = done("train", write(SEQ2SEQ), "--method", METHODS[case], "--lora.alpha", alpha)
    found = ranks(here / "run")
    assert len(found) == MODULES
    if HALF in METHODS[case]:
        assert sum(found.values()) == 2 * MODULES
    assert "reloaded by stock PEFT" in said


def test_an_adapter_on_the_output_layer_is_trained(write: Write, here: Path) -> None:
    words = ("--method", "{name: lora}", "--lora.target_modules", "[q, lm_head]", "--steps", 4)
    done("train", write(SEQ2SEQ), *words)
    assert ranks(here / "run")["lm_head"] > 0


def test_closed_ranks_leave_memory(write: Write, here: Path) -> None:
    done("train", write(SEQ2SEQ), "--output", "masked")
    done("train", write(SEQ2SEQ), "--compact", "true")
    masked, compact = (read_json(here / name / "metrics.json")["validation"] for name in ("masked", "run"))
    assert compact == pytest.approx(masked, rel=1e-4)


def test_rows_of_ranks_say_which_stack(write: Write) -> None:
    said = done("train", write(SEQ2SEQ), "--steps", 4)
    for row in ("encoder.block 0", "encoder.block 1", "decoder.block 0", "decoder.block 1"):
        assert row in said


def test_an_estimate_counts_both_texts(write: Write) -> None:
    recipe = write(SEQ2SEQ)
    longest = 7 + 3  # "the film was" and three words, "yes one", an end each
    assert f"{8 * longest}" in done("estimate", recipe)
    assert "8 of" not in done("train", recipe, "--dry-run")
    assert f"16 of 8 examples, {8 * (16 + 8)} tokens at most" in done("train", recipe, "--dry-run")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ("--evaluate.metric", "rouge2"),
            "rouge2 judges what the model writes; add rouge to evaluate.generate.metrics",
        ),
        (("--evaluate.metric", "rouge3"), 'found rouge3. Did you mean "rouge'),
        (("--data.packing", "bfd"), "data.packing is for task causal-lm, but the task is seq2seq"),
        (("--training.trainer.predict_with_generate", "true"), "is evaluate.generate in a recipe: set that"),
        (
            ("--training.trainer.generation_max_length", "9"),
            "is evaluate.generate.max_new_tokens in a recipe: set that",
        ),
        (("--training.trainer.generation_num_beams", "2"), "is evaluate.generate.num_beams in a recipe: set that"),
        (("--training.trainer.generation_config", "x"), "generation_config is evaluate.generate in a recipe: set that"),
        (("--training.trainer.sortish_sampler", "true"), "the Trainer does not read it; set training.trainer.train_s"),
        (("--data.source", "{sentence}"), 'has no column "sentence" (data.source)'),
        (("--data.target", "[]"), "data.target must be text"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], expected: str, write: Write) -> None:
    assert expected in refused("train", write(SEQ2SEQ), *words)


def test_accumulated_batches_are_one_batch(write: Write, here: Path) -> None:
    words = ("--steps", 3, "--log_every", 1, "--lora.dropout", 0)
    done("train", write(SEQ2SEQ), *words, "--batch_size", 8)
    done("train", write(SEQ2SEQ), *words, "--batch_size", 2, "--accumulation", 4, "--output", "parts")
    whole, parts = ([row["loss"] for row in log_rows(here / name) if "loss" in row] for name in ("run", "parts"))
    assert parts == pytest.approx(whole, rel=0.1)  # a mean of means; without the division it would be four times that


def test_options_of_its_trainer_are_taken(write: Write, here: Path) -> None:
    recipe = write(SEQ2SEQ)
    done("train", recipe, "--training.trainer.label_smoothing_factor", 0.1, "--steps", 4)
    done("train", recipe, "--steps", 4, "--output", "plain")
    smooth, plain = ([row["loss"] for row in log_rows(here / name) if "loss" in row] for name in ("run", "plain"))
    assert smooth != plain
    assert load_recipe(recipe).task == "seq2seq"


def test_target_columns_are_needed(write: Write) -> None:
    said = refused("train", write(SEQ2SEQ.replace("  target: completion\n", "")))
    assert 'missing "target" in "data": column with the text that is to be written' in said


def test_the_bar_starts_anew_where_answers_begin(capsys: pytest.CaptureFixture[str]) -> None:
    """An evaluation that also answers has two passes, of different length."""
    clock, loaders = iter(range(0, 1000, 20)), ([0] * 3, [0] * 2)
    with patch("loralloc.cli.progress.clock", lambda: float(next(clock))):
        bar = Progress(None)
        with bar.evaluating("test data"):
            for loader in loaders:
                for _ in loader:
                    bar.on_prediction_step(*[None] * 3, eval_dataloader=loader)  # type: ignore[arg-type]
    shown = [line.split()[3] for line in capsys.readouterr().out.splitlines() if "evaluating test data" in line]
    assert shown == ["1/3", "2/3", "3/3", "1/2", "2/2"]
