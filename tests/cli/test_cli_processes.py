"""`torchrun loralloc train`: two processes train one adapter, that of one process with the same global batch.

The comparison is exact up to rounding because accelerate deals whole batches out in turn: of every 16 examples in the
order of one process, the first process gets the first 8 and the second one the others. It needs a number of training
examples (of a language model: blocks) that 16 divides, and no dropout, which each process draws for itself. The
validation data are whole batches too: the Trainer fills the last ones up, which counts in the mean of the loss, though
not in the metrics. Every process learns AutoLoRA's ranks on the same held-out batch, here on all 16 examples.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import BertConfig

from loralloc.training.manifest import damage

from .command import LANGUAGE, PLAIN, RECIPE, done, examples, log_rows, ranks, read_json, refused, write_rows

pytestmark = pytest.mark.slow

STEPS = 8
HALF = "budget: {average_rank: 2}"
METHODS = {
    "adalora": f"{{name: adalora, {HALF}}}",
    "ablora": f"{{name: ablora, validation: validation, {HALF}, warmup: 2, interval: 2, rounds: 2}}",
    "autolora": "{name: autolora, validation: 0.1, search: 6}",
    "allora": "{name: allora, eta: 1.41, mode: hybrid}",
    "allora with adalora": f"{{name: allora, mode: post, allocate: adalora, {HALF}}}",
    "uniform": f"{{name: uniform, {HALF}}}",
    "random": f"{{name: random, rank_seed: 3, {HALF}}}",
    "depth_linear": f"{{name: depth_linear, direction: decreasing, {HALF}}}",
    "truncate": f"{{name: truncate, {HALF}}}",
    "lora": "{name: lora}",
}
SAVING = ["--save_every", 2, "--log_every", 1]
BATCH = 16
EPOCHS = ["train", "plain.yaml", "--steps", "null", "--epochs", 1.5]


def _words(name: str, recipe: str, batch: int) -> list[Any]:
    """The command that trains with a method, into a folder of its name."""
    alpha = ["--lora.alpha", 4] if "allora" in name else []
    return [
        *("train", recipe, "--method", METHODS[name], *alpha, "--batch_size", batch, "--steps", STEPS),
        *("--log_every", 1, "--output", name),
    ]


def _commands() -> dict[str, list[Any]]:
    half = BATCH // 2
    plain = ["train", "plain.yaml", "--batch_size", half, "--steps", STEPS]
    adalora = ["train", "recipe.yaml", "--batch_size", half, "--steps", STEPS]
    return {
        **{name: _words(name, "recipe.yaml", half) for name in METHODS},
        "language": ["train", "language.yaml", "--batch_size", half, "--steps", STEPS, "--output", "language"],
        "epochs": [*EPOCHS, "--batch_size", 4, "--accumulation", 3, "--output", "epochs"],
        "whole": [*adalora, *SAVING, "--output", "whole"],
        "killed": [*adalora, *SAVING, "--output", "killed"],
        "resumed": [*adalora, *SAVING, "--output", "killed", "--resume"],
        "there already": [*adalora, "--output", "lora"],
        "folder": [*plain, "--output", "folder"],
        "data": [*plain, "--output", "data"],
        "apart adalora": [*adalora, "--output", "apart"],
        "apart lora": [*plain, "--output", "apart too"],
        "killed for one": [*plain, *SAVING, "--output", "two"],
        "option": [*plain, "--optim", "sgdd", "--output", "option"],
        "key": [*plain, "--optmi", "sgd", "--output", "key"],
        "options": [*adalora, "--optim", "sgd", "--report_to", "tensorboard", "--json", "--output", "options"],
        "exported": ["export", "lora"],
        "evaluated": ["evaluate", "lora"],
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, encoder: Path, decoder: Path) -> Path:
    """Folder of data and recipes; the encoder has no dropout."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "encoder").mkdir()
    for path in encoder.iterdir():
        (folder / "encoder" / path.name).write_bytes(path.read_bytes())
    config = BertConfig.from_pretrained(encoder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.save_pretrained(folder / "encoder")
    for seed, (name, count) in enumerate({"train": 160, "validation": 32}.items()):
        write_rows(folder / f"{name}.jsonl", examples(count, seed))
    for name, text in {"recipe": RECIPE, "plain": PLAIN, "language": LANGUAGE}.items():
        model = decoder if text is LANGUAGE else folder / "encoder"
        (folder / f"{name}.yaml").write_text(text.format(encoder=model, data=folder), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def two(home: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what came of every command in each of two processes."""
    (home / "commands.json").write_text(json.dumps(_commands(), default=str), encoding="utf-8")
    _torchrun(Path(__file__).with_name("two_processes.py"), home, check=True)
    return home, [read_json(home / f"{rank}.json") for rank in range(2)]


@pytest.fixture(scope="module")
def one(home: Path) -> Callable[[str], Path]:
    """Trains with a method on one process with the whole batch; the run folder."""
    folder = home / "one"
    folder.mkdir()

    def train(name: str) -> Path:
        with chdir(folder):
            if (folder / name).is_dir():
                return folder / name
            if name == "language":
                done("train", home / "language.yaml", "--batch_size", BATCH, "--steps", STEPS, "--output", name)
            else:
                done(*_words(name, str(home / "recipe.yaml"), BATCH))
        return folder / name

    return train


def _torchrun(*words: Any, check: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, words)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert not check or result.returncode == 0, result.stderr
    return result


def _loose(path: Path) -> dict[str, Any]:
    return {name: tensor.float() for name, tensor in load_file(path / "adapter" / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("name", [*METHODS, "language", "whole", "resumed"])
def test_both_processes_end_with_the_same_adapter_and_plan(name: str, two: Any) -> None:
    first, second = (results[name] for results in two[1])
    assert (first["code"], second["code"]) == (0, 0), first["err"] + second["err"]
    assert first["ranks"] == second["ranks"]
    assert first["checksum"] == second["checksum"]
    assert first["wrapper"] == second["wrapper"] == "DistributedDataParallel"


@pytest.mark.parametrize("name", [*METHODS, "language"])
def test_it_is_that_of_one_process_with_the_same_global_batch(name: str, two: Any, one: Any) -> None:
    both, alone = two[0] / name, one(name)
    assert ranks(both) == ranks(alone)
    losses = [[row["loss"] for row in log_rows(run) if "loss" in row] for run in (both, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = _loose(both), _loose(alone)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        difference = (tensor - theirs[key]).abs().max()
        assert difference <= 1e-3 * theirs[key].abs().max(), (key, float(difference))
    metrics = [read_json(run / "metrics.json") for run in (both, alone)]
    assert [m["processes"] for m in metrics] == [2, 1]
    assert metrics[0]["reference"] == metrics[1]["reference"]
    assert metrics[0]["validation"] == pytest.approx(metrics[1]["validation"], rel=1e-3)


def test_the_search_of_autolora_is_shared_too(two: Any, one: Any) -> None:
    both, alone = two[0] / "autolora", one("autolora")
    assert ranks(both / "search") == ranks(alone / "search")
    assert len(set(ranks(both / "search").values())) > 1, "ranks that differ are no accident"


def test_one_process_speaks_and_says_how_many_there_are(two: Any) -> None:
    for name, words in {"adalora": ("Ranks", "adalora/adapter"), "autolora": ("search", "then")}.items():
        first, second = (results[name] for results in two[1])
        assert "processes 2, each with 8 examples a step" in first["out"]
        assert " of 16 examples, " in first["out"]
        assert all(word in first["out"] for word in words)
        assert second["out"] == ""
    assert "processes 2, each with 12 examples a step" in two[1][0]["epochs"]["out"]


def test_an_epoch_is_counted_in_global_batches(two: Any) -> None:
    """160 examples are 40 batches of 4, 20 for each process, 7 steps of up to 3: 1.5 epochs are 11 steps."""
    assert read_json(two[0] / "epochs" / "metrics.json")["total_steps"] == 11


@pytest.mark.parametrize("name", ["adalora", "autolora", "lora", "resumed"])
def test_log_and_trace_are_written_once(name: str, two: Any) -> None:
    run = two[0] / ("killed" if name == "resumed" else name)
    steps = [row["step"] for row in log_rows(run) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))
    kinds = [json.loads(line)["event"] for line in (run / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (kinds.count("start"), kinds.count("finish"), kinds[-1]) == (1, 1, "finish")


def test_a_run_killed_and_resumed_on_two_processes_is_the_same_run(two: Any) -> None:
    folder, results = two
    for result in results:
        assert result["resumed"]["checksum"] == result["whole"]["checksum"]
    kept = folder / "killed" / "checkpoints" / f"checkpoint-{STEPS}"
    assert {path.name for path in kept.glob("random-*")} == {"random-0.json", "random-1.json"}
    manifest = read_json(kept / "manifest.json")
    assert (manifest["step"], manifest["processes"]) == (STEPS, 2)
    assert {"random-0.json", "random-1.json"} <= manifest["files"].keys()
    rows = [[row for row in log_rows(folder / run) if "loss" in row] for run in ("killed", "whole")]
    assert rows[0] == rows[1]


def test_a_run_of_two_processes_is_not_resumed_on_one(two: Any) -> None:
    with chdir(two[0]):
        words = ["train", "plain.yaml", "--batch_size", BATCH // 2, "--steps", STEPS, *SAVING, "--output", "two"]
        said = refused(*words, "--resume")
    assert "checkpoint-4 was written by a run on 2 processes, and this one is on 1; resume on as many: " in said
    launcher, cure = said.partition("resume on as many: ")[2].split(" loralloc ")
    assert launcher.startswith("torchrun ")
    script = Path(sys.executable).with_name("loralloc")
    options = [str(word) for word in words[2:]]
    with chdir(two[0]):
        done_by_two = _torchrun(*launcher.split()[1:], script, *cure.replace("RECIPE", "plain.yaml").split(), *options)
    assert done_by_two.returncode == 0, done_by_two.stderr
    assert done_by_two.stdout.count("checked   reloaded by stock PEFT") == 1
    assert read_json(two[0] / "two" / "metrics.json")["total_steps"] == STEPS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there already", "output: lora holds a run already; continue it with --resume"),
        ("folder", "no space left on device"),
        ("data", "there is no file train.jsonl here"),
        ("option", "--optim: training.trainer.optim: sgdd is not a valid OptimizerNames"),
        ("key", '--optmi: unknown key "optmi". Did you mean "optim"?'),
        ("apart adalora", "the processes train apart: after step 2 the trained weights of process 1"),
        ("apart lora", "the processes train apart: after step 2 the trained weights of process 1"),
        ("exported", "loralloc export takes one process, not 2: start it without torchrun or accelerate launch"),
    ],
)
def test_an_error_ends_both_processes_and_is_said_once(name: str, said: str, two: Any) -> None:
    results = [process[name] for process in two[1]]
    assert [result["code"] for result in results] == [2, 2]
    assert [said in result["err"] for result in results].count(True) == 1
    assert [result["err"] for result in results].count("") == 1
    assert not (two[0] / name / "adapter").exists()


def test_options_of_the_trainer_are_those_of_both_and_told_by_one(two: Any) -> None:
    first, second = (results["options"] for results in two[1])
    assert first["checksum"] == second["checksum"]
    kinds = [json.loads(line)["event"] for line in first["out"].splitlines()]
    smaller = ["evaluation"] * 4
    assert kinds == ["start", "evaluation", "training", "log", "log", *smaller, "evaluation", "outcome"]
    assert (second["code"], second["out"]) == (0, "")
    assert len(list((two[0] / "options").rglob("events.out.tfevents.*"))) == 1


def test_the_adapter_can_be_evaluated_by_two_processes(two: Any) -> None:
    first, second = (results["evaluated"] for results in two[1])
    accuracy = read_json(two[0] / "lora" / "metrics.json")["validation"]["accuracy"]
    assert f"{accuracy:.4f}" in first["out"]
    assert (second["code"], second["out"]) == (0, "")


def test_a_signal_to_the_launcher_ends_both_after_the_same_step(home: Path) -> None:
    script, folder = Path(sys.executable).with_name("loralloc"), home / "signalled"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    words = ["train", "plain.yaml", "--steps", "4000", "--log_every", "1", "--output", "signalled"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (
        chdir(home),
        subprocess.Popen(
            [*command, script, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as launched,
    ):
        while not (folder / "log.jsonl").is_file() or not (folder / "log.jsonl").stat().st_size:
            assert launched.poll() is None
            time.sleep(0.05)
        launched.send_signal(signal.SIGTERM)
        said = launched.communicate(timeout=300)[1]
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = checkpoint.name.removeprefix("checkpoint-")
    go_on = "torchrun --nproc-per-node=2 --no-python loralloc train signalled/recipe.yaml --resume"
    assert said.count(f"stopped by SIGTERM after step {int(step):,}, which is saved; go on with {go_on}") == 1
    assert damage(checkpoint) is None
    assert {path.name for path in checkpoint.glob("random-*")} == {"random-0.json", "random-1.json"}


def test_a_mistake_ends_the_launcher_too(home: Path) -> None:
    script = Path(sys.executable).with_name("loralloc")
    with chdir(home):
        result = _torchrun("--no-python", script, "train", "recipe.yaml", "--data.train", "nothing.jsonl")
    assert result.returncode != 0
    assert (result.stdout + result.stderr).count("error: ") == 1
    assert "nothing.jsonl" in result.stderr
