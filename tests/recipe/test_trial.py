"""Values that a library refuses are refused before anything is loaded, with the option that is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from loralloc.errors import UserError
from loralloc.recipe import trial
from loralloc.recipe.run import rehearse, run
from loralloc.recipe.schema import Recipe, load_recipe
from loralloc.recipe.trial import check_values, refused_values

RECIPE = """\
task: sequence-classification
model: {name: nowhere}
data: {train: data/train.jsonl, text: text, label: label}
method: {name: lora}
training: {steps: 30}
output: runs/a
"""


def read(folder: Path, *words: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return load_recipe(path, words)


def blamed(folder: Path, *words: str) -> dict[str, str]:
    """The options that are to blame, each with the reason."""
    return {".".join(map(str, key)): told for key, told in refused_values(read(folder, *words))}


@pytest.mark.parametrize(
    ("words", "key", "reason"),
    [
        (["--optim", "sgdd"], "training.trainer.optim", "sgdd is not a valid OptimizerNames, please select one of"),
        (["--optim", "lomo"], "training.trainer.optim", "You need to install `lomo_optim`"),
        (["--fp16", "true"], "training.trainer.fp16", "accelerate would ignore fp16 on this device, which is cpu; set"),
        (["--fp16", "true", "--bf16", "true"], "training.trainer.fp16", "At most one of fp16 and bf16 can be True"),
        (["--report_to", "[tensorboard, nowhere]"], "training.trainer.report_to", "nowhere is not supported, only"),
        (["--report_to", "codecarbon"], "training.trainer.report_to", "CodeCarbonCallback requires"),
        (["--lr_scheduler_type", "polynomial", "--lr_scheduler_kwargs", "{powr: 2}"],
         "training.trainer.lr_scheduler_kwargs", "get_polynomial_decay_schedule_with_warmup() got an unexpected"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "training.trainer.lr_scheduler_type",
         "lr_scheduler_type reduce_lr_on_plateau requires an eval strategy"),
        (["--dataloader_prefetch_factor", "2"], "training.trainer.dataloader_prefetch_factor", "--dataloader_prefetch"),
        (["--load_best_model_at_end", "true"], "training.trainer.load_best_model_at_end",
         "load_best_model_at_end needs evaluations; set training.eval_every and training.save_every"),
        (["--accelerator_config", "{colour: red}"], "training.trainer.accelerator_config", "got an unexpected keyword"),
        (["--layers_to_transform", "0"], "lora.peft.layers_to_transform", "cannot be used when `target_modules` is"),
        (["--use_dora", "true"], "lora.peft.use_dora", "use_dora makes the update more, or other, than B·A"),
        (["--init_lora_weights", "pissa"], "lora.peft.init_lora_weights", "changes the base weights at the start"),
        (["--init_lora_weights", "eva"], "lora.peft.init_lora_weights", "computed from data"),
        (["--peft.bias", "all"], "lora.peft.bias", 'bias="all" trains biases of the base model'),
        (["--layer_replication", "[[0, 1]]"], "lora.peft", ""),
    ],
)  # fmt: skip
def test_a_value_that_a_library_refuses(tmp_path: Path, words: list[str], key: str, reason: str) -> None:
    if key == "lora.peft":  # a list of pairs is a list of lists in YAML, and of another type
        with pytest.raises(UserError, match=r"lora.peft.layer_replication must be .*, got \[\[0, 1\]\]"):
            read(tmp_path, *words)
        return
    found = blamed(tmp_path, *words)
    assert list(found) == [key]
    assert found[key].startswith(f"{key}: ")
    assert reason in found[key]


def test_values_that_are_fine(tmp_path: Path) -> None:
    words = ["--optim", "adafactor", "--report_to", "tensorboard", "--adam_beta1", "0.8", "--use_rslora", "true"]
    more = ["--lr_scheduler_type", "cosine_with_restarts", "--lr_scheduler_kwargs", "{num_cycles: 2}"]
    assert blamed(tmp_path, *words, *more, "--push_to_hub", "true") == {}


def test_each_of_several_is_blamed_and_no_other(tmp_path: Path) -> None:
    """`num_cycles` alone is refused as well, by the schedule that it is not meant for."""
    schedule = ["--lr_scheduler_kwargs", "{num_cycles: 2}", "--lr_scheduler_type", "cosine_with_restarts"]
    found = blamed(tmp_path, *schedule, "--optim", "sgdd", "--fp16", "true", "--use_dora", "true")
    assert sorted(found) == ["lora.peft.use_dora", "training.trainer.fp16", "training.trainer.optim"]


def test_where_none_is_to_blame_alone_all_of_them_are(tmp_path: Path) -> None:
    found = blamed(tmp_path, "--torch_compile_mode", "x", "--hub_revision", "y", "--debug", "nonsense")
    assert list(found) == ["training.trainer.debug"]
    pair = blamed(tmp_path, "--eval_strategy", "epoch", "--save_strategy", "steps", "--load_best_model_at_end", "true")
    assert "training.trainer" in next(iter(pair))


def test_what_our_own_keys_are_to_blame_for_is_told_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr("loralloc.training.processes.on_cpu", lambda: False)
    assert blamed(tmp_path, "--bf16", "true", "--optim", "sgd") == {}


def test_without_options_nothing_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trainer(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("tried")

    monkeypatch.setattr(trial, "Trainer", trainer)
    assert blamed(tmp_path) == {}
    assert list(blamed(tmp_path, "--optim", "sgd")) == []  # without any it fails too


@pytest.mark.parametrize("act", [run, rehearse])
def test_they_are_refused_before_the_model_is_looked_for(tmp_path: Path, act: Any) -> None:
    recipe = read(tmp_path, "--optim", "sgdd", "--use_dora", "true")
    with pytest.raises(UserError, match=r"^lora\.peft\.use_dora: .*\ntraining\.trainer\.optim: sgdd is not a valid"):
        act(recipe)
    with pytest.raises(UserError, match=r"data/train\.jsonl: no such file"):
        act(read(tmp_path, "--optim", "sgd"))


def test_a_line_or_a_flag_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("{steps: 30}", "\n  steps: 30\n  trainer:\n    optim: sgdd"), encoding="utf-8")
    with pytest.raises(UserError) as told:
        load_recipe(path, ["--use_dora", "true"], refused_values)
    lines = str(told.value).split("\n")
    assert lines[0].startswith(f"{path}:8: training.trainer.optim: sgdd is not a valid OptimizerNames")
    assert lines[1].startswith("--use_dora: lora.peft.use_dora: use_dora makes the update more")


def test_a_trial_leaves_the_verbosity_of_transformers(tmp_path: Path) -> None:
    before = transformers.logging.get_verbosity()
    check_values(read(tmp_path, "--optim", "sgd"))
    assert transformers.logging.get_verbosity() == before
