"""Patterns are tried where they can be stopped, and mean what PEFT takes them for."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from loralloc import patterns
from loralloc.patterns import AT_LAYERS, ENDING, SAVED, PatternError, check, fitting

from .sent import quickly

NAMES = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")]
LONG = [*NAMES, "x" * 40]

EXPLODING = ["(x+x+)+y", "(x*)*y", "(x|x)*y", "(x|xx)+y", "(.*)*" * 10 + "y", "(?:(?:x?){500}){500}y", "(?=(x+)+y)x"]
INNOCENT = [
    "q_proj",
    r"model\.layers\.0\.self_attn\.q_proj",
    "layers.1.mlp.up_proj",
    ".*",
    r".*\.(q|up)_proj",
    r"model\.layers\.(0|2)\..*",
    r"layers\.[01]\.\w+\.\w+",
    "(?:x+x+)+",
    "nothing",
    "",
    "q_proj|up_proj",
    r"(?P<a>x)(?P=a)*",
]


@pytest.mark.parametrize("pattern", INNOCENT)
@pytest.mark.parametrize("around", ["{}", ENDING])
def test_the_same_as_the_matcher_of_python(pattern: str, around: str) -> None:
    whole = re.compile(around.replace("{}", pattern))
    assert fitting([pattern], LONG, around) == [[name for name in LONG if whole.fullmatch(name)]]


@settings(max_examples=10)  # each of which starts a process
@given(st.lists(st.sampled_from([*INNOCENT, "(q|k)_proj", "[a-z]+_proj"]), max_size=3))
def test_several_at_once_are_told_apart(several: list[str]) -> None:
    expected = [[name for name in NAMES if re.fullmatch(pattern, name)] for pattern in several]
    assert fitting(several, NAMES) == expected


@pytest.mark.parametrize("pattern", INNOCENT[:-1])
def test_a_key_means_what_peft_takes_it_for(pattern: str) -> None:
    taken = [name for name in NAMES if get_pattern_key([pattern], name) == pattern]
    assert fitting([pattern], NAMES, ENDING) == [taken]


@pytest.mark.parametrize("pattern", EXPLODING)
@pytest.mark.parametrize("around", ["{}", ENDING, SAVED, AT_LAYERS])
def test_one_that_explodes_is_refused_in_less_than_a_second(pattern: str, around: str) -> None:
    start = f'^"{re.escape(pattern)}" takes longer than 0.3 s to compare with the names of 7 modules; write it without'
    with quickly(), pytest.raises(PatternError, match=start):
        check(["fine.*", pattern, "(x+x+)+z"], LONG, around)


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "a{2,1}", r"(?P<a>", "(" * 3000 + ")" * 3000, "a{99999999999}"])
def test_what_is_none_is_refused(pattern: str) -> None:
    shown = pattern if len(pattern) <= 200 else f"{pattern[:197]}..."
    with quickly(), pytest.raises(PatternError, match=rf'^"{re.escape(shown)}" is no regular expression \('):
        fitting(["q_proj", pattern], NAMES)


@pytest.mark.parametrize("pattern", ["a)|(b", "(?i)q_proj", "a)(?:b"])
def test_what_is_none_inside_of_pefts_is_refused(pattern: str) -> None:
    with pytest.raises(PatternError, match="is no regular expression"):
        fitting([pattern], NAMES, ENDING)


def test_names_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.subprocess, "run", lambda *args, **kwargs: pytest.fail("a process was started"))
    names = ["q_proj", r"model\.layers\.0\.mlp\.up_proj", "layers.0.self_attn.q_proj", r"^layers\.0\.mlp\.up_proj"]
    assert [len(fits) for fits in fitting(names, NAMES, ENDING)] == [3, 1, 1, 0]
    with pytest.raises(pytest.fail.Exception, match="a process was started"):
        fitting(["q.*"], NAMES)


def test_too_many_are_refused_before_they_are_compared() -> None:
    with quickly(), pytest.raises(PatternError, match=r"^100,000 patterns for 1,000 modules are too many to compare$"):
        fitting(["a"] * 100_000, ["b"] * 1000)
