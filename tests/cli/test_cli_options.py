"""Every verb reads every option of the recipe that concerns it, and no verb changes the recipe that it reads."""

from __future__ import annotations

import builtins
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import transformers
import yaml
from transformers import BertConfig

from loralloc.recipe import from_recipe, stages
from loralloc.recipe import run as pipeline
from loralloc.recipe.from_recipe import add_adapter
from loralloc.recipe.run_folder import HEADER
from loralloc.recipe.schema import load_recipe, recipe_keys
from loralloc.recipe.sections import CompareConfig, GenerateConfig
from loralloc.tasks import sequence_classification
from loralloc.tasks.base import TaskData
from loralloc.tasks.spec import TASKS, ClassificationData

from .command import RECIPE, done, examples, read_json, refused, save_encoder, write_rows
from .deaths import killed_at

CHANGED: dict[str, Any] = {
    "model.name": "other",
    "model.dtype": "bfloat16",
    "model.load_in": "8bit",
    "model.trust_remote_code": True,
    "model.load": {"attn_implementation": "eager"},
    "data.train": "more.jsonl",
    "data.validation": "more.jsonl",
    "data.test": "more.jsonl",
    "data.text": "second",
    "data.text_pair": "second",
    "data.also": {"more": "more.jsonl"},
    "data.label": "flipped",
    "data.labels": ["good", "bad"],
    "data.class_weights": {"good": 2.0},
    "data.max_length": 4,
    "lora.r": 3,
    "lora.alpha": 9,
    "lora.dropout": 0.25,
    "lora.target_modules": ["query"],
    "lora.exclude_modules": ["key"],
    "lora.modules_to_save": ["pooler"],
    "lora.peft": {"use_rslora": True},
    "plan": "ranks.json",
    "training.steps": 7,
    "training.batch_size": 4,
    "training.accumulation": 3,
    "training.learning_rate": 0.5,
    "training.schedule": "cosine",
    "training.warmup": 0.3,
    "training.weight_decay": 0.1,
    "training.max_grad_norm": 0.5,
    "training.seed": 5,
    "training.eval_every": 2,
    "training.save_every": 2,
    "training.log_every": 2,
    "training.bf16": True,
    "training.compact": True,
    "training.gradient_checkpointing": True,
    "training.trainer": {"neftune_noise_alpha": 5.0, "per_device_eval_batch_size": 3},
}
"""Another value of each option; `training.epochs` takes the place of `training.steps`."""

OTHER_TASKS = {
    f"data.{key}" for task in TASKS.values() for key in task.keys if key not in ClassificationData.model_fields
}
GENERATION = {f"evaluate.generate.{key}" for key in GenerateConfig.model_fields}
JUDGING = {"training.keep_best", "training.early_stopping", "evaluate.metric"}
AT_THE_END = {"evaluate.cuts"}
COMPARING = {f"compare.{key}" for key in CompareConfig.model_fields}
ELSEWHERE = {"task", "training.epochs", "output", *OTHER_TASKS, *GENERATION, *JUDGING, *AT_THE_END, *COMPARING}
"""The task and what has a meaning for another one, the folder, which a verb is given; what needs other keys beside it
(`test_cli_best.py` has these), what is looked at when a run has ended (`test_cli_frontier.py`), and what is for
`loralloc compare`."""

TRAINS = set(CHANGED)
LOADS = {"model.name", "model.dtype", "model.load_in", "model.trust_remote_code", "model.load", "training.seed"}
READS = {key for key in CHANGED if key.startswith("data.")}
CONCERNS = {
    "train": TRAINS,
    "evaluate": LOADS | READS | {"training.batch_size", "training.bf16", "training.trainer"},
    "export": LOADS,
}
LOADING = ("dtype", "quantization_config", "trust_remote_code", "attn_implementation")
USED = ("per_device_eval_batch_size", "bf16")
"""Settings of the Trainer that an evaluation depends on."""


class SeenError(Exception):
    """Ends a command when all it would train with has been seen."""


@contextmanager
def seeing(verb: str, seen: list[Any]) -> Iterator[None]:
    """Note what a verb hands on: to loaders, to PEFT, to the Trainer; and the data it looks at."""
    peft, load_model, task_data = from_recipe.get_peft_model, from_recipe.load_model, from_recipe.task_data

    def load(name: str) -> Any:
        alive = getattr(transformers, name).from_pretrained

        def note(path: str, *rest: Any, **options: Any) -> Any:
            seen.append([name, str(path), *(str(options.get(key)) for key in LOADING)])
            return alive(path, *rest, **options)

        return patch.object(getattr(transformers, name), "from_pretrained", note)

    def model(auto: Any, checkpoint: Any, tokenizer: Any, seed: int, **options: Any) -> Any:
        seen.append(["head", seed])
        return load_model(auto, checkpoint, tokenizer, seed, **options)

    def arguments(**settings: Any) -> Any:
        seen.append(settings if verb == "train" else {key: settings[key] for key in USED})
        return transformers.TrainingArguments(**settings)

    def adapt(model: Any, config: Any) -> Any:
        seen.append({key: str(value) for key, value in config.to_dict().items()})
        return peft(model, config)

    def data(recipe: Any) -> TaskData:
        found = task_data(recipe)
        seen.append([split and split[:] for split in (found.train, found.validation, found.test, *found.also.values())])
        seen.append(len(found.model._forward_hooks))  # what weighs classes
        return found

    def train(stage: Any, *rest: Any) -> None:
        callbacks = stage.trainer.callback_handler.callbacks
        seen.append([getattr(callback, "_compact", None) for callback in callbacks])
        raise SeenError

    with ExitStack() as patches:
        for owner, name, note in (
            (from_recipe, "arguments_class", lambda task: arguments),
            (from_recipe, "get_peft_model", adapt),
            (from_recipe, "load_model", model),
            (sequence_classification, "load_model", model),
            (from_recipe, "task_data", data),
            (pipeline, "task_data", data),
            (stages.Stage, "train", train),
        ):
            patches.enter_context(patch.object(owner, name, note))
        for name in ("AutoConfig", "AutoTokenizer", "AutoModelForSequenceClassification"):
            patches.enter_context(load(name))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: Path, kept_run: Path) -> Path:
    """Folder of a finished run and of what the changed options name."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("train", "validation", "test", "more"):
        labelled = [{**row, "flipped": "bad" if row["label"] == "good" else "good"} for row in examples(24, len(name))]
        write_rows(folder / f"{name}.jsonl", labelled)
    save_encoder(folder / "other")
    shutil.copytree(kept_run, folder / "run")
    shutil.copy(kept_run / "ranks.json", folder)
    words = RECIPE.format(encoder=encoder, data=folder)
    (folder / "recipe.yaml").write_text(words, encoding="utf-8")
    return folder


def observe(verb: str, folder: Path, key: str | None = None) -> str:
    """All that a verb hands on, with one option changed."""
    tree = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    if key is not None:
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = CHANGED[key]
    recipe = folder / ("changed.yaml" if verb == "train" else "run/recipe.yaml")
    recipe.write_text(f"{HEADER}\n{yaml.safe_dump(tree)}", encoding="utf-8")
    seen: list[Any] = []
    with seeing(verb, seen):
        if verb == "train":
            with pytest.raises(SeenError):
                done("train", recipe, "--output", "new", "--replace")
        elif verb == "export":
            done("export", "run", "--to", "exported")
        else:
            done("evaluate", "run")
    return json.dumps(seen)


def test_every_option_is_walked() -> None:
    sections = {key for key in recipe_keys() if any(other.startswith(f"{key}.") for other in recipe_keys())}
    options = {key for key in recipe_keys() if key not in sections and not key.startswith("method.")}
    assert options == CHANGED.keys() | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("verb", CONCERNS)
def test_every_verb_reads_the_options_that_concern_it_and_no_others(
    verb: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    plain = observe(verb, place)
    assert observe(verb, place) == plain, "the same recipe gives the same"
    read = {key for key in CHANGED if observe(verb, place, key) != plain}
    assert read == CONCERNS[verb]


# Code that comes with a model runs only where the recipe says so.

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification
Path({marker!r}).touch()
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
"""


@pytest.fixture
def own(here: Path, encoder: Path) -> Path:
    """A model with code of its own, which leaves a file `ran` behind when it is imported."""
    folder = here / "own"
    shutil.copytree(encoder, folder)
    config = BertConfig.from_pretrained(encoder).to_dict()
    maps = {"AutoConfig": "code.OwnConfig", "AutoModelForSequenceClassification": "code.OwnModel"}
    maps = {name: value.replace("code.", "own_code.") for name, value in maps.items()}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": maps}))
    (folder / "own_code.py").write_text(CODE.format(marker=str(here / "ran")), encoding="utf-8")
    return folder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions on the terminal; each is answered with yes."""
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    return questions


def _forget_code(here: Path) -> None:
    (here / "ran").unlink(missing_ok=True)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.usefixtures("unreported")
def test_code_of_a_model_runs_where_the_recipe_says_so_and_nowhere_else(
    own: Path, here: Path, recipe: Path, asked: list[str]
) -> None:
    trusting = ["--model.trust_remote_code", "true"]
    said = refused("train", recipe, "--model.name", own)
    assert said.endswith("If you trust its code, set model.trust_remote_code: true.")
    assert not (here / "ran").exists()
    done("train", recipe, "--model.name", own, *trusting)
    assert (here / "ran").exists()
    kept = here / "run" / "recipe.yaml"
    trusted = kept.read_text(encoding="utf-8")
    verbs = (["export", "run"], ["export", "run", "--profile", "merged"], ["evaluate", "run"])
    for words in verbs:
        _forget_code(here)
        kept.write_text(trusted.replace("trust_remote_code: true", "trust_remote_code: false"), encoding="utf-8")
        assert refused(*words).endswith("If you trust its code, set model.trust_remote_code: true.")
        assert not (here / "ran").exists()
        kept.write_text(trusted, encoding="utf-8")
        done(*words)
        assert (here / "ran").exists()
    assert asked == []


# Nothing of a recipe is handed to a library that may change it.


@pytest.mark.usefixtures("unreported")
def test_a_killed_run_with_modules_to_save_is_resumed(recipe: Path, here: Path) -> None:
    words = [recipe, "--lora.modules_to_save", "[pooler]", "--target_modules", "[query, value]", "--save_every", 2]
    with killed_at(5):
        done("train", *words)
    assert load_recipe(here / "run" / "recipe.yaml").lora.modules_to_save == ["pooler"]
    done("train", *words, "--resume")
    assert "pooler" in read_json(here / "run" / "adapter" / "adapter_config.json")["modules_to_save"]


def test_an_adapter_leaves_the_recipe_as_it_is(recipe: Path, here: Path, run: Path) -> None:
    plan = read_json(run / "ranks.json")
    del plan["modules"]["bert.pooler.dense"]
    (here / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    saved = ["--lora.modules_to_save", "[pooler]"]
    lists = ["--target_modules", "[query, value]", "--lora.exclude_modules", "[layer.0.attention.self.query]"]
    for words in ([*saved, *lists], [*saved, "--plan", "plan.json"]):
        settings = load_recipe(recipe, words)
        before = settings.model_copy(deep=True)
        model = add_adapter(from_recipe.task_data(settings).model, settings)
        assert settings == before
        assert len(model.peft_config["default"].modules_to_save) > 1, "PEFT has added the names of heads"
