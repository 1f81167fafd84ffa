"""What is compared, and what is refused before anything is loaded or run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from cli.command import LANGUAGE, RECIPE

from loralloc import Budget
from loralloc.compare.cells import check_rows_apart, comparable
from loralloc.compare.grid import Point, capacity, contenders, points, uniform_ranks
from loralloc.errors import UserError
from loralloc.recipe.passthrough import OPTIONS, TO_THE_HUB, TRAINER

from .fabricate import MODULES, SHAPES, cells_of, recipe_for

(TRAINER_OPTIONS,) = (options for options in OPTIONS if options.key == TRAINER)


def told(call: object, *arguments: object) -> str:
    with pytest.raises(UserError) as error:
        call(*arguments)  # type: ignore[operator]
    return str(error.value)


class TestBudgets:
    def test_each_is_one_number_of_parameters_that_of_plain_lora(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--budgets", "[1, 2, {total_rank: 6}, {parameters: 210}, {fraction: 0.75}]")
        one, two, six, some, share = points(recipe, SHAPES)
        per_rank = sum(inputs + outputs for inputs, outputs in MODULES.values())
        assert (one.parameters, one.whole, two.parameters, two.whole) == (per_rank, 1, 2 * per_rank, 2)
        assert (sum(six.ranks), six.whole) == (6, None)
        assert max(six.ranks) - min(six.ranks) == 1
        assert 210 - min(SHAPES.costs) < some.parameters <= 210
        assert share.parameters == 3 * per_rank, "of lora.r, which is 4"
        assert [point.slug for point in (one, two, six)] == ["r1", "r2", "totalrank6"]

    def test_the_recipes_own_by_default(self, tmp_path: Path) -> None:
        (own,) = points(recipe_for(tmp_path), SHAPES)
        assert (own.label, own.whole) == ("average rank 2", 2)

    def test_uniform_ranks_are_those_of_the_control(self) -> None:
        assert uniform_ranks(SHAPES.at(3), Budget(total_rank=4), 4) == [1, 1, 1, 1]
        assert sum(uniform_ranks(SHAPES.at(3), Budget(total_rank=7), 7)) == 7

    def test_bytes_and_shares_of_the_base_are_parameters_too(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--budgets", "[{adapter_bytes: 644}, {share_of_base: 0.032}]")
        size, share = points(recipe, SHAPES)
        assert (size.parameters, share.parameters) == (160, 320)
        assert size.ranks == (1, 1, 1, 1)

    def test_a_cap_is_refused(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--budgets", "[{max_rank: 2}]")
        assert told(points, recipe, SHAPES) == (
            "compare.budgets: max_rank is a cap, and plain LoRA and PEFT's variants have nothing like it; give "
            "average_rank, total_rank, parameters, fraction, adapter_bytes or share_of_base without it"
        )

    def test_two_that_are_the_same_are_refused(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--budgets", "[2, {total_rank: 8}]")
        assert told(points, recipe, SHAPES) == (
            "compare.budgets: total rank 8 and average rank 2 are the same 320 parameters; leave one of them out"
        )

    def test_more_than_a_module_has_dimensions_is_refused(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--budgets", "12")
        assert told(points, recipe, SHAPES) == (
            "compare.budgets: at average rank 12 a layer may get up to rank 24, but layer.0.query has 16 dimensions; "
            "lower the budget or compare.capacity"
        )
        (point,) = points(recipe_for(tmp_path, "--budgets", "12", "--capacity", "1.25"), SHAPES)
        assert point.whole == 12

    def test_capacity_is_the_recipes_ratio_or_the_sections(self, tmp_path: Path) -> None:
        for words, most in (((), 4), (("--capacity", "1.5"), 3), (("--capacity", "1"), 2)):
            recipe = recipe_for(tmp_path, *words)
            (point,) = points(recipe, SHAPES)
            assert capacity(point, recipe) == most

    @pytest.mark.parametrize(
        ("rank", "words", "most"),
        [
            (11, ("--method.budget.average_rank", "11", "--lora.r", "25"), 25),
            (19, ("--method.budget.average_rank", "19", "--lora.r", "21"), 21),
            (50, ("--capacity", "1.1"), 55),
            (7, ("--capacity", "1.1"), 8),
        ],
    )
    def test_rounding_gives_no_rank_on_top(self, tmp_path: Path, rank: int, words: Sequence[str], most: int) -> None:
        assert capacity(Point("made up", "made up", 1, (rank,) * 13), recipe_for(tmp_path, *words)) == most


class TestCells:
    def test_who_competes(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--methods", "[adalora, lora, random, ablora]", "--peers", "[eva]")
        ids = [(one.id, one.kind) for one in contenders(recipe)]
        assert ids == [
            ("lora", "baseline"),
            ("adalora", "method"),
            ("ablora", "method"),
            ("random", "method"),  # it was named
            ("truncate", "control"),
            ("eva", "peer"),
        ]

    def test_every_contender_tries_every_rate_with_every_seed_and_has_the_budget(self, tmp_path: Path) -> None:
        words = ("--methods", "[adalora, ablora, autolora, allora]", "--budgets", "[1, 2]", "--seeds", "2")
        cells = cells_of(recipe_for(tmp_path, *words))
        assert len(cells) == 2 * (1 + 4 + 2 + 3) * 3 * 2
        assert len({cell.name for cell in cells}) == len(cells)
        tried: dict[object, set[object]] = {}
        for cell in cells:
            training, method, lora = cell.recipe.training, cell.recipe.method, cell.recipe.lora
            tried.setdefault((cell.point, cell.contender), set()).add((training.learning_rate, training.seed))
            budget = getattr(method, "budget", None)
            if budget is None:
                assert lora.r == cell.point.whole
            else:
                assert budget.model_dump(exclude_none=True) == {"parameters": cell.point.parameters}
            looks = getattr(method, "validation", None)
            assert looks is None or isinstance(looks, float)
            assert cell.recipe.compare is None
            assert training.eval_every == 2
        assert len({frozenset(found) for found in tried.values()}) == 1
        assert {rate for rate, _ in tried[cells[0].point, cells[0].contender]} == {0.005, 0.01, 0.02}  # type: ignore[misc]

    def test_all_have_the_recipes_scale(self, tmp_path: Path) -> None:
        cells = cells_of(recipe_for(tmp_path, "--methods", "[adalora, ablora, autolora]"))
        for cell in cells:
            divisor = cell.point.average if cell.contender.id == "ablora" else cell.recipe.lora.r
            assert cell.recipe.lora.alpha / divisor == 2

    @pytest.mark.parametrize(
        ("method", "budget", "alpha", "scale"),
        [
            ("ablora\n  validation: 0.1", "average_rank: 2", 8, 4),
            ("ablora\n  validation: 0.1", "total_rank: 10", 5, 2),
            ("ablora\n  validation: 0.1", "max_rank: 2", 8, 4),
            ("allora\n  allocate: ablora\n  validation: 0.1", "average_rank: 2", 2, 1),
            ("allora\n  allocate: adalora", "average_rank: 2", 4, 1),
        ],
    )
    def test_the_recipes_scale_is_what_its_method_makes_of_alpha(
        self, tmp_path: Path, method: str, budget: str, alpha: int, scale: float
    ) -> None:
        text = RECIPE.replace("name: adalora", f"name: {method}").replace("average_rank: 2", budget)
        text = text.replace("alpha: 8", f"alpha: {alpha}").replace("lora:\n", "lora:\n  dropout: 0\n")
        for cell in cells_of(recipe_for(tmp_path, "--budgets", "[1, 2]", text=text)):
            lora, averaged = cell.recipe.lora, "ablora" in cell.recipe.method.model_dump().values()
            assert lora.alpha / (cell.point.average if averaged else lora.r) == scale, cell.name

    def test_allora_has_no_scale_and_no_dropout_whoever_allocates(self, tmp_path: Path) -> None:
        variants = "{mix: {name: allora, allocate: adalora}, shift: {name: allora, allocate: ablora, validation: 0.1}}"
        words = ("--methods", "[allora, mix, shift]", "--variants", variants, "--dropout", "0.1")
        found = {cell.contender.id: cell.recipe.lora for cell in cells_of(recipe_for(tmp_path, *words))}
        assert {name: lora.alpha for name, lora in found.items() if lora.dropout == 0} == {
            "allora": 2,
            "mix": 4,
            "shift": 2,
        }
        assert found["lora"].dropout == found["truncate"].dropout == 0.1

    def test_ranks_at_random_are_drawn_by_the_seed(self, tmp_path: Path) -> None:
        drawn = {
            cell.seed: cell.recipe.method.rank_seed
            for cell in cells_of(recipe_for(tmp_path))
            if cell.contender.id == "random"
        }
        assert drawn == {0: 0, 1: 1, 2: 2}

    def test_the_recipes_own_settings_are_kept(self, tmp_path: Path) -> None:
        cells = cells_of(recipe_for(tmp_path, "--method.importance", "magnitude"))
        assert {cell.recipe.method.importance for cell in cells if cell.contender.id == "adalora"} == {"magnitude"}
        cells = cells_of(recipe_for(tmp_path, "--method.parity", "none"))
        assert {cell.recipe.method.parity for cell in cells if cell.contender.id == "adalora"} == {"none"}

    def test_a_variant_is_its_method_with_other_settings(self, tmp_path: Path) -> None:
        words = ("--methods", "[adalora, published, short]", "--method.importance", "magnitude", "--variants")
        variants = "{published: {name: adalora, parity: none}, short: {name: ablora, rounds: 2}}"
        recipe = recipe_for(tmp_path, *words, variants)
        found = {cell.contender.label: cell for cell in cells_of(recipe) if cell.contender.kind == "method"}
        assert list(found) == ["AdaLoRA", "AdaLoRA, published", "AB-LoRA, short"]
        ours, published, short = (cell.recipe.method for cell in found.values())
        assert published == ours.model_copy(update={"parity": "none"})
        assert (published.importance, short.rounds) == ("magnitude", 2)
        assert {method.budget.parameters for method in (ours, published, short)} == {320}
        assert found["AdaLoRA, published"].name == "r2-published-lr0.02-s2"
        assert found["AB-LoRA, short"].recipe.lora.alpha == 4, "its scale is alpha over the average rank"

    def test_a_variant_has_no_more_right_to_the_validation_data(self, tmp_path: Path) -> None:
        text = RECIPE.replace("name: adalora", "name: ablora\n  validation: validation")
        short, leaky = "short: {name: ablora, rounds: 2}", "leaky: {name: autolora, validation: validation}"
        variants = f"{{{short}, {leaky}}}"
        recipe = recipe_for(tmp_path, "--methods", "[short, leaky]", "--variants", variants, text=text)
        assert told(comparable, recipe) == (
            "compare.variants.leaky.validation: leaky would look at the validation data, on which learning rates are "
            "chosen, and no other method does; set it to a share of the training data, such as 0.1"
        ), "the other one has a share of its own, as its method has"
        comparable(recipe_for(tmp_path, "--methods", "[short]", "--variants", f"{{{short}}}", text=text))
        blind = "{blind: {name: ablora, score: gate, validation: validation}}"
        comparable(recipe_for(tmp_path, "--methods", "[blind]", "--variants", blind, text=text))

    def test_peers_stay_away_where_ranks_are_uneven_and_lora_is_as_even_as_it_can_be(self, tmp_path: Path) -> None:
        cells = cells_of(recipe_for(tmp_path, "--budgets", "1.5"))
        assert not any(cell.contender.kind == "peer" for cell in cells)
        assert {cell.recipe.method.name for cell in cells if cell.contender.kind == "baseline"} == {"uniform"}

    def test_evaluations_of_the_recipe_are_kept(self, tmp_path: Path) -> None:
        assert {cell.recipe.training.eval_every for cell in cells_of(recipe_for(tmp_path, "--eval_every", "5"))} == {5}

    def test_evaluations_at_steps_of_another_kind_are_at_the_same_steps_for_all(self, tmp_path: Path) -> None:
        for strategy in ("epoch", "steps", "no"):
            cells = cells_of(recipe_for(tmp_path, "--eval_strategy", strategy))
            assert {cell.recipe.training.eval_every for cell in cells} == {2}, "ten times in 16 steps"
            assert not any(cell.recipe.training.trainer for cell in cells)

    def test_runs_that_would_share_a_folder_are_refused(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--learning_rates", "[1e-3, 1.0000001e-3]")
        assert told(cells_of, recipe).endswith("lr0.001-s0: two rates or budgets are too close; leave one out")

    def test_no_run_is_compact_since_most_could_not_be(self, tmp_path: Path) -> None:
        compact = {
            cell.contender.id: cell.recipe.training.compact
            for cell in cells_of(recipe_for(tmp_path, "--compact", "true"))
        }
        assert set(compact.values()) == {False}

    def test_epochs_are_the_steps_of_plain_lora_for_all(self, tmp_path: Path) -> None:
        text = RECIPE.replace("steps: 16", "epochs: 3")
        words = ("--methods", "[adalora, ablora, autolora]", "--budgets", "[1, 2]")
        cells = cells_of(recipe_for(tmp_path, *words, text=text))
        assert {cell.contender.id for cell in cells if getattr(cell.recipe.method, "validation", None)} == {
            "ablora",
            "autolora",
        }, "they train on fewer examples"
        assert {(cell.recipe.training.steps, cell.recipe.training.epochs) for cell in cells} == {(SHAPES.steps, None)}

    def test_no_run_is_pushed_to_the_hub(self, tmp_path: Path) -> None:
        given = {"push_to_hub": True, "hub_model_id": "a/b", "hub_private_repo": True, "hub_token": "t"}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value).lower())]
        recipe = recipe_for(tmp_path, *words, "--hub_revision", "main", "--report_to", "tensorboard")
        trainers = [cell.recipe.training.trainer for cell in cells_of(recipe)]
        assert trainers == [{"report_to": "tensorboard"}] * len(trainers)
        allowed = TRAINER_OPTIONS.known(recipe.task).keys() - TRAINER_OPTIONS.refused.keys()
        assert {name for name in allowed if "hub" in name} == {*TO_THE_HUB}, "transformers has another one"


class TestEqualData:
    def test_without_test_data_all_runs_have_the_same_share_of_the_training_rows_to_be_judged_by(
        self, tmp_path: Path
    ) -> None:
        recipe = comparable(recipe_for(tmp_path, "--data.validation", "0.2", test=None))
        assert {cell.recipe.data.test for cell in cells_of(recipe)} == {0.2}
        named = comparable(recipe_for(tmp_path, "--data.validation", "0.2"))
        assert {cell.recipe.data.test for cell in cells_of(named)} == {"test.jsonl"}
        judged_on_validation = comparable(recipe_for(tmp_path, test=None))
        assert {cell.recipe.data.test for cell in cells_of(judged_on_validation)} == {None}

    def test_the_recipes_own_method_looks_at_training_data_as_the_others_do(self, tmp_path: Path) -> None:
        text = RECIPE.replace("name: adalora", "name: ablora\n  validation: validation")
        for words, share in (([], 0.1), (["--method.validation", "0.3"], 0.3)):
            recipe = comparable(recipe_for(tmp_path, *words, text=text))
            (method,) = {cell.recipe.method for cell in cells_of(recipe) if cell.contender.id == "ablora"}
            assert method.validation == share


class TestRefusals:
    def test_a_method_that_keeps_all_ranks_and_a_budget_that_no_whole_rank_has(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--methods", "[adalora, allora]", "--budgets", "1.5")
        assert told(cells_of, recipe) == (
            "allora keeps every rank of lora.r, and no whole rank costs the 224 parameters of average rank 1.5; give "
            "an average rank that is whole, or take allora out of compare.methods"
        )
        assert cells_of(recipe_for(tmp_path, "--methods", "[adalora, allora]", "--budgets", "2"))

    def test_a_method_that_the_task_cannot_have(self, tmp_path: Path) -> None:
        text = LANGUAGE.replace("causal-lm", "preference").replace(
            "  text: text\n", "  prompt: p\n  chosen: c\n  rejected: r\n"
        )
        recipe = recipe_for(tmp_path, "--methods", "autolora", text=text)
        assert told(cells_of, recipe).startswith("AutoLoRA at average rank 2: method.name: autolora learns ranks from")

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--plan", "ranks.json"], "plan: a comparison gives every method the same budget; take the plan out"),
            (
                ["--keep_best", "true", "--eval_every", "4", "--save_every", "4"],
                "training.keep_best: all methods train for the same number of steps, and truncation has no earlier "
                "state with its ranks; take it out",
            ),
            (
                ["--early_stopping", "2", "--eval_every", "4"],
                "training.early_stopping: all methods train for the same number of steps, and truncation has no "
                "earlier state with its ranks; take it out",
            ),
            (
                ["--load_best_model_at_end", "true", "--eval_every", "4", "--save_every", "4"],
                "training.trainer.load_best_model_at_end: all methods train for the same number of steps, and "
                "truncation has no earlier state with its ranks; take it out",
            ),
            (
                ["--lora.peft.use_rslora", "true"],
                "lora.peft.use_rslora: a comparison sets ranks and scale of every run itself; take it out",
            ),
            (
                ["--method.budget.max_rank", "3"],
                "method.budget.max_rank: a comparison converts budgets into parameters, and plain LoRA has nothing "
                "like a cap; take it out",
            ),
            (
                ["--data.test", "data/validation.jsonl"],
                "data.validation and data.test are both data/validation.jsonl: learning rates are chosen on the one, "
                "and the other must not have been looked at; name other data",
            ),
        ],
    )
    def test_what_would_not_be_fair(self, tmp_path: Path, words: list[str], reason: str) -> None:
        named = None if "--data.test" in words else "test.jsonl"
        assert told(comparable, recipe_for(tmp_path, *words, test=named)) == reason
        comparable(recipe_for(tmp_path))

    def test_test_data_that_are_a_copy_of_the_validation_data(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--data.test", "copy.jsonl", test=None)
        one, other = {"rows": 15, "sha256": "one"}, {"rows": 15, "sha256": "other"}
        same = replace(SHAPES, depends_on={"data": {"train": other, "validation": one, "test": dict(one)}})
        assert told(check_rows_apart, recipe, same) == (
            "data.validation, data/validation.jsonl, and data.test, copy.jsonl, have the same rows: learning rates are "
            "chosen on the one, and the other must not have been looked at; name other data"
        )
        for rows in ({"validation": one, "test": other}, {"validation": one}, {"test": one}):
            check_rows_apart(recipe, replace(SHAPES, depends_on={"data": rows}))

    @pytest.mark.parametrize("name", ["training", "validation"])
    def test_test_data_that_have_all_been_seen(self, tmp_path: Path, name: str) -> None:
        recipe = recipe_for(tmp_path)
        assert SHAPES.test is not None
        assert told(check_rows_apart, recipe, replace(SHAPES, repeated={name: SHAPES.test})) == (
            f"data.test, {recipe.data.test}: all {SHAPES.test} rows are among the {name} data, and methods are judged "
            "on rows that they have not seen; name other data"
        )
        check_rows_apart(recipe, replace(SHAPES, repeated={name: SHAPES.test - 1}))

    def test_no_rows_to_judge_by_where_training_data_are_mixed_anew_for_every_seed(self, tmp_path: Path) -> None:
        weights = "[{source: data/train.jsonl, weight: 1}, {source: data/validation.jsonl, weight: 2}]"
        words = ("--data.train", weights, "--data.validation", "0.2")
        assert told(comparable, recipe_for(tmp_path, *words, test=None)) == (
            "data.test: rows to compare methods on cannot be cut off training data that are mixed by weights, others "
            "with every seed; name test data, or a file in data.validation"
        )
        comparable(recipe_for(tmp_path, *words))
        comparable(recipe_for(tmp_path, *words[:2], test=None))

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["--methods", "[]"], "compare.methods must name at least one, got []"),
            (["--learning_rates", "[]"], "compare.learning_rates must name at least one, got []"),
            (["--budgets", "[]"], "compare.budgets must name at least one, got []"),
            (["--seeds", "[]"], "compare.seeds must name at least one, got []"),
            (["--seeds", "0"], "compare.seeds must be a number of seeds, or a list of them, got 0"),
            (["--seeds", "[1, 1]"], "compare.seeds must not name anything twice, got [1, 1]"),
            (
                ["--budgets", "[2, {average_rank: 2}]"],
                'compare.budgets must not name anything twice, got [2, {"average_rank": 2}]',
            ),
            (
                ["--budgets", "[{average_rank: 2, parameters: 3}]"],
                "compare.budgets must be average ranks, or budgets of one key as in method.budget, got "
                '[{"average_rank": 2, "parameters": 3}]',
            ),
            (["--learning_rates", "[0]"], "compare.learning_rates[0] must be above 0, got 0"),
            (["--data.validation", "0"], "data.validation must be"),
        ],
    )
    def test_empty_lists_and_values_that_mean_nothing(self, tmp_path: Path, words: list[str], reason: str) -> None:
        with pytest.raises(UserError) as error:
            recipe_for(tmp_path, *words)
        assert str(error.value).startswith(f"{words[0]}: {reason}")

    def test_methods_that_do_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(UserError) as error:
            recipe_for(tmp_path, "--methods", "[adalora, adalorra]")
        assert str(error.value) == (
            "--methods: compare.methods: there is no method adalorra; there are adalora, ablora, autolora, allora, "
            'uniform, random, depth_linear, truncate or lora. Did you mean "adalora"?'
        )

    @pytest.mark.parametrize(
        ("variants", "reason"),
        [
            (
                "{lora: {name: adalora}}",
                "compare.variants.lora: lora is the name of another contender; rename the variant",
            ),
            (
                "{eva: {name: adalora}}",
                "compare.variants.eva: eva is the name of another contender; rename the variant",
            ),
            (
                "{fast: {warmup: 0.1}}",
                "compare.variants.fast: name its method, as in {name: adalora, parity: none}",
            ),
            ("{fast: {name: lora}}", "compare.variants.fast: there is no method lora; there are adalora, ablora, "),
            (
                "{fast: {name: adalora}}",
                "compare.variants.fast: this variant is not compared; add fast to compare.methods",
            ),
        ],
    )
    def test_variants_of_nothing(self, tmp_path: Path, variants: str, reason: str) -> None:
        with pytest.raises(UserError) as error:
            recipe_for(tmp_path, "--variants", variants)
        assert str(error.value).startswith(f"--variants: {reason}")

    @pytest.mark.parametrize("methods", ["[adalora]", "[adalora, '{}']"])
    @pytest.mark.parametrize("name", ["fast-one", "Fast", "", "8.5"])
    def test_variants_have_names_that_folders_may_have(self, tmp_path: Path, name: str, methods: str) -> None:
        with pytest.raises(UserError) as error:
            recipe_for(tmp_path, "--methods", methods.format(name), "--variants", f"{{'{name}': {{name: adalora}}}}")
        rule = "a variant is named with lower-case letters, digits and _"
        assert f"--variants: compare.variants.{name}: {rule}" in str(error.value).splitlines()
        assert "is not compared" not in str(error.value)

    @pytest.mark.parametrize("setting", ["budget: {average_rank: 1}", "rank_seed: 3"])
    def test_what_a_comparison_sets_itself(self, tmp_path: Path, setting: str) -> None:
        variants = f"{{fast: {{name: random, {setting}}}}}"
        with pytest.raises(UserError) as error:
            recipe_for(tmp_path, "--methods", "[fast]", "--variants", variants)
        name = setting.partition(":")[0]
        assert str(error.value) == (
            f"--variants: compare.variants.fast.{name}: a comparison sets it for every contender; take it out"
        )

    def test_a_variants_settings_are_its_methods(self, tmp_path: Path) -> None:
        recipe = recipe_for(tmp_path, "--methods", "[fast]", "--variants", "{fast: {name: adalora, wormup: 0.1}}")
        assert told(cells_of, recipe).startswith(
            'AdaLoRA, fast at average rank 2: unknown key "wormup" in "method". Did you mean "warmup"?'
        )

    def test_one_learning_rate_and_one_seed_are_allowed(self, tmp_path: Path) -> None:
        cells = cells_of(recipe_for(tmp_path, "--learning_rates", "1e-2", "--seeds", "1"))
        assert len(cells) == 1 + 1 + 2 + 3
