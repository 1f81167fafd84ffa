"""Options of transformers and PEFT in a recipe: every one is taken by its own name, or refused with key or reason."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import peft
import pytest
import transformers
from pydantic import ValidationError
from recipe_texts import CLASSIFICATION, Write, problems

from loralloc.adapter.from_plan import DECIDED
from loralloc.recipe.passthrough import (
    LOAD,
    OF_EVALUATIONS,
    OPTIONS,
    PEFT,
    PLANNED,
    TRAINER,
    Options,
    broken_options,
    imported,
    option_keys,
    values,
)
from loralloc.recipe.schema import complete_recipe, dump_recipe, load_recipe, recipe_keys
from loralloc.recipe.source import dotted
from loralloc.tasks.spec import TASKS

TASK = "sequence-classification"


@pytest.fixture
def write(write: Write) -> Write:
    """Adds to the recipe of a classifier."""
    return lambda added="": write(CLASSIFICATION + added)


def found(key: tuple[str, ...], given: Mapping[str, Any], **more: Any) -> list[str]:
    """What is wrong with a mapping of options."""
    section, name = key
    tree = {"task": TASK, section: {name: given}, **more}
    return [message for _, message in broken_options(tree, {**recipe_keys(), **option_keys()})]


class TestTable:
    """It is held to the libraries."""

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: dotted(options.key))
    def test_names_options_that_there_are_once(self, options: Options) -> None:
        known = {name for task in TASKS for name in options.known(task)} | popped_by_from_pretrained()
        named = [*options.ours, *options.refused, *options.instead]
        assert set(named) <= known
        assert len(named) == len(set(named))
        assert set(options.owners) == set(TASKS)
        for task, refused in options.refused_in.items():
            assert set(refused) <= options.known(task).keys() - set(named)

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: dotted(options.key))
    def test_points_at_keys_that_there_are(self, options: Options) -> None:
        keys = {*recipe_keys(), *option_keys()}
        assert {*options.ours.values(), *map(dotted, options.instead.values())} <= keys

    def test_what_from_pretrained_takes_through_kwargs_is_listed(self) -> None:
        (options,) = (options for options in OPTIONS if options.key == LOAD)
        listed = {*options.types, *options.refused, *options.ours}
        assert popped_by_from_pretrained() <= listed
        signature = {*inspect.signature(transformers.PreTrainedModel.from_pretrained).parameters}
        assert set(options.types) <= popped_by_from_pretrained() - signature

    def test_a_plan_decides_what_it_decides(self) -> None:
        (options,) = (options for options in OPTIONS if options.key == PEFT)
        assert {*PLANNED} == {*DECIDED} - {*options.ours}

    def test_an_evaluation_takes_every_option_of_a_trl_trainer_that_decides_its_loss(self) -> None:
        known = {name for task in TASKS for name in OPTIONS[0].known(task)} - set(OPTIONS[0].ours)
        assert set(OF_EVALUATIONS) <= known - set(OPTIONS[0].refused)
        own = known - OPTIONS[0].known(TASK).keys() - set(OPTIONS[0].refused)
        of_training = {"activation_offloading", "disable_dropout", "padding_free"}
        same_numbers = {"precompute_ref_log_probs", "precompute_ref_batch_size"}
        assert own - set(OF_EVALUATIONS) == of_training | same_numbers

    @pytest.mark.parametrize(("key", "owner"), [(TRAINER, transformers.TrainingArguments), (PEFT, peft.LoraConfig)])
    def test_every_other_option_can_be_set_to_its_default(self, key: tuple[str, ...], owner: Any) -> None:
        (options,) = (options for options in OPTIONS if options.key == key)
        defaults = {field.name: field.default for field in fields(owner) if field.default is not MISSING}
        free = {name: value for name, value in defaults.items() if name not in {**options.ours, **options.refused}}
        assert len(free) > 15
        assert found(key, free) == []

    def test_another_class_of_arguments_brings_its_own_options(self) -> None:
        options = Options(TRAINER, {"sft": "trl.SFTConfig"}, {}, {})
        assert {"packing", "optim"} <= options.known("sft").keys()
        assert "packing" not in OPTIONS[0].known(TASK)

    def test_short_names_of_our_own_keys_stay_short(self) -> None:
        ends = [key.rpartition(".")[2] for key in option_keys()]
        assert {key.rpartition(".")[2] for key in recipe_keys()} & set(ends) == set()
        assert len(ends) == len(set(ends))


def popped_by_from_pretrained() -> set[str]:
    """What `from_pretrained` takes out of **kwargs, in transformers' own words."""
    sources = (
        transformers.PreTrainedModel.from_pretrained,
        transformers.AutoModelForCausalLM.from_pretrained.__func__,
    )
    text = "\n".join(map(inspect.getsource, sources))
    taken = re.findall(r'kwargs\.(?:pop|get)\(\s*"([a-z]\w*)"', text) + re.findall(r'if "([a-z]\w*)" in kwargs', text)
    unused = {"mirror", "low_cpu_mem_usage", "from_tf", "from_flax", "offload_state_dict"}
    hub = {"revision", "local_files_only", "cache_dir", "token"}  # in the signature
    return set(taken) - unused - hub


class TestNames:
    @pytest.mark.parametrize(
        ("added", "expected"),
        [
            ("lora:\n  peft:\n    use_rsLora: true",
             'recipe.yaml:17: unknown key "use_rsLora" in "lora.peft", the options of peft.LoraConfig. '
             'Did you mean "use_rslora"?'),
            ("lora:\n  peft:\n    adam_beta1: 0.9",
             'recipe.yaml:17: unknown key "adam_beta1" in "lora.peft", the options of peft.LoraConfig. '
             'Did you mean "training.trainer.adam_beta1"?'),
            ("lora:\n  use_rslora: true",
             'recipe.yaml:16: unknown key "use_rslora" in "lora". Did you mean "lora.peft.use_rslora"?'),
            ("lora:\n  peft:\n    r: 8", "recipe.yaml:17: lora.peft.r is lora.r in a recipe: set that"),
            ("lora:\n  peft:\n    eva_config: {rho: 2}",
             "recipe.yaml:17: lora.peft.eva_config cannot be set: it belongs to an initialisation that changes "
             "the base weights or needs data: no plain adapter can be exported"),
            ("plan: ranks.json\nlora:\n  peft:\n    rank_pattern: {query: 4}",
             "recipe.yaml:18: lora.peft.rank_pattern takes the place of plan, which is ranks.json: "
             "leave one of them out"),
            ("lora:\n  peft: true", "recipe.yaml:16: lora.peft must be a mapping, got true"),
        ],
    )  # fmt: skip
    def test_are_refused_with_their_line(self, write: Write, added: str, expected: str) -> None:
        assert problems(write(added)) == [expected]

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: dotted(options.key))
    def test_with_another_key_point_at_it(self, options: Options) -> None:
        for name, key in options.ours.items():
            assert found(options.key, {name: None}) == [f"{dotted(options.key)}.{name} is {key} in a recipe: set that"]

    @pytest.mark.parametrize("options", OPTIONS, ids=lambda options: dotted(options.key))
    def test_that_cannot_be_set_tell_the_reason(self, options: Options) -> None:
        for name, reason in options.refused.items():
            assert found(options.key, {name: None}) == [f"{dotted(options.key)}.{name} cannot be set: {reason}"]

    def test_that_the_trainer_of_a_task_ignores_are_refused_in_it(self) -> None:
        def told(task: str, **given: Any) -> list[str]:
            tree = {"task": task, "training": {"trainer": given}}
            return [message for _, message in broken_options(tree, {**recipe_keys(), **option_keys()})]

        start = "training.trainer."
        assert told("preference", label_smoothing_factor=0.3, padding_free=True) == [
            f"{start}label_smoothing_factor cannot be set: the DPOTrainer does not read it; set {start}label_smoothing",
            f"{start}padding_free cannot be set: the DPOTrainer pads all the same; take it out",
        ]
        assert told("preference", label_smoothing=0.3) == told("causal-lm", label_smoothing_factor=0.3) == []
        assert told("causal-lm", padding_free=True) == []
        for task in ("causal-lm", "multiple-choice"):
            assert told(task, eos_token="</s>") == [
                f"{start}eos_token cannot be set: examples end before the trainer has them; set it in the model's "
                "tokenizer_config.json"
            ]

    def test_that_take_the_place_of_a_key_stand_without_it(self) -> None:
        given = {"lr_scheduler_type": "polynomial"}
        (told,) = found(TRAINER, given, training={"trainer": given, "schedule": "cosine"})
        assert told == (
            "training.trainer.lr_scheduler_type takes the place of training.schedule, which is cosine: leave one of "
            "them out"
        )
        assert found(TRAINER, given, training={"trainer": given, "schedule": None}) == []

    def test_are_checked_without_a_file_too(self, write: Write) -> None:
        tree = load_recipe(write()).model_dump()
        tree["training"]["trainer"] = {"optmi": "sgd"}
        with pytest.raises(ValidationError, match=r'unknown key "optmi" in "training.trainer".* Did you mean "optim"'):
            complete_recipe().model_validate(tree)


class TestTypes:
    @pytest.mark.parametrize(
        ("key", "given", "expected"),
        [
            (TRAINER, {"adam_beta1": "high"}, 'training.trainer.adam_beta1 must be a number, got "high"'),
            (TRAINER, {"report_to": 5}, "training.trainer.report_to must be text or a list, got 5"),
            (TRAINER, {"fp16": "yes"}, 'training.trainer.fp16 must be true or false, got "yes"'),
            (TRAINER, {"dataloader_num_workers": 1.5},
             "training.trainer.dataloader_num_workers must be an integer, got 1.5"),
            (PEFT, {"layers_to_transform": ["a"]}, 'lora.peft.layers_to_transform must be an integer, got ["a"]'),
            (PEFT, {"rank_pattern": {"query": 0}}, 'lora.peft.rank_pattern must be at least 1, got {"query": 0}'),
            (PEFT, {"init_lora_weights": 3},
             "lora.peft.init_lora_weights must be true or false or gaussian, eva, olora, pissa, pissa_niter_[number of "
             "iters], corda, loftq, orthogonal or mica, got 3"),
            (LOAD, {"device_map": 1.5}, "model.load.device_map must be text or an integer or a mapping, got 1.5"),
            (LOAD, {"max_memory": {"cpu": [1]}},
             'model.load.max_memory must be an integer or text, got {"cpu": [1]}'),
        ],
    )  # fmt: skip
    def test_are_those_of_the_class(self, key: tuple[str, ...], given: dict[str, Any], expected: str) -> None:
        assert found(key, given) == [expected]

    def test_numbers_of_devices_are_numbers_although_keys_of_a_recipe_are_text(self) -> None:
        given = {"max_memory": {"0": "10GiB", "cpu": "30GiB"}, "revision": "0"}
        assert found(LOAD, given) == []
        assert values(LOAD, TASK, given) == {"max_memory": {0: "10GiB", "cpu": "30GiB"}, "revision": "0"}

    def test_what_a_library_gets_it_may_change(self) -> None:
        given = {"accelerator_config": {"gradient_accumulation_kwargs": {"adjust_scheduler": True}}}
        handed = values(TRAINER, TASK, given)
        assert handed == given
        handed["accelerator_config"]["gradient_accumulation_kwargs"]["num_steps"] = 1
        assert given == {"accelerator_config": {"gradient_accumulation_kwargs": {"adjust_scheduler": True}}}


class TestFlags:
    @pytest.mark.parametrize("flag", ["--training.trainer.optim", "--trainer.optim", "--optim"])
    def test_in_full_or_by_any_last_part(self, write: Write, flag: str) -> None:
        assert load_recipe(write(), [flag, "sgd"]).training.trainer == {"optim": "sgd"}

    def test_values_are_yaml(self, write: Write) -> None:
        words = ["--lr_scheduler_kwargs", "{num_cycles: 2}", "--adam-epsilon", "1e-6", "--report_to", "[tensorboard]"]
        found = load_recipe(write(), words).training.trainer
        assert found == {
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "adam_epsilon": 1e-6,
            "report_to": ["tensorboard"],
        }

    def test_are_added_to_what_the_file_says(self, write: Write) -> None:
        path = write("lora:\n  peft:\n    use_rslora: true\n    fan_in_fan_out: false")
        lora = load_recipe(path, ["--use_rslora", "false", "--ensure_weight_tying", "true"]).lora
        assert lora.peft == {"use_rslora": False, "fan_in_fan_out": False, "ensure_weight_tying": True}

    def test_drop_the_key_whose_place_they_take(self, write: Write) -> None:
        path = write("lora:\n  peft:\n    use_rslora: true")
        assert load_recipe(path, ["--schedule", "cosine"]).training.schedule == "cosine"
        path.write_text(CLASSIFICATION.replace("steps: 300", "steps: 300\n  schedule: cosine"), encoding="utf-8")
        training = load_recipe(path, ["--lr_scheduler_type", "polynomial"]).training
        assert (training.schedule, training.trainer) == (None, {"lr_scheduler_type": "polynomial"})

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--optmi", "sgd"], '--optmi: unknown key "optmi". Did you mean "optim"?'),
            (["--training.trainer.max_steps", "3"],
             "--training.trainer.max_steps: training.trainer.max_steps is training.steps in a recipe: set that"),
            (["--deepspeed", "ds.json"],
             "--deepspeed: training.trainer.deepspeed cannot be set: scores of ranks are made of whole gradients and "
             "factors, which DeepSpeed hides; use FSDP2 (accelerate launch --config_file with fsdp_version: 2) or "
             "torchrun"),
            (["--training.trainer.colour", "red"],
             '--training.trainer.colour: unknown key "colour" in "training.trainer", the options of '
             "transformers.TrainingArguments."),
            (["--fp16", "maybe"], '--fp16: training.trainer.fp16 must be true or false, got "maybe"'),
        ],
    )  # fmt: skip
    def test_mistakes_are_named_by_the_flag(self, write: Write, words: list[str], expected: str) -> None:
        assert problems(write(), *words) == [expected]


class TestRecipe:
    def test_keeps_options_when_it_is_written(self, write: Write) -> None:
        written = (
            "lora:\n  peft:\n    rank_pattern: {query: 16, 'layer.1.*key': 2}\n    layers_pattern: null\n"
            "model:\n  name: m\n  load: {token: true, max_memory: {0: 10GiB, cpu: 1}, revision: '1'}\n"
        )
        path = write()
        path.write_text(CLASSIFICATION.replace("model:\n  name: demo:minilm\n", "") + written, encoding="utf-8")
        recipe = load_recipe(path, ["--optim_args", "betas=0.9", "--neftune_noise_alpha", "5", "--run_name", "a b"])
        assert recipe.lora.peft == {"rank_pattern": {"query": 16, "layer.1.*key": 2}, "layers_pattern": None}
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path).model_dump() == recipe.model_dump()

    def test_ranks_by_pattern_may_exceed_the_others(self, write: Write) -> None:
        words = ["--lora.r", "4", "--average_rank", "6"]
        assert (
            "method.budget.average_rank is 6, but no layer can exceed lora.r, which is 4"
            in problems(write(), *words)[0]
        )
        assert load_recipe(write(), [*words, "--rank_pattern", "{query: 16}"]).lora.r == 4

    def test_allora_has_no_scale(self, write: Write) -> None:
        words = ["--method", "{name: allora}", "--lora.alpha", "12"]
        assert problems(write(), *words, "--use_rslora", "true") == [
            "--use_rslora: ALLoRA has no scaling factor: leave lora.peft.use_rslora out"
        ]
        assert load_recipe(write(), [*words, "--use_rslora", "false"]).lora.alpha == 12


def test_a_path_that_names_a_class_is_imported_when_it_is_needed() -> None:
    assert imported("peft.LoraConfig") is peft.LoraConfig
