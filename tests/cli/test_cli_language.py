"""`loralloc train` on language models: chats, packed and streamed data, preferences; each resumed, each looked at."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from loralloc.plan import ModuleRank, RankPlan

from .command import CHAT, LANGUAGE, RECIPE, done, loralloc, ranks, read_json, refused
from .deaths import differences, killed_at

Write = Callable[[str], Path]

TEXT = "  text: text\n"
WORDS = ("chosen", "rejected")
TURNS = [
    [{"role": "user", "content": "the film"}, {"role": "assistant", "content": reply}] * 2 for reply in ("fine", "dull")
]
PREFERENCE = LANGUAGE.replace("causal-lm", "preference").replace(TEXT, "")
KINDS: Mapping[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "chat": ("", lambda n: {"messages": TURNS[n % 2]}),
    "packed": ("  packing: bfd\n", lambda n: {"messages": TURNS[n % 2]}),
    "streamed": ("  streaming: true\n", lambda n: {"prompt": "the film was ", "completion": "yes" if n % 3 else "no"}),
    "preference": ("", lambda n: {"prompt": "the film was ", "chosen": ("fine", "warm")[n % 2], "rejected": "dull"}),
}


def write_data(kind: str, write: Write, here: Path) -> Path:
    """A recipe of this kind of data, 48 rows to train on and 8 to evaluate on."""
    keys, row = KINDS[kind]
    for name, count in {"train": 48, "held-out": 8}.items():
        lines = [json.dumps(row(n)) + "\n" for n in range(count)]
        (here / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    text = PREFERENCE if kind == "preference" else LANGUAGE.replace(TEXT, keys)
    text = text.replace("max_length: 16", "max_length: 32")
    text = text.replace("{data}/train.jsonl", "train.jsonl").replace("{data}/validation.jsonl", "held-out.jsonl")
    return write(text) if kind != "preference" else write_preference(text, write)


def write_preference(text: str, write: Write) -> Path:
    """The recipe writer knows the small language model by the other task's name."""
    path = write(text.replace("task: preference", "task: causal-lm"))
    path.write_text(path.read_text(encoding="utf-8").replace("task: causal-lm", "task: preference"), encoding="utf-8")
    return path


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_and_resumed_is_the_same_run(kind: str, write: Write, here: Path) -> None:
    recipe = write_data(kind, write, here)
    words = ("--save_every", 4, "--log_every", 3)
    said = done("train", recipe, *words)
    assert sum(ranks(here / "run").values()) == 2 * 14
    metrics = read_json(here / "run" / "metrics.json")
    name = metrics["metric"]
    assert metrics["validation"][name] < metrics["reference"]["untrained"]
    assert "reloaded by stock PEFT" in said
    (here / "run").rename(here / "whole")
    with killed_at(10):  # the row of the log that the checkpoint cuts is of steps 7 to 9
        done("train", recipe, *words)
    done("train", recipe, *words, "--resume")
    assert differences(here / "run", here / "whole") == []
    evaluated = done("evaluate", here / "run")
    assert f"{metrics['validation'][name]:.4f}" in evaluated


OUTPUT_LAYER = (
    "lm_head has an adapter, and TRL, which trains task {task}, computes the logits from the weight of lm_head without "
    "it; leave it out, or train it in full with lora.modules_to_save"
)


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_an_adapter_on_the_output_layer_is_refused(kind: str, write: Write, here: Path) -> None:
    recipe, task = write_data(kind, write, here), {"chat": "causal-lm"}.get(kind, kind)
    told = refused("train", recipe, "--lora.target_modules", "[q_proj, lm_head]", "--dry-run")
    assert told == f"lora.target_modules: {OUTPUT_LAYER.format(task=task)}"
    assert refused("train", recipe, "--lora.target_modules", "[q_proj, lm_head]") == told
    options = ("--training.trainer.optim", "sgd")  # which are not to blame
    assert refused("train", recipe, "--lora.target_modules", ".*(q_proj|head)", *options, "--dry-run") == told
    done("train", recipe, "--lora.target_modules", "[q_proj]", "--lora.modules_to_save", "[lm_head]", "--dry-run")
    done("train", recipe, "--lora.target_modules", "all-linear", "--dry-run")


def test_a_plan_with_the_output_layer_is_refused(write: Write, here: Path) -> None:
    modules = {"lm_head": ModuleRank(2, 2, 16, 21, 1.0)}
    RankPlan("own", modules, provenance={}).save(here / "plan.json")
    words = ("--method", "{name: lora}", "--plan", "plan.json", "--dry-run")
    told = refused("train", write_data("chat", write, here), *words)
    assert told == f"plan: {OUTPUT_LAYER.format(task='causal-lm')}"


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("score", ["gate", "sensitivity"])
def test_scores_that_look_at_no_data_learn_preferences(score: str, write: Write, here: Path) -> None:
    recipe = write_data("preference", write, here)
    method = f"{{name: ablora, score: {score}, rounds: 2, budget: {{average_rank: 2}}}}"
    done("train", recipe, "--steps", 8, "--method", method)
    assert sum(ranks(here / "run").values()) == 2 * 14


@pytest.mark.usefixtures("unreported")
@pytest.mark.parametrize("method", ["ablora", "autolora"])
def test_methods_that_look_at_data_look_at_examples_one_by_one(method: str, write: Write, here: Path) -> None:
    recipe = write_data("packed", write, here)
    section = f"{{name: {method}, budget: {{average_rank: 2}}}}"
    done("train", recipe, "--method", section, "--lora.alpha", 4)
    assert sum(ranks(here / "run").values()) == 2 * 14


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("chat", "user : the film </s> assistant : fine </s>"),
        ("preference", "user : the film was </s> assistant : fine </s> dull </s>"),
        ("streamed", "the film was"),
    ],
)
def test_a_dry_run_shows_examples(kind: str, expected: str, write: Write, here: Path) -> None:
    said = done("train", write_data(kind, write, here), "--dry-run")
    assert "example 1 as the model sees it; green is learned" in said
    assert expected in said.replace("\n", "")
    assert "example 2" in said
    assert "example 3" not in said


@pytest.mark.usefixtures("unreported")
def test_several_sources_are_mixed_and_more_data_are_evaluated(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    sources = "[{source: train.jsonl, weight: 3}, {source: held-out.jsonl, weight: 1}]"
    words = ("--data.streaming", "false", "--data.train", sources, "--data.also", "{again: held-out.jsonl}")
    said = done("train", recipe, *words, "--steps", 4)
    metrics = read_json(here / "run" / "metrics.json")
    assert metrics["also"]["again"] == metrics["validation"]
    assert "again" in done("evaluate", here / "run")
    assert "again" in said
    assert "28 train" in said  # until the smaller one is used up
    losses = read_json(here / "run" / "losses.json")
    assert (losses["split"], len(losses["losses"])) == ("validation", 8)


def test_more_data_are_read_before_training(write: Write, here: Path) -> None:
    recipe = write_data("chat", write, here)
    (here / "other.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    said = refused("train", recipe, "--data.also", "{other: other.jsonl}")
    assert "other.jsonl: what to learn is not known" in said
    assert not (here / "run").exists()
    assert "none.jsonl: no such file" in refused("train", recipe, "--data.also", "{other: none.jsonl}")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": None}]}, "turn is empty"),
        ({"messages": [{"role": "human", "content": "the"}]}, 'unknown role "human"'),
        ({"messages": TURNS[0], "tools": [{"name": "f"}]}, "the chat template of this model ignores tools"),
    ],
)
def test_what_cannot_be_learned_is_refused_with_its_row(
    row: dict[str, Any], expected: str, write: Write, here: Path
) -> None:
    recipe = write_data("chat", write, here)
    with (here / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    said = refused("train", recipe)
    assert "train.jsonl:49: " in said
    assert expected in said


def test_a_damaged_row_of_a_stream(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    with (here / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": \n')
    assert "train.jsonl:49: not valid JSON (Expecting value)" in refused("train", recipe)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("demo:docstrings", "cannot be streamed; take data.streaming out"), ("a.txt", "cannot be streamed; .jsonl, .csv")],
)
def test_sources_that_cannot_be_streamed(name: str, expected: str, write: Write, here: Path) -> None:
    (here / "a.txt").write_text("the film\n", encoding="utf-8")
    assert expected in refused("train", write_data("streamed", write, here), "--data.train", name)


def rows(count: Iterable[int]) -> str:
    return "".join(json.dumps({"chosen": "fine", "rejected": "fine" if n % 2 else "dull"}) + "\n" for n in count)


def test_answers_that_are_the_same_are_left_out(write: Write, here: Path) -> None:
    recipe = write_data("preference", write, here)
    (here / "train.jsonl").write_text(rows(range(8)), encoding="utf-8")
    (here / "held-out.jsonl").write_text(rows(range(8)), encoding="utf-8")
    said = refused("train", recipe)
    assert "data.prompt: answers become turns of a chat, which begins with a prompt; name its column, or set" in said
    assert "4 train, 4 validation" in done("train", recipe, "--data.chat", "false", "--dry-run")
    (here / "train.jsonl").write_text(rows([1, 3, 5]), encoding="utf-8")
    said = refused("train", recipe, "--data.chat", "false")
    assert "train.jsonl: in every row both answers are the same: there is nothing to prefer" in said


def test_keys_of_another_task(write: Write) -> None:
    said = refused("train", write(RECIPE), "--data.streaming", "true")
    assert "data.streaming is for task causal-lm, but the task is sequence-classification" in said


def preferences(write: Write, here: Path, **columns: Any) -> Path:
    recipe = write_data("preference", write, here)
    for name in ("train", "held-out"):
        (here / f"{name}.jsonl").write_text((json.dumps(columns) + "\n") * 8, encoding="utf-8")
    return recipe


ASKED = {"role": "user", "content": "the film was"}


def test_a_preference_whose_system_prompt_the_template_leaves_out(write: Write, here: Path, decoder: Path) -> None:
    asked = [{"role": "system", "content": "fine"}, ASKED]
    recipe = preferences(write, here, prompt=asked, chosen="fine", rejected="dull")
    shutil.copytree(decoder, here / "model")
    (here / "model" / "chat_template.jinja").write_text(
        CHAT.replace("for m in messages", "for m in messages if m['role'] != 'system'"), encoding="utf-8"
    )
    assert refused("train", recipe, "--model.name", "model", "--dry-run") == (
        "train.jsonl: the chat template of this model leaves out system prompts, so the model would never see them; "
        "put what they say into the first question, or use a model that has them"
    )


def test_a_preference_with_a_turn_of_weight_0(write: Write, here: Path) -> None:
    chosen = [{"role": "assistant", "content": "fine", "weight": 0}]
    said = refused("train", preferences(write, here, prompt=[ASKED], chosen=chosen, rejected="dull"), "--dry-run")
    assert said == (
        'train.jsonl:1: column "chosen" (data.chosen): a preference is learned whole; take the weight 0 out of its '
        "messages"
    )


def test_answers_that_are_whole_chats_lose_the_prompt(write: Write, here: Path) -> None:
    words = {"chosen": "fine", "rejected": "dull"}
    chats = {key: [ASKED, {"role": "assistant", "content": word}] for key, word in words.items()}
    for columns in ({"prompt": "the film was", **chats}, chats):
        said = done("train", preferences(write, here, **columns), "--dry-run")
        assert said.count("the film was") == 2  # once in each of two examples
        assert "fine </s> dull </s>" in said
    different = {"chosen": chats["chosen"], "rejected": [{**ASKED, "content": "no"}, chats["rejected"][1]]}
    said = refused("train", preferences(write, here, **different))
    assert "train.jsonl:1: both answers must begin with the prompt, or with the assistant's turn after it" in said


def test_prompts_that_take_all_the_length(write: Write, here: Path) -> None:
    recipe = write_data("preference", write, here)
    said = refused("train", recipe, "--data.max_length", 4)
    assert "in all 48 rows the prompt alone takes data.max_length = 4 tokens; raise it" in said


@pytest.mark.usefixtures("unreported")
def test_blocks_in_which_nothing_is_learned_are_left_out(write: Write, here: Path) -> None:
    recipe = write_data("chat", write, here)
    done("train", recipe, "--data.packing", "wrapped", "--data.max_length", 4, "--steps", 4)
    assert all(read_json(here / "run" / "losses.json")["losses"])
    said = refused("train", recipe, "--data.packing", "wrapped", "--evaluate.generate", "{samples: 2}", "--replace")
    assert (
        "evaluate.generate answers prompts, and data.packing: wrapped cuts them anywhere; set it to bfd or none" in said
    )


def test_a_stream_without_rows_or_without_anything_to_learn(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    long = {"prompt": "the film was " * 20, "completion": "yes"}
    (here / "train.jsonl").write_text(json.dumps(long) + "\n", encoding="utf-8")
    assert "in none of the streamed rows is anything to learn" in refused("train", recipe)
    (here / "train.jsonl").write_text("", encoding="utf-8")
    assert "train.jsonl is empty: it has no rows" in refused("train", recipe)


@pytest.mark.parametrize("packed", [False, True])
def test_a_record_of_a_streamed_table_with_another_number_of_values(packed: bool, write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    text, name = "prompt,completion\nthe ,yes\nthe ,yes,no\n", "table.csv.gz" if packed else "table.csv"
    (here / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    said = refused("train", recipe, "--data.train", name)
    assert f'{name}:3: 3 values, but the header names 2 columns: ["the ", "yes", "no"]' in said


def test_tools_are_not_learned_by_preference(write: Write, here: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    recipe = preferences(write, here, prompt=[ASKED], chosen=[call], rejected=[{**call, "content": "fine"}])
    said = refused("train", recipe)
    assert 'train.jsonl:1: column "chosen" (data.chosen): calls of tools cannot be learned by preference here' in said


@pytest.mark.parametrize("kind", ["chat", "preference"])  # one refuses when it is built, one at its first loss
def test_what_only_the_trainer_knows_of_its_options(kind: str, write: Write, here: Path) -> None:
    recipe = write_data(kind, write, here)
    said = refused("train", recipe, "--training.trainer.loss_type", "bogus")
    assert "training.trainer" in said
    assert "bogus" in said


def test_tools_without_a_chat(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    assert "data.tools is for chats, and these rows are texts; take it out" in refused(
        "train", recipe, "--data.tools", "x"
    )


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_keys_of_texts_where_there_are_chats(kind: str, write: Write, here: Path) -> None:
    recipe = write_data(kind, write, here)
    if kind == "preference":
        row = {key: [{"role": "user", "content": "the"}, {"role": "assistant", "content": key}] for key in WORDS}
        for name in ("train", "held-out"):
            (here / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 8, encoding="utf-8")
    assert "data.chat: false is for texts, and " in refused("train", recipe, "--data.chat", "false")
    done("train", recipe, "--data.chat", "true", "--dry-run")


@pytest.mark.parametrize("words", [("--data.learn", "last"), ("--data.chat", "true")])
def test_keys_of_chats_where_there_are_texts(words: tuple[str, str], write: Write, here: Path) -> None:
    said = refused("train", write(LANGUAGE), *words)
    assert f"data.{words[0].rpartition('.')[2]}: {words[1]} is for chats, and the rows of " in said


def test_streamed_values_are_what_they_are_when_read_at_once(write: Write, here: Path) -> None:
    recipe = write_data("streamed", write, here)
    for name in ("train", "held-out"):
        (here / f"{name}.csv").write_text("prompt,completion\nthe film was ,NA\nthe film ,7\n" * 8, encoding="utf-8")
    files = ("--data.train", "train.csv", "--data.validation", "held-out.csv", "--data.chat", "false")
    done("train", recipe, *files, "--steps", 4, "--dry-run")
    (here / "train.jsonl").write_text('{"prompt": "the ", "completion": "2020-01-01"}\n' * 8, encoding="utf-8")
    done("train", recipe, "--steps", 4, "--dry-run")


def test_predictions_need_a_folder(run: Path) -> None:
    said = refused("evaluate", run, "--predictions", "nowhere/x.jsonl")
    assert "--predictions: there is no folder nowhere; make it first" in said


def test_predictions_replace_nothing(run: Path, data: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the data that are evaluated; and nothing is loaded before that is clear."""
    monkeypatch.setattr("loralloc.recipe.from_recipe.load_with_data", lambda *args: pytest.fail("loaded"))
    kept = Path(shutil.copy(data / "test.jsonl", here / "kept.jsonl"))
    for source in (kept, data / "test.jsonl"):
        said = refused("evaluate", run, "--data", source, "--predictions", "kept.jsonl")
        assert said == ("--predictions: kept.jsonl exists; nothing was overwritten: choose another file, or remove it")
    assert kept.read_bytes() == (data / "test.jsonl").read_bytes()
    assert refused("evaluate", run, "--data", kept, "--predictions", here) == (
        f"--predictions: {here} is a folder; name a file in it"
    )


def test_metrics_are_shown_even_if_predictions_cannot_be_written(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralloc.recipe.predictions.write_atomically", Mock(side_effect=OSError("no space")))
    result = loralloc("evaluate", run, "--predictions", "out.jsonl")
    assert (result.code, result.err) == (2, "error: no space\n")
    assert f"{read_json(run / 'metrics.json')['test']['accuracy']:.4f}" in result.out
