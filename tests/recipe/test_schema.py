from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import ValidationError
from recipe_texts import CLASSIFICATION, LANGUAGE_MODEL, Write, edit, problems

from loralloc.errors import UserError, closest, either
from loralloc.methods.registry import sections
from loralloc.recipe.schema import complete_recipe, load_recipe, recipe_keys
from loralloc.tasks.spec import TASKS

PROMPTED = either(name for name, task in TASKS.items() if "prompt" in task.keys)
"""The tasks that have prompts."""


class TestLoading:
    def test_defaults_fill_what_the_file_leaves_out(self, write: Write) -> None:
        recipe = load_recipe(write(CLASSIFICATION))
        assert recipe.task == "sequence-classification"
        assert isinstance(recipe.method, sections()["adalora"])
        assert (recipe.method.warmup, recipe.method.cooldown, recipe.method.interval) == (0.15, 0.45, None)
        assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (12, 24, "all-linear")
        assert (recipe.training.learning_rate, recipe.training.epochs) == (1e-3, None)
        assert (recipe.data.validation, recipe.data.labels) == (0.1, None)

    def test_a_recipe_cannot_be_changed(self, write: Write) -> None:
        recipe = load_recipe(write(CLASSIFICATION))
        with pytest.raises(ValidationError, match="frozen"):
            recipe.output = "elsewhere"

    @pytest.mark.parametrize(
        ("written", "value"), [("1e-3", 1e-3), ("5E-4", 5e-4), ("1", 1.0), (".5", 0.5), ("2.5e-4", 2.5e-4)]
    )
    def test_numbers_as_people_write_them(self, write: Write, written: str, value: float) -> None:
        recipe = load_recipe(write(edit("steps: 300", f"steps: 300\n  learning_rate: {written}")))
        assert recipe.training.learning_rate == value
        assert isinstance(recipe.training.learning_rate, float)

    def test_yes_and_no_are_labels_not_booleans(self, write: Write) -> None:
        recipe = load_recipe(write(edit("label: label", "label: label\n  labels: [no, yes, off, 010]")))
        assert recipe.data.labels == ["no", "yes", "off", "010"]

    @pytest.mark.parametrize(("written", "value"), [("30", 30), ("0.2", 0.2), ("0", 0), ("0.0", 0.0), ("1", 1)])
    def test_phases_are_steps_or_fractions(self, write: Write, written: str, value: float) -> None:
        recipe = load_recipe(write(edit("name: adalora", f"name: adalora\n  warmup: {written}")))
        assert isinstance(recipe.method, sections()["adalora"])
        assert recipe.method.warmup == value
        assert type(recipe.method.warmup) is type(value)

    @pytest.mark.parametrize("written", ["0.2", "data/validation.csv.gz"])
    def test_validation_is_a_fraction_or_a_path(self, write: Write, written: str) -> None:
        recipe = load_recipe(write(edit("text: sentence", f"text: sentence\n  validation: {written}")))
        assert str(recipe.data.validation) == written

    @pytest.mark.parametrize(
        "columns", ["text: text", "prompt: mr\n  completion: ref", "messages: messages", "text: text\n  label: null"]
    )
    def test_kinds_of_language_model_data(self, write: Write, columns: str) -> None:
        load_recipe(write(edit("text: text", columns, LANGUAGE_MODEL)))

    def test_a_byte_order_mark_and_windows_line_ends(self, write: Write) -> None:
        path = write("")
        path.write_bytes(b"\xef\xbb\xbf" + CLASSIFICATION.replace("\n", "\r\n").encode())
        assert load_recipe(path).output == "runs/a"


class TestErrors:
    @pytest.mark.parametrize(
        ("old", "new", "expected"),
        [
            ("steps: 300", "learning_rat: 1e-3\n  steps: 300",
             'recipe.yaml:13: unknown key "learning_rat" in "training". Did you mean "learning_rate"?'),
            ("output:", "learning_rate: 1e-3\noutput:",
             'recipe.yaml:14: unknown key "learning_rate". Did you mean "training.learning_rate"?'),
            ("steps: 300", "max_steps: 3\n  steps: 300",
             'recipe.yaml:13: unknown key "max_steps" in "training". Did you mean "training.steps"?'),
            ("steps: 300", "colour: red\n  steps: 300", 'recipe.yaml:13: unknown key "colour" in "training".'),
            ("steps: 300", "1: red\n  steps: 300", 'recipe.yaml:13: unknown key "1" in "training".'),
            ("steps: 300", "batch_size: many\n  steps: 300",
             'recipe.yaml:13: training.batch_size must be an integer, got "many"'),
            ("steps: 300", "steps: 12x", 'recipe.yaml:13: training.steps must be an integer, got "12x"'),
            ("steps: 300", 'steps: "300"', 'recipe.yaml:13: training.steps must be an integer, got "300"'),
            ("steps: 300", "steps: 1.5", "recipe.yaml:13: training.steps must be an integer, got 1.5"),
            ("steps: 300", "steps: true", "recipe.yaml:13: training.steps must be an integer, got true"),
            ("steps: 300", "steps: 0", "recipe.yaml:13: training.steps must be at least 1, got 0"),
            ("steps: 300", "steps: 300\n  learning_rate: high",
             'recipe.yaml:14: training.learning_rate must be a number, got "high"'),
            ("steps: 300", "steps: 300\n  learning_rate: 0",
             "recipe.yaml:14: training.learning_rate must be above 0, got 0"),
            ("steps: 300", "steps: 300\n  learning_rate: .inf",
             "recipe.yaml:14: training.learning_rate must be a finite number, got Infinity"),
            ("steps: 300", "steps: 300\n  bf16: yes", 'recipe.yaml:14: training.bf16 must be true or false, got "yes"'),
            ("steps: 300", "steps: 300\n  seed: -1", "recipe.yaml:14: training.seed must be at least 0, got -1"),
            ("steps: 300", "steps: 300\n  batch_size: 99999999999999999999",
             "recipe.yaml:14: training.batch_size must be below 9223372036854775808, got 99999999999999999999"),
            ("steps: 300", "steps: 300\n  schedule: cosin",
             'recipe.yaml:14: training.schedule must be linear, cosine or constant, got "cosin"'),
            ("steps: 300", "steps: 300\n  warmup: 1.0",
             "recipe.yaml:14: training.warmup must be a fraction of the run below 1, such as 0.1, "
             "or a whole number of steps, got 1.0"),
            ("  steps: 300", "  epochs: null",
             "recipe.yaml:12: training needs exactly one of steps, epochs; got none of them"),
            ("steps: 300", "steps: 300\n  epochs: 3",
             "recipe.yaml:14: training needs exactly one of steps, epochs; got steps and epochs"),
            ("average_rank: 8", "{}",
             "recipe.yaml:10: method.budget needs exactly one of average_rank, total_rank, parameters, fraction, "
             "adapter_bytes, share_of_base, or max_rank alone; got none of them"),
            ("average_rank: 8", "total_rank: 8\n    fraction: 0.5",
             "recipe.yaml:12: method.budget needs exactly one of average_rank, total_rank, parameters, fraction, "
             "adapter_bytes, share_of_base, or max_rank alone; got total_rank and fraction"),
            ("average_rank: 8", "share_of_base: 0.1\n    adapter_bytes: 1000\n    max_rank: 4",
             "recipe.yaml:11: method.budget needs exactly one of average_rank, total_rank, parameters, fraction, "
             "adapter_bytes, share_of_base, or max_rank alone; got adapter_bytes and share_of_base"),
            ("average_rank: 8", "share_of_base: 1.5",
             "recipe.yaml:11: method.budget.share_of_base must be at most 1, got 1.5"),
            ("average_rank: 8", "max_rank: 0", "recipe.yaml:11: method.budget.max_rank must be at least 1, got 0"),
            ("average_rank: 8", "average_rank: 8\n    max_rank: 6",
             "recipe.yaml:12: method.budget.max_rank is 6, so average_rank 8 is impossible; raise the one or lower the "
             "other"),
            ("average_rank: 8", "fraction: 1.5", "recipe.yaml:11: method.budget.fraction must be at most 1, got 1.5"),
            ("average_rank: 8", "average_rank: 13",
             "recipe.yaml:11: method.budget.average_rank is 13, but no layer can exceed lora.r, which is 12. "
             "Lower the one or raise the other (AdaLoRA starts at about 1.5 times its target)"),
            ("name: adalora\n  budget:\n    average_rank: 8", "name: ablora\n  budget:\n    average_rank: 12",
             "recipe.yaml:11: method.budget.average_rank is 12 and so is lora.r, the most a layer may get: no rank "
             "could move. Set lora.r to 24 (and lora.alpha as before: the scale is lora.alpha / average_rank)"),
            ("name: adalora", "name: ablora\n  validation: 1.5",
             "recipe.yaml:10: method.validation must be validation (the recipe's validation data), or a fraction to "
             "cut from train, such as 0.1, got 1.5"),
            ("name: adalora", "name: ablora\n  mode: quick",
             'recipe.yaml:10: method.mode must be fast, exact or taylor, got "quick"'),
            ("name: adalora", "name: adalora\n  warmup: 0.6",
             "recipe.yaml:10: method.warmup (0.6) + method.cooldown (0.45) is 1.05 of the run: keep it below 1, "
             "so that the budget can fall in between"),
            ("name: adalora", "name: adalora\n  warmup: 200\n  cooldown: 100",
             "recipe.yaml:11: method.warmup (200) + method.cooldown (100) is 300 of 300 steps: keep it below, "
             "so that the budget can fall in between"),
            ("name: adalora", "name: adalora\n  beta1: 1", "recipe.yaml:10: method.beta1 must be below 1, got 1"),
            ("name: adalora", "name: adalroa",
             f'recipe.yaml:9: method.name must be {either(sections())}, got "adalroa". Did you mean "adalora"?'),
            ("  name: adalora\n", "", 'recipe.yaml:8: missing "name" in "method": the method'),
            ("method:\n  name: adalora\n  budget:\n    average_rank: 8\n", "method: adalora\n",
             'recipe.yaml:8: method must be a mapping of keys, got "adalora"'),
            ("  budget:\n    average_rank: 8\n", "",
             'recipe.yaml:8: missing "budget" in "method": one of average_rank, total_rank, parameters, fraction, '
             "adapter_bytes, share_of_base, with or without max_rank; or max_rank alone"),
            ("name: adalora", "name: lora",
             'recipe.yaml:10: "budget" in "method" does not apply to method lora: remove it'),
            ("output: runs/a", "", 'recipe.yaml: missing "output": folder of the run'),
            ("output: runs/a", "output:", "recipe.yaml:14: output must be text, got null"),
            ("output: runs/a", "output: ''", 'recipe.yaml:14: output must be text that is not empty, got ""'),
            ("output: runs/a", "output: runs/a\nlora: null",
             "recipe.yaml:15: lora must be a mapping of keys, got null"),
            ("output: runs/a", "output: runs/a\nlora: {modules_to_save: [score, 3]}",
             "recipe.yaml:15: lora.modules_to_save[1] must be text, got 3"),
            ("output: runs/a", "output: runs/a\nlora: {modules_to_save: score}",
             'recipe.yaml:15: lora.modules_to_save must be a list, got "score"'),
            ("output: runs/a", "output: runs/a\nlora: {target_modules: []}",
             "recipe.yaml:15: lora.target_modules must be a name or a list of names, got []"),
            ("label: label", "label: label\n  labels: [a, a]",
             "recipe.yaml:8: data.labels must be a list of at least two different labels, or regression, or null, "
             'got ["a", "a"]'),
            ("label: label", "label: label\n  validation: 1",
             "recipe.yaml:8: data.validation must be a fraction between 0 and 1, such as 0.1, or a path, got 1"),
            ("  label: label\n", "", 'recipe.yaml:4: missing "label" in "data": column with the label '
             "(sequence-classification), or with a list of several"),
            ("label: label", "label: label\n  prompt: q",
             f"recipe.yaml:8: data.prompt is for task {PROMPTED}, but the task is sequence-classification"),
            ("task: sequence-classification", "task: classification",
             f'recipe.yaml:1: task must be {either(TASKS)}, got "classification"'),
            ("steps: 300", "steps: 300\n  steps: 400",
             'recipe.yaml:14: "steps" is set twice, first at recipe.yaml:13. Keep one of the two'),
            ("steps: 300", "steps: 300\n  [a, b]: 1", "recipe.yaml:14: a key must be a single word"),
        ],
    )  # fmt: skip
    def test_a_mistake_is_named_with_its_line(self, write: Write, old: str, new: str, expected: str) -> None:
        assert problems(write(edit(old, new))) == [expected]

    @pytest.mark.parametrize(
        ("new", "expected"),
        [
            ("text_pair: other\n  text: text",
             "recipe.yaml:5: data.text_pair is for task sequence-classification, but the task is causal-lm"),
            ("text: text\n  messages: chat",
             "recipe.yaml:6: data needs exactly one of text, prompt with completion, messages for task causal-lm; "
             "got text and messages"),
            ("prompt: q", "recipe.yaml:5: data.prompt needs data.completion as well"),
            ("completion: q", "recipe.yaml:5: data.completion needs data.prompt as well"),
        ],
    )  # fmt: skip
    def test_data_of_language_models(self, write: Write, new: str, expected: str) -> None:
        assert problems(write(edit("text: text", new, LANGUAGE_MODEL))) == [expected]

    def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(self, write: Write) -> None:
        text = edit("name: demo:minilm", "nam: demo:minilm")
        text = edit("steps: 300", "steps: many\n  epochs: 3\n  steps: 4", text)
        text = edit("average_rank: 8", "average_rank: 80", text)
        found = problems(write(text), "--learning-rate", "fast", "--colour", "red")
        assert [line.split(" ")[0] for line in found] == [
            *("recipe.yaml:2:", "recipe.yaml:3:", "recipe.yaml:11:", "recipe.yaml:13:", "recipe.yaml:14:"),
            *("recipe.yaml:15:", "--learning-rate:", "--colour:"),
        ]

    @pytest.mark.parametrize(
        ("value", "rule"), [("eight", 'a number, got "eight"'), ("true", "a number"), (".nan", "a finite number")]
    )
    def test_a_number_of_either_kind_is_refused_once(self, write: Write, value: str, rule: str) -> None:
        with pytest.raises(UserError) as refusal:
            load_recipe(write(edit("average_rank: 8", f"average_rank: {value}")))
        (line,) = str(refusal.value).splitlines()
        assert f"recipe.yaml:11: method.budget.average_rank must be {rule}" in line

    def test_long_values_are_cut(self, write: Write) -> None:
        (line,) = problems(write(edit("steps: 300", f"steps: {'x' * 500}")))
        assert line.startswith('recipe.yaml:13: training.steps must be an integer, got "xxx')
        assert len(line) < 140

    def test_a_number_too_long_for_python(self, write: Write) -> None:
        (line,) = problems(write(edit("steps: 300", f"steps: {'9' * 5000}")))
        assert line.startswith("recipe.yaml:13: training.steps must be an integer, got")


class TestFiles:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("task: causal-lm\nmodel: name: x\n",
             "recipe.yaml:2: not valid YAML: mapping values are not allowed here: 'model: name: x'"),
            ("task: causal-lm\nmodel:\n\tname: x\n",
             "recipe.yaml:3: not valid YAML: found character '\\t' that cannot start any token: 'name: x'"),
            ("a: &x 1\nb: *x\n",
             "recipe.yaml:2: not valid YAML: aliases such as \"*x\" are not supported in recipes: "
             "repeat the value: 'b: *x'"),
            ("a: !!python/name:os.system x\n",
             'recipe.yaml:1: not valid YAML: tags such as "tag:yaml.org,2002:python/name:os.system" are not supported '
             "in recipes: write the plain value: 'a: !!python/name:os.system x'"),
            ("a: 1\nb: \x07\n", "recipe.yaml:2: not valid YAML: it holds a control character"),
            ("", "recipe.yaml:1: a recipe is a mapping of keys such as `task: causal-lm`; the file is empty"),
            ("# nothing\n",
             "recipe.yaml:1: a recipe is a mapping of keys such as `task: causal-lm`; the file is empty"),
            ("- a\n", "recipe.yaml:1: a recipe is a mapping of keys such as `task: causal-lm`; this is not"),
            ("[" * 5000, f"recipe.yaml:1: not valid YAML: nested more than 64 deep: '{'[' * 200}'"),
            ("a: [" + "1," * 10_001,
             f"recipe.yaml:1: not valid YAML: more than 10,000 values: 'a: [{'1,' * 98}'"),
            ("- " * 5000, f"recipe.yaml:1: not valid YAML: nested more than 64 deep: '{'- ' * 100}'"),
            ('a: "b\\0"\n',
             "recipe.yaml:1: not valid YAML: a string has a NUL character, which no path and no name can have: "
             "'a: \"b\\\\0\"'"),
            ('a: "\\ud800"\n',
             "recipe.yaml:1: not valid YAML: a string has half a character (a lone surrogate): 'a: \"\\\\ud800\"'"),
        ],
    )  # fmt: skip
    def test_what_is_no_recipe(self, write: Write, text: str, expected: str) -> None:
        assert problems(write(text)) == [expected]

    def test_two_documents(self, write: Write) -> None:
        (line,) = problems(write("a: 1\n---\nb: 1\n"))
        assert line.startswith("recipe.yaml:2: not valid YAML: but found another document")

    def test_no_such_file(self) -> None:
        expected = "absent.yaml: there is no such file. `loralloc init` lists recipes to start from"
        assert problems(Path("absent.yaml")) == [expected]

    def test_a_folder(self, tmp_path: Path) -> None:
        assert problems(tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]

    def test_not_utf8(self, write: Write) -> None:
        path = write("")
        path.write_bytes("output: café".encode("latin-1"))
        assert problems(path) == ["recipe.yaml: is not UTF-8 text (byte 11); save it as UTF-8"]


class TestOverrides:
    @pytest.mark.parametrize(
        "words",
        [
            ("--training.learning_rate", "5e-4"),
            ("--training.learning_rate=5e-4",),
            ("--training.learning-rate", "5e-4"),
            ("--learning_rate", "5e-4"),
            ("--learning-rate=5e-4",),
            ("--learning-rate", "1", "--learning-rate", "5e-4"),
        ],
    )
    def test_ways_to_write_a_flag(self, write: Write, words: tuple[str, ...]) -> None:
        assert load_recipe(write(CLASSIFICATION), words).training.learning_rate == 5e-4

    def test_flags_win_over_the_file_and_the_rest_stays(self, write: Write) -> None:
        path = write(CLASSIFICATION)
        changed, plain = load_recipe(path, ["--output", "runs/b", "--lora.r", "16"]), load_recipe(path)
        assert (changed.output, changed.lora.r) == ("runs/b", 16)
        undone = {"output": "runs/a", "lora": plain.lora.model_dump()}
        assert complete_recipe().model_validate(changed.model_dump() | undone) == plain

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
            ("q_proj", "q_proj"),
            ("'[qv]_proj'", "[qv]_proj"),
            (".*: #1", ".*: #1"),
            ("--", "--"),
        ],
    )
    def test_values_are_yaml_but_text_stays_as_typed(self, write: Write, text: str, value: object) -> None:
        assert load_recipe(write(CLASSIFICATION), [f"--target_modules={text}"]).lora.target_modules == value

    def test_null_unsets(self, write: Write) -> None:
        path = write(edit("text: sentence", "text: sentence\n  test: data/test.jsonl"))
        assert load_recipe(path, ["--data.test", "null"]).data.test is None

    def test_a_whole_section(self, write: Write) -> None:
        recipe = load_recipe(write(CLASSIFICATION), ["--method", "{name: lora}", "--lora", "{r: 8, alpha: 16}"])
        assert (recipe.method.name, recipe.lora.r, recipe.lora.alpha) == ("lora", 8, 16)

    def test_an_exclusive_key_replaces_the_one_in_the_file(self, write: Write) -> None:
        recipe = load_recipe(write(CLASSIFICATION), ["--fraction", "0.5", "--epochs", "3"])
        assert isinstance(recipe.method, sections()["adalora"])
        assert recipe.method.budget.model_dump(exclude_none=True) == {"fraction": 0.5}
        assert (recipe.training.epochs, recipe.training.steps) == (3, None)

    @pytest.mark.parametrize("chosen", [[], ["--method", "{name: ablora}", "--method.name", "lora"]])
    def test_a_last_part_means_no_key_that_the_method_lacks(self, write: Write, chosen: list[str]) -> None:
        recipe = load_recipe(write(CLASSIFICATION), ["--validation", "0.3", *chosen])
        assert recipe.data.validation == 0.3
        if chosen:
            assert load_recipe(write(CLASSIFICATION), ["--warmup", "3", *chosen]).training.warmup == 3
        told = problems(write(CLASSIFICATION), "--validation", "0.3", "--method", "{name: ablora}")
        assert told[0].startswith('--validation: "validation" could mean --data.validation, --method.validation: write')

    def test_null_replaces_nothing(self, write: Write) -> None:
        assert load_recipe(write(CLASSIFICATION), ["--epochs", "null"]).training.steps == 300

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            (["--training.batch_size", "many"],
             '--training.batch_size: training.batch_size must be an integer, got "many"'),
            (["--batch-size=0"], "--batch-size: training.batch_size must be at least 1, got 0"),
            (["--learning_rat", "1"], '--learning_rat: unknown key "learning_rat". Did you mean "learning_rate"?'),
            (["--training.step", "1"], '--training.step: unknown key "training.step". Did you mean "training.steps"?'),
            (["--lr", "1"], '--lr: unknown key "lr". Did you mean "training.learning_rate"?'),
            (["--colour", "1"], '--colour: unknown key "colour".'),
            (["--name", "x"], '--name: "name" could mean --model.name, --method.name: write one of these'),
            (["--warmup=1"], '--warmup: "warmup" could mean --method.warmup, --training.warmup: write one of these'),
            (["--output", "r\udcff"],
             "--output: output must be Unicode text; in a shell of another encoding, set LC_ALL=C.UTF-8, got "
             '"r\udcff"'),
            (["--rounds", "3"], '--rounds: "rounds" in "method" does not apply to method adalora: remove it'),
            (["--bf16"], "--bf16: needs a value: --bf16 VALUE"),
            (["--bf16", "--seed", "1"], "--bf16: needs a value: --bf16 VALUE"),
            (["seed", "--seed", "1"], "seed: an override is written --key value"),
            (["--target_modules", "[a"],
             "--target_modules: a value that opens a bracket or a quote must be YAML, got [a. "
             "Text needs two pairs of quotes: '\"[ab].*\"'"),
            (["--lora", "{r: 1, r: 2}"],
             "--lora: a value that opens a bracket or a quote must be YAML, got {r: 1, r: 2}. "
             "Text needs two pairs of quotes: '\"[ab].*\"'"),
            (["--steps", "3", "--epochs", "3"],
             "--epochs: training needs exactly one of steps, epochs; got steps and epochs"),
            (["--average_rank", "20"],
             "--average_rank: method.budget.average_rank is 20, but no layer can exceed lora.r, which is 12. "
             "Lower the one or raise the other (AdaLoRA starts at about 1.5 times its target)"),
            (["--method.name", "lora"],
             'recipe.yaml:10: "budget" in "method" does not apply to method lora: remove it'),
        ],
    )  # fmt: skip
    def test_mistakes_are_named_by_the_flag(self, write: Write, words: list[str], expected: str) -> None:
        assert expected in problems(write(CLASSIFICATION), *words)

    def test_a_flag_below_something_that_is_no_section(self, write: Write) -> None:
        path = write(edit("model:\n  name: demo:minilm", "model: demo:minilm"))
        assert problems(path, "--model.dtype", "auto") == [
            'recipe.yaml:2: model must be a mapping of keys, got "demo:minilm"'
        ]


class TestMarker:
    """What YAML makes of `after: ####`."""

    WRITTEN = LANGUAGE_MODEL + "evaluate:\n  generate:\n    metrics: [exact_match]\n    after: "

    @pytest.mark.parametrize("value", ["####", "", "null"])
    def test_that_is_a_comment_is_refused(self, value: str, write: Write) -> None:
        assert problems(write(self.WRITTEN + value)) == [
            'recipe.yaml:12: evaluate.generate.after has no value: # begins a comment; quote the marker, as in "####", '
            "or take the key out"
        ]

    def test_that_is_quoted_is_taken_and_a_flag_takes_it_back(self, write: Write) -> None:
        path = write(self.WRITTEN + '"####"')
        for words, marker in (((), "####"), (("--evaluate.generate.after", "null"), None)):
            settings = load_recipe(path, words).evaluate.generate
            assert settings is not None
            assert settings.after == marker


class TestModels:
    def test_rules_hold_without_a_file(self, write: Write) -> None:
        tree = load_recipe(write(CLASSIFICATION)).model_dump()
        tree["lora"]["r"] = 4
        with pytest.raises(ValidationError, match=r"average_rank is 8, but no layer can exceed lora\.r, which is 4"):
            complete_recipe().model_validate(tree)

    def test_every_key_is_described(self) -> None:
        assert {key for key, text in recipe_keys().items() if not text} == set()
        assert {"method.budget.average_rank", "training.steps", "lora.r"} <= set(recipe_keys())

    def test_methods_are_found_by_name(self) -> None:
        assert {
            "ablora",
            "adalora",
            "allora",
            "autolora",
            "uniform",
            "random",
            "depth_linear",
            "truncate",
            "lora",
        } <= set(sections())
        assert all(made.model_fields["name"].annotation == Literal[name] for name, made in sections().items())

    def test_imports_no_torch(self) -> None:
        code = (
            "import sys, loralloc.recipe.schema, loralloc.recipes\n"
            "assert not {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_closest() -> None:
    assert closest("adalroa", ["adalora", "lora"]) == ' Did you mean "adalora"?'
    assert closest("xyz", ["adalora", "lora"]) == ""
