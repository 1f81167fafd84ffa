"""Options of the libraries, trained with for real: each does what its library says, and the run keeps its promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from loralloc.plan import RankPlan
from loralloc.recipe import evaluations, from_recipe
from loralloc.recipe import run as pipeline
from loralloc.recipe.schema import load_recipe
from loralloc.recipe.stages import total_steps
from loralloc.training.trainer import PlainTrainer

from .command import PLAIN, RECIPE, done, log_rows, ranks, read_json, refused
from .deaths import differences, killed_at

Write = Callable[[str], Path]
SEARCH = PLAIN.replace("name: lora", "name: autolora\n  check_every: 2")

pytestmark = pytest.mark.usefixtures("unreported")


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The optimizer of every training, by the name of its class."""
    seen: list[str] = []
    create = PlainTrainer.create_optimizer

    def note(self: Any, *args: Any) -> Any:
        made = create(self, *args)
        seen.append(type(made).__name__)
        return made

    monkeypatch.setattr(PlainTrainer, "create_optimizer", note)
    return seen


class TestTrainer:
    def test_an_optimizer(self, recipe: Path, here: Path, optimizers: list[str]) -> None:
        done("train", recipe, "--training.trainer.optim", "sgd")
        assert optimizers == ["SGD"]
        kept = yaml.safe_load((here / "run" / "recipe.yaml").read_text(encoding="utf-8"))
        assert kept["training"]["trainer"] == {"optim": "sgd"}

    def test_allora_to_the_papers_letter_without_a_warning(
        self, write: Write, here: Path, optimizers: list[str]
    ) -> None:
        """Warnings are errors here: under Adam, this mode warns."""
        text = PLAIN.replace("name: lora", "name: allora\n  mode: paper").replace("alpha: 8", "alpha: 4")
        path = write(text.replace("learning_rate: 1e-2", "learning_rate: 0.5\n  trainer:\n    optim: sgd"))
        done("train", path, "--log_every", 1)
        assert optimizers == ["SGD"]
        losses = [row["loss"] for row in log_rows(here / "run") if "loss" in row]
        assert sum(losses[-4:]) < sum(losses[:4])
        with pytest.warns(UserWarning, match=r'ALLoRA\(mode="paper"\) with AdamW'):
            done("train", path, "--optim", "adamw_torch", "--replace")

    def test_the_schedule_and_its_settings(self, recipe: Path, here: Path) -> None:
        kind = ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", "{num_cycles: 2}"]
        done("train", recipe, *kind, "--training.warmup", 0, "--log_every", 1)
        rates = [row["learning_rate"] for row in log_rows(here / "run") if "learning_rate" in row]
        assert rates[0] == rates[8] == 1e-2
        assert rates[7] < 1e-3
        assert "| schedule | cosine_with_restarts |" in (here / "run/adapter/README.md").read_text(encoding="utf-8")

    def test_ranks_are_in_the_events_of_a_tracker_and_nothing_lies_elsewhere(self, recipe: Path, here: Path) -> None:
        done("train", recipe, "--report_to", "tensorboard", "--eval_every", 8)
        files = sorted(here.rglob("events.out.tfevents.*"))
        assert files
        assert all(file.is_relative_to(here / "run" / "checkpoints" / "runs") for file in files)
        content = b"".join(file.read_bytes() for file in files)
        assert [name for name in (b"train/loss", b"train/rank/total", b"eval/accuracy") if name not in content] == []
        assert b"untrained" not in content
        done("evaluate", here / "run")
        assert sorted(here.rglob("events.out.tfevents.*")) == files, "an evaluation is no part of the run"

    def test_a_rehearsal_tells_no_tracker(self, recipe: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[str] = []
        alive = evaluations.training_arguments

        def note(*args: Any) -> Any:
            made = alive(*args)
            told.extend(made.report_to)
            return made

        monkeypatch.setattr(evaluations, "training_arguments", note)
        done("train", recipe, "--report_to", "tensorboard", "--dry-run")
        assert told == []
        done("train", recipe, "--report_to", "tensorboard")
        assert told == ["tensorboard"]

    def test_evaluations_and_checkpoints_with_every_epoch(self, recipe: Path, here: Path) -> None:
        words = ["--epochs", 2, "--eval_strategy", "epoch", "--save_strategy", "epoch"]
        assert done("train", recipe, *words).count("  validation: loss") == 2
        assert sorted(path.name for path in (here / "run" / "checkpoints").iterdir()) == [
            "checkpoint-12",
            "checkpoint-6",
        ]
        assert [row["step"] for row in log_rows(here / "run") if "eval_loss" in row][:2] == [6, 12]

    @pytest.mark.parametrize("words", [["--dataloader_drop_last", "true"], ["--training.batch_size", "7"], []])
    def test_steps_are_counted_as_the_trainer_counts_them(
        self, words: list[str], recipe: Path, here: Path, data: Path
    ) -> None:
        length = len((data / "train.jsonl").read_text(encoding="utf-8").splitlines())
        words = ["--epochs", "2", "--training.batch_size", "9", *words]
        planned = total_steps(load_recipe(recipe, words), length)
        done("train", recipe, *words)
        assert read_json(here / "run" / "metrics.json")["total_steps"] == planned

    @pytest.mark.parametrize(
        "words",
        [
            ["--neftune_noise_alpha", "5"],
            ["--dataloader_num_workers", "2"],
            ["--label_smoothing_factor", "0.1"],
            pytest.param(["--torch_compile_backend", "eager"], marks=pytest.mark.slow),
            pytest.param(["--torch_compile", "true"], marks=pytest.mark.slow),
        ],
        ids=lambda words: words[0],
    )
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")
    def test_what_else_changes_a_training_ends_in_a_checked_adapter(
        self, words: list[str], recipe: Path, here: Path
    ) -> None:
        assert "reloaded by stock PEFT" in done("train", recipe, *words)
        assert sum(ranks(here / "run").values()) == 26

    def test_two_options_that_exclude_each_other(self, write: Write) -> None:
        both = "steps: 16\n  schedule: linear\n  trainer:\n    lr_scheduler_type: cosine"
        path = write(RECIPE.replace("steps: 16", both))
        assert refused("train", path) == (
            f"{path}:21: training.trainer.lr_scheduler_type takes the place of training.schedule, which is linear: "
            "leave one of them out"
        )


class TestBestModel:
    WORDS = ("--load_best_model_at_end", "true", "--metric_for_best_model", "accuracy", "--eval_every", 2)

    def test_is_what_is_exported(self, write: Write, here: Path, encoder: Path) -> None:
        """Accuracy does not rise here after the first evaluation, so the first checkpoint is the best."""
        done("train", write(PLAIN), *self.WORDS, "--save_every", 2, "--learning_rate", 0.3, "--steps", 6)
        folder = here / "run" / "checkpoints" / "checkpoint-2"
        assert read_json(folder.with_name("checkpoint-6") / "trainer_state.json")["best_global_step"] == 2
        base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
        ids = torch.tensor([[2, 5, 6, 3]])
        logits = []
        for place in (here / "run" / "adapter", folder, folder.with_name("checkpoint-6")):
            model = PeftModel.from_pretrained(base, place, adapter_name=place.name)
            model.set_adapter(place.name)
            logits.append(model.eval()(input_ids=ids).logits)
        torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
        assert not torch.allclose(logits[0], logits[2], atol=1e-3)
        metrics = read_json(here / "run" / "metrics.json")["validation"]
        (row,) = [row for row in log_rows(here / "run") if row["step"] == 2 and "eval_loss" in row]
        assert metrics["loss"] == pytest.approx(row["eval_loss"], abs=1e-5)

    def test_waits_for_the_final_ranks(self, recipe: Path, here: Path) -> None:
        words = [*self.WORDS, "--save_every", 2]
        assert "could bring back a checkpoint from before step 11" in refused("train", recipe, *words)
        done("train", recipe, *words, "--eval_delay", 11)
        state = read_json(here / "run" / "checkpoints" / "checkpoint-16" / "trainer_state.json")
        assert state["best_global_step"] >= 12
        assert sum(ranks(here / "run").values()) == 26

    @pytest.mark.parametrize(("metric", "greater"), [("perplexity", False), ("accuracy", True), ("loss", False)])
    def test_is_the_one_that_the_metric_means(self, metric: str, greater: bool, recipe: Path, tmp_path: Path) -> None:
        """transformers takes every name for a score that does not end with `loss`."""
        words = ["--load_best_model_at_end", "true", "--metric_for_best_model", metric]
        settings = load_recipe(recipe, [*words, "--eval_every", "2", "--save_every", "2"])
        assert from_recipe.training_arguments(settings, tmp_path).greater_is_better is greater

    def test_a_metric_that_there_is_not(self, recipe: Path) -> None:
        words = ["--load_best_model_at_end", "true", "--metric_for_best_model", "acuracy", "--eval_every", 2]
        assert refused("train", recipe, *words, "--save_every", 2, "--eval_delay", 11).endswith(
            "training.trainer.metric_for_best_model: a run has no metric acuracy; it has loss, accuracy, macro_f1, "
            'matthews, f1. Did you mean "accuracy"?'
        )


class TestAdapter:
    @pytest.mark.parametrize("text", [PLAIN, RECIPE], ids=["lora", "adalora"])
    def test_rslora_scales_by_the_root_in_the_run_its_plan_and_its_export(
        self, text: str, write: Write, here: Path
    ) -> None:
        path = write(text)
        scales = []
        for words in ([], ["--use_rslora", "true"]):
            assert "reloaded by stock PEFT" in done("train", path, *words, "--replace")
            plan = RankPlan.load(here / "run" / "ranks.json")
            scales.append({name: module.scale for name, module in plan.modules.items()})
        assert {name: scale * 4**0.5 for name, scale in scales[0].items()} == pytest.approx(scales[1])  # r is 4
        assert read_json(here / "run" / "adapter" / "adapter_config.json")["use_rslora"] is False
        done("train", path, "--plan", here / "run" / "ranks.json", "--method", "{name: lora}", "--output", "again")
        again = RankPlan.load(here / "again" / "ranks.json")
        kept = {name: scale for name, scale in scales[1].items() if name in again.modules}
        assert kept == pytest.approx({name: module.scale for name, module in again.modules.items()})

    def test_ranks_of_patterns(self, write: Write, here: Path) -> None:
        done("train", write(PLAIN), "--rank_pattern", "{query: 2, 1.attention.self.key: 3}")
        found = ranks(here / "run")
        assert found["bert.encoder.layer.0.attention.self.query"] == 2
        assert found["bert.encoder.layer.1.attention.self.key"] == 3
        assert found["bert.encoder.layer.0.attention.self.key"] == 4

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--rank_pattern", "{quary: 2}"],
             'lora.peft.rank_pattern: no adapted module fits "quary". Did you mean "query"? Correct it'),
            (["--rank_pattern", "{'(query': 2}"], 'lora.peft.rank_pattern: "(query" is no regular expression'),
            (["--alpha_pattern", "{classifier: 2}"],
             'lora.peft.alpha_pattern: no adapted module fits "classifier". Correct it or leave it out'),
            (["--layers_to_transform", "7", "--target_modules", "[query]"],
             "lora.target_modules, lora.peft.layers_to_transform: ['query'] fits no module that can be adapted"),
        ],
    )  # fmt: skip
    def test_what_fits_no_module(self, words: list[str], message: str, recipe: Path) -> None:
        assert message in refused("train", recipe, *words)

    def test_that_is_no_plain_lora_is_refused_before_it_is_trained(self, write: Write, here: Path) -> None:
        told = refused("train", write(PLAIN), "--init_lora_weights", "mica")
        assert "the adapter uses PEFT's MiCALinearVariant, which changes the update itself" in told
        assert not (here / "run").exists()

    def test_layers(self, write: Write, here: Path) -> None:
        done("train", write(PLAIN), "--layers_to_transform", "[1]", "--target_modules", "[query, key]")
        assert set(ranks(here / "run")) == {f"bert.encoder.layer.1.attention.self.{name}" for name in ("query", "key")}

    def test_after_a_search_its_plan_decides(self, write: Write, here: Path) -> None:
        path = write(SEARCH)
        done("train", path, "--use_rslora", "true", "--rank_pattern", "{query: 2}", "--eval_strategy", "epoch")
        found, plan = ranks(here / "run"), RankPlan.load(here / "run" / "search" / "ranks.json")
        assert found == plan.ranks
        assert max(rank for name, rank in found.items() if name.endswith("query")) <= 2
        assert {module.scale for name, module in plan.modules.items() if name.endswith("key")} == {8 / 4**0.5}


class TestModel:
    def test_arguments_of_from_pretrained(self, recipe: Path, here: Path) -> None:
        seen: list[dict[str, Any]] = []
        alive = AutoModelForSequenceClassification.from_pretrained

        def note(*args: Any, **options: Any) -> Any:
            seen.append(options)
            return alive(*args, **options)

        words = ["--attn_implementation", "eager", "--revision", "main", "--device_map", "cpu"]
        with patch.object(AutoModelForSequenceClassification, "from_pretrained", note):
            done("train", recipe, *words)
            done("export", here / "run", "--profile", "merged")
            done("evaluate", here / "run")
        assert len(seen) == 3
        assert all(options["attn_implementation"] == "eager" for options in seen)
        assert all((options["device_map"], options["revision"]) == ("cpu", "main") for options in seen)
        assert read_json(here / "run" / "adapter" / "adapter_config.json")["revision"] == "main"
        assert 'revision="main"' in (here / "run" / "adapter" / "README.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--attn_implementation", "nonsense"], 'Specified `attn_implementation="nonsense"` is not supported'),
            (["--variant", "fp16"], "Error no file named model.fp16.safetensors"),
            (["--subfolder", "deeper"], "Unrecognized model in"),
        ],
    )
    def test_what_they_refuse_names_them(self, words: list[str], message: str, recipe: Path) -> None:
        told = refused("train", recipe, *words)
        assert f"cannot be loaded with model.load ({words[0].removeprefix('--')}): " in told
        assert message in told


class TestResuming:
    @pytest.mark.parametrize(
        "words",
        [
            ["--optim", "sgd"],
            ["--optim", "adafactor"],
            ["--train_sampling_strategy", "group_by_length"],
            ["--save_strategy", "epoch"],
            ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", "{num_cycles: 2}"],
        ],
        ids=lambda words: words[1],
    )
    def test_goes_on_as_if_nothing_had_happened(self, words: list[str], recipe: Path, here: Path) -> None:
        words = words if "--save_strategy" in words else [*words, "--save_every", "2"]
        done("train", recipe, *words, "--output", "whole")
        with killed_at(9):
            done("train", recipe, *words)
        done("train", recipe, *words, "--resume")
        assert [name for name in differences(here / "run", here / "whole") if name != "recipe.yaml"] == []

    def test_options_are_compared_like_keys(self, recipe: Path) -> None:
        with killed_at(9):
            done("train", recipe, "--save_every", 2, "--optim", "sgd")
        assert "differs from the recipe given" in refused("train", recipe, "--save_every", 2, "--resume")


class FakeHub:
    """Stands for the Hub: notes what is made and what is pushed."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.pushed: list[tuple[str, list[str]]] = []
        self.error: Exception | None = None

    def __call__(self, token: str | None = None) -> FakeHub:
        return self

    def create_repo(self, name: str, **options: Any) -> Any:
        self.made.append(name)
        return type("Url", (), {"repo_id": f"me/{name}"})

    def upload_folder(
        self, *, repo_id: str, folder_path: Path, allow_patterns: list[str], revision: str | None
    ) -> None:
        if self.error is not None:
            raise self.error
        found = [path.name for path in Path(folder_path).iterdir()]
        self.pushed.append((repo_id, sorted(filter_repo_objects(found, allow_patterns=allow_patterns))))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", fake)
    monkeypatch.setattr(pipeline, "HfApi", fake)
    return fake


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # of the tests' environment
class TestPushing:
    @pytest.mark.parametrize("text", [RECIPE, SEARCH], ids=["adalora", "autolora"])
    def test_the_exported_adapter_is_pushed_once(self, text: str, write: Write, here: Path, hub: FakeHub) -> None:
        done("train", write(text), "--push_to_hub", "true", "--save_every", 4)
        assert hub.made == ["run"], "named as the folder of the run"
        files = sorted(path.name for path in (here / "run" / "adapter").iterdir())
        assert hub.pushed == [("me/run", files)]
        assert "adapter_model.safetensors" in files
        assert not list(here.rglob("*.bin"))

    def test_a_push_that_fails_leaves_the_run(self, recipe: Path, here: Path, hub: FakeHub) -> None:
        hub.error = OSError("403 Forbidden\nmore")
        said = done("train", recipe, "--push_to_hub", "true", "--hub_model_id", "own/name")
        cure = "loralloc export run --push me/own/name pushes the adapter"
        assert f"not pushed to me/own/name: 403 Forbidden; {cure}" in said
        assert (here / "run" / "metrics.json").is_file()

    def test_nobody_else_makes_a_repository(self, recipe: Path, here: Path, hub: FakeHub) -> None:
        done("train", recipe, "--push_to_hub", "true", "--dry-run")
        assert hub.made == []
        done("train", recipe, "--push_to_hub", "true")
        done("evaluate", here / "run")
        done("export", here / "run", "--profile", "uniform")
        assert hub.made == ["run"]
