"""The plan as a file: what is written is read back, what is no plan is refused in words, no write is half a file."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loralloc.errors import UserError
from loralloc.files import write_atomically
from loralloc.plan import ModuleRank, PlanError, RankPlan

QUERY = "model.layers.0.self_attn.q_proj"


def plan(**changes: Any) -> RankPlan:
    modules = {
        QUERY: ModuleRank(rank=3, start=4, inputs=8, outputs=16, scale=2.0),
        "model.layers.0.mlp.down_proj": ModuleRank(rank=0, start=4, inputs=32, outputs=8, scale=0.5),
    }
    return RankPlan(**{"method": "adalora", "modules": modules, "peak": 8, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ranks.json"


Refuse = Callable[[Any, str], None]


@pytest.fixture
def refuse(path: Path) -> Refuse:
    """Write a text, bytes or an object as JSON; loading it must fail with exactly this message after the path."""

    def refuse(content: Any, message: str) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        with pytest.raises(PlanError) as error:
            RankPlan.load(path)
        assert str(error.value) == f"{path}: {message}"

    return refuse


def with_entry(**changes: Any) -> dict[str, Any]:
    """A written plan of one module, some of its numbers changed."""
    written = plan(modules={QUERY: plan().modules[QUERY]}).to_dict()
    written["modules"][QUERY].update(changes)
    return written


@st.composite
def modules(draw: st.DrawFn) -> ModuleRank:
    inputs, outputs = draw(st.integers(1, 10**6)), draw(st.integers(1, 10**6))
    start = draw(st.integers(0, max(inputs, outputs)))
    scale = draw(st.floats(0, sys.float_info.max, exclude_min=True, exclude_max=True))
    return ModuleRank(draw(st.integers(0, max(inputs, outputs))), start, inputs, outputs, scale)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
plans = st.builds(
    RankPlan,
    method=st.text(),
    modules=st.dictionaries(names, modules(), min_size=1, max_size=5),
    budget=st.dictionaries(st.sampled_from(["average_rank", "parameters", "fraction"]), st.integers(1, 99), max_size=1),
    peak=st.none() | st.integers(0, 10**6),
    provenance=st.dictionaries(st.text(), json_values, max_size=4),
)
usable_plans = plans.filter(lambda plan: plan.total_rank > 0)


class TestCounts:
    def test_ranks_parameters_and_totals(self) -> None:
        assert plan().ranks == {QUERY: 3, "model.layers.0.mlp.down_proj": 0}
        assert plan().total_rank == 3
        assert plan().parameters == 3 * (8 + 16)
        assert plan().start_parameters == 4 * (8 + 16) + 4 * (32 + 8)
        assert plan().modules[QUERY].parameters == 72

    def test_published_accounting(self) -> None:
        """One rank everywhere is 165,888 numbers in DeBERTaV3-base and 540,672 in BART-large."""

        def one_rank(*shapes: tuple[int, int, int]) -> RankPlan:
            kinds = ((i, o) for count, i, o in shapes for _ in range(count))
            return plan(modules={str(n): ModuleRank(1, 1, i, o, 1.0) for n, (i, o) in enumerate(kinds)})

        assert one_rank((48, 768, 768), (12, 768, 3072), (12, 3072, 768)).parameters == 165_888
        assert one_rank((144, 1024, 1024), (24, 1024, 4096), (24, 4096, 1024)).parameters == 540_672

    @given(plans)
    def test_the_written_costs_are_sums_over_the_modules(self, plan: RankPlan) -> None:
        ranks = starts = numbers = start_numbers = 0
        for module in plan.modules.values():
            ranks += module.rank
            starts += module.start
            numbers += module.rank * module.inputs + module.outputs * module.rank
            start_numbers += module.start * module.inputs + module.outputs * module.start
        cost = plan.to_dict()["cost"]
        assert cost["start"] == {"ranks": starts, "parameters": start_numbers}
        assert cost["final"] == {"ranks": ranks, "parameters": numbers}
        assert cost.get("peak", {"ranks": None}) == {"ranks": plan.peak}

    def test_a_peak_that_nobody_knows_is_not_written(self) -> None:
        assert set(plan(peak=None).to_dict()["cost"]) == {"start", "final"}
        assert plan(peak=0).to_dict()["cost"]["peak"] == {"ranks": 0}


class TestRoundTrip:
    @given(usable_plans)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_what_is_saved_is_loaded(self, path: Path, plan: RankPlan) -> None:
        plan.save(path)
        assert RankPlan.load(path) == plan
        assert list(RankPlan.load(path).modules) == list(plan.modules), "in the model's order"

    @given(usable_plans)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_a_loaded_plan_is_saved_to_the_same_bytes(self, tmp_path: Path, plan: RankPlan) -> None:
        plan.save(tmp_path / "one")
        RankPlan.load(tmp_path / "one").save(tmp_path / "two")
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    @pytest.mark.parametrize("peak", [None, 0, 8])
    def test_a_peak_comes_back_and_none_comes_back_as_none(self, path: Path, peak: int | None) -> None:
        plan(peak=peak).save(path)
        assert RankPlan.load(path) == plan(peak=peak)
        assert RankPlan.load(path).peak == peak

    def test_the_file(self, path: Path) -> None:
        plan(budget={"average_rank": 1.5}, provenance={"total_steps": 300}).save(str(path))
        assert json.loads(path.read_text(encoding="utf-8")) == {
            "format": 1,
            "method": "adalora",
            "modules": {
                QUERY: {"rank": 3, "start": 4, "in": 8, "out": 16, "scale": 2.0},
                "model.layers.0.mlp.down_proj": {"rank": 0, "start": 4, "in": 32, "out": 8, "scale": 0.5},
            },
            "budget": {"average_rank": 1.5},
            "cost": {
                "start": {"ranks": 8, "parameters": 256},
                "peak": {"ranks": 8},
                "final": {"ranks": 3, "parameters": 72},
            },
            "provenance": {"total_steps": 300},
        }
        assert path.read_text(encoding="utf-8").endswith("}\n")

    def test_a_plan_written_by_hand_needs_only_its_modules(self, path: Path) -> None:
        entry = {"rank": 2, "start": 2, "in": 4, "out": 4, "scale": 1}
        path.write_text(json.dumps({"format": 1, "modules": {"q": entry}}))
        loaded = RankPlan.load(path)
        assert loaded == RankPlan("", {"q": ModuleRank(2, 2, 4, 4, 1.0)})
        assert isinstance(loaded.modules["q"].scale, float)

    def test_keys_of_later_versions_are_ignored(self, path: Path) -> None:
        path.write_text(json.dumps({**with_entry(note="new"), "later": [1]}))
        assert RankPlan.load(path).ranks == {QUERY: 3}


class TestNotAPlan:
    def test_is_a_mistake_of_the_user(self) -> None:
        assert issubclass(PlanError, UserError)
        assert issubclass(PlanError, ValueError)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError) as error:
            RankPlan.load(tmp_path / "no.json")
        assert str(error.value) == f"{tmp_path / 'no.json'}: cannot read the rank plan (No such file or directory)"
        assert isinstance(error.value.__cause__, FileNotFoundError)

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(PlanError, match=r": cannot read the rank plan \(Is a directory\)$"):
            RankPlan.load(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("", "Expecting value: line 1 column 1 (char 0)"),
            ("ranks: 3", "Expecting value: line 1 column 1 (char 0)"),
            ('{"format": 1', "Expecting ',' delimiter: line 1 column 13 (char 12)"),
            (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ],
    )
    def test_what_is_not_json(self, refuse: Refuse, content: str | bytes, reason: str) -> None:
        refuse(content, f"not JSON ({reason})")

    @pytest.mark.parametrize("content", ["1" * 5000, '{"format": ' + "9" * 5000 + "}"], ids=["number", "format"])
    def test_numbers_too_long_to_read(self, refuse: Refuse, path: Path, content: str) -> None:
        path.write_text(content)
        with pytest.raises(PlanError, match=r": not JSON \(Exceeds the limit"):
            RankPlan.load(path)

    @pytest.mark.parametrize(
        ("content", "found"),
        [
            (None, None),
            (3, None),
            ("plan", None),
            ([], None),
            ([with_entry()], None),
            ({}, None),
            ({"modules": {}}, None),
            ({**with_entry(), "format": 2}, 2),
            ({**with_entry(), "format": 0}, 0),
            ({**with_entry(), "format": "1"}, "1"),
            ({**with_entry(), "format": True}, True),  # equals 1, and is not 1
            ({**with_entry(), "format": 1.0}, 1.0),
            ({**with_entry(), "format": [1]}, [1]),
            ({**with_entry(), "modules": []}, 1),
            ({**with_entry(), "modules": None}, 1),
            ({"format": 1}, 1),
        ],
        ids=lambda content: json.dumps(content)[:32],
    )
    def test_json_of_another_kind(self, refuse: Refuse, content: Any, found: Any) -> None:
        refuse(json.dumps(content), f'not a rank plan: it must have "format": 1 and "modules", got format {found!r}')

    @pytest.mark.parametrize("missing", ["rank", "start", "in", "out", "scale"])
    def test_an_entry_without_a_number(self, refuse: Refuse, missing: str) -> None:
        content = with_entry()
        del content["modules"][QUERY][missing]
        got = content["modules"][QUERY]
        refuse(content, f'module "{QUERY}" needs rank, start, in, out and scale, got {got!r}')

    @pytest.mark.parametrize("entry", [None, 3, 1.5, True, "rank", [], [3, 4, 8, 8, 2.0], {}])
    def test_an_entry_that_is_none(self, refuse: Refuse, entry: Any) -> None:
        content = with_entry()
        content["modules"][QUERY] = entry
        refuse(content, f'module "{QUERY}" needs rank, start, in, out and scale, got {entry!r}')

    @pytest.mark.parametrize(
        "changes",
        [
            {"rank": -1},
            {"rank": 17},  # above the layer
            {"rank": 10**9},
            {"rank": 10**9, "start": 10**9},  # above the layer
            {"start": 17},
            {"rank": -2, "start": -1},
            {"in": -8, "out": -16},
            {"in": 0, "out": 0},
            {"in": 0},
            {"in": -5},
            {"out": 0, "in": 8},
            {"out": -1, "in": 8},
            {"rank": True},
            {"start": True, "rank": 0},
            {"rank": 3.0},
            {"rank": "3"},
            {"rank": None},
            {"in": [8]},
            {"out": 16.0},
            {"rank": float("nan")},
            {"start": float("inf")},
        ],
        ids=str,
    )
    def test_numbers_that_no_layer_can_have(self, refuse: Refuse, changes: dict[str, Any]) -> None:
        content = with_entry(**changes)
        got = ", ".join(f"{key}={content['modules'][QUERY][key]!r}" for key in ("rank", "start", "in", "out"))
        rule = "must have whole numbers with 0 <= rank, start <= max(in, out), got"
        refuse(content, f'module "{QUERY}" {rule} {got}')

    @pytest.mark.parametrize(
        "edge",
        [
            {"rank": 0},
            {"rank": 4},
            {"rank": 16},
            {"start": 2},
            {"start": 16},
            {"rank": 16, "start": 16},
            {"in": 1},
            {"in": 8, "out": 1},
        ],
    )
    def test_the_edges_of_the_rule_are_inside(self, path: Path, edge: dict[str, int]) -> None:
        content = with_entry(**edge)
        content["modules"]["another"] = with_entry()["modules"][QUERY]
        path.write_text(json.dumps(content))
        assert RankPlan.load(path).ranks == {QUERY: edge.get("rank", 3), "another": 3}
        assert RankPlan.load(path).to_dict()["modules"] == content["modules"]

    @pytest.mark.parametrize(
        "scale",
        [math.nan, math.inf, -math.inf, None, True, "2", [2.0], 0, 0.0, -0.0, -1, -2.5, 10**400, -(10**400)],
        ids=lambda scale: str(scale)[:8],
    )
    def test_a_scale_that_is_not_positive_and_finite(self, refuse: Refuse, scale: Any) -> None:
        refuse(
            with_entry(scale=scale), f'the scale of module "{QUERY}" must be a positive finite number, got {scale!r}'
        )

    @pytest.mark.parametrize(
        "scale", [1, 2.0**-1074, 10**300, sys.float_info.max], ids=["whole", "smallest", "large", "largest"]
    )
    def test_any_positive_finite_scale(self, path: Path, scale: float) -> None:
        path.write_text(json.dumps(with_entry(scale=scale)))
        assert RankPlan.load(path).modules[QUERY].scale == float(scale)

    def test_the_first_bad_module_is_named(self, refuse: Refuse) -> None:
        content = plan().to_dict()
        name = "model.layers.0.mlp.down_proj"
        content["modules"][name]["scale"] = "high"
        refuse(content, f"the scale of module \"{name}\" must be a positive finite number, got 'high'")

    @pytest.mark.parametrize("content", [{**with_entry(), "modules": {}}, with_entry(rank=0)], ids=["empty", "closed"])
    def test_a_plan_that_keeps_nothing(self, refuse: Refuse, content: Any) -> None:
        refuse(content, "the plan keeps no rank in any module")

    @pytest.mark.parametrize("value", [None, [], [1], "x", 8, True, 1.5], ids=str)
    @pytest.mark.parametrize("key", ["budget", "cost", "provenance"])
    def test_a_record_of_another_kind(self, refuse: Refuse, key: str, value: Any) -> None:
        refuse({**with_entry(), key: value}, f'"{key}" must be a mapping, got {value!r}')

    BAD_PEAKS = (None, {}, 5, [1], "8", {"ranks": "many"}, {"ranks": True}, {"ranks": 8.0}, {"ranks": [8]})

    @pytest.mark.parametrize("peak", BAD_PEAKS, ids=str)
    def test_a_peak_of_another_kind(self, refuse: Refuse, peak: Any) -> None:
        refuse({**with_entry(), "cost": {"peak": peak}}, f'"cost.peak" must be {{"ranks": N}}, got {peak!r}')

    @pytest.mark.parametrize("key", [QUERY, "rank", "format", "modules", "settings"])
    def test_a_key_that_stands_twice(self, refuse: Refuse, key: str) -> None:
        once = json.dumps({**with_entry(), "provenance": {"settings": {}}})
        assert once.count(f'"{key}": ') == 1
        refuse(once.replace(f'"{key}": ', f'"{key}": 1, "{key}": '), f'"{key}" occurs twice')

    def test_equal_keys_in_different_places_are_no_duplicates(self, path: Path) -> None:
        path.write_text(json.dumps({**with_entry(), "provenance": {"modules": {QUERY: 1, "rank": 2}, "format": 3}}))
        assert RankPlan.load(path).ranks == {QUERY: 3}

    def test_deep_nesting(self, path: Path) -> None:
        path.write_text("[" * 200_000)
        message = f"{path}: not JSON (brackets are nested more than 64 deep)"
        with pytest.raises(PlanError, match=f"^{re.escape(message)}$"):
            RankPlan.load(path)


class TestHostileFiles:
    """Every file is a plan or a PlanError."""

    @given(json_values)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_anything_in_place_of_an_entry(self, path: Path, value: Any) -> None:
        content = with_entry()
        content["modules"][QUERY] = value
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(PlanError, match=f'module "{QUERY}" needs'):
            RankPlan.load(path)

    @given(st.sampled_from(["rank", "start", "in", "out", "scale"]), json_values)
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_anything_in_place_of_a_number(self, path: Path, key: str, value: Any) -> None:
        path.write_text(json.dumps(with_entry(**{key: value})), encoding="utf-8")
        with suppress(PlanError):  # refused, or taken as it is; no other error
            found = RankPlan.load(path).to_dict()["modules"][QUERY][key]
            assert found == (float(value) if key == "scale" else value)


class TestAtomicWrites:
    OLD = "the old file\n"

    def test_replaces_the_old_file_and_leaves_nothing_else(self, path: Path) -> None:
        path.write_text(self.OLD)
        write_atomically(path, "neü\n")
        assert path.read_text(encoding="utf-8") == "neü\n"
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    @pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
    def test_a_failing_write_leaves_the_old_file_whole(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
    ) -> None:
        path.write_text(self.OLD)

        def fail(*args: Any) -> None:
            raise failure

        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(type(failure)):
                plan().save(path)
        assert path.read_text() == self.OLD
        assert os.listdir(path.parent) == [path.name], "nothing is left behind"
        plan().save(path)
        assert RankPlan.load(path) == plan()

    def test_a_plan_that_cannot_be_written_leaves_the_old_file_whole(self, path: Path) -> None:
        path.write_text(self.OLD)
        with pytest.raises(TypeError, match="not JSON serializable"):
            plan(provenance={"settings": object()}).save(path)
        assert path.read_text() == self.OLD
        assert os.listdir(path.parent) == [path.name]

    def test_text_is_on_the_disk_before_it_has_the_name(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The old file must be there until the new one has been flushed in full; then the folder with its name is."""
        path.write_text(self.OLD)
        seen: list[tuple[str, str]] = []
        fsync, replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(("fsync", path.read_text())), fsync(fd))[1])

        def replacing(source: str, target: Path) -> None:
            seen.append(("replace", Path(source).read_text(encoding="utf-8")))
            replace(source, target)

        monkeypatch.setattr(os, "replace", replacing)
        write_atomically(path, "new\n" * 10_000)
        new = "new\n" * 10_000
        assert seen == [("fsync", self.OLD), ("replace", new), ("fsync", new)]

    def test_a_missing_folder_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nowhere"):
            plan().save(tmp_path / "nowhere" / "ranks.json")

    def test_a_name_without_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        plan().save("ranks.json")
        assert RankPlan.load("ranks.json") == plan()

    @pytest.mark.skipif(os.name != "posix", reason="file modes")
    def test_others_may_read_it_as_any_new_file(self, path: Path) -> None:
        before = os.umask(0o022)
        try:
            plan().save(path)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
