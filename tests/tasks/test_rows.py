"""Promises: a message points at the row; a split is a partition, seeded, and stratified where asked."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from loralloc.errors import UserError
from loralloc.tasks.rows import Rows, quote, shorten, split

RECORDS = [{"text": "one", "n": 1}, {"text": "two", "n": None}, {"text": " ", "n": 3}]


def rows_of(records: list[dict[str, Any]], source: str = "train.jsonl") -> Rows:
    return Rows(source, ("text", "n"), records, range(1, len(records) + 1))


def numbered(count: int) -> Rows:
    return Rows("train.jsonl", ("n",), [{"n": i} for i in range(count)], range(1, count + 1))


@pytest.fixture(params=["list", "arrow"])
def rows(request: pytest.FixtureRequest) -> Rows:
    records = RECORDS if request.param == "list" else Dataset.from_list(RECORDS)
    return Rows("train.jsonl", ("text", "n"), records, [3, 5, 8])


def test_values_are_read_from_lists_and_from_arrow(rows: Rows) -> None:
    assert rows.values("text", "data.text") == ["one", "two", " "]


def test_selected_rows_keep_their_place(rows: Rows) -> None:
    chosen = rows.select([2, 0])
    assert chosen.values("n", "data.label") == [3, 1]
    assert [chosen.place(i) for i in range(len(chosen))] == ["train.jsonl:8", "train.jsonl:3"]


def test_rows_without_lines_say_row() -> None:
    assert Rows("a.parquet", ("n",), [{"n": 1}], [7], unit="row").place(0) == "a.parquet, row 7"


def test_an_unknown_column_is_named_with_those_that_exist(rows: Rows) -> None:
    message = r'train.jsonl has no column "txt" \(data.text\). Its columns: text, n. Did you mean "text"\?'
    with pytest.raises(UserError, match=message):
        rows.values("txt", "data.text")


def test_a_missing_value_is_refused(rows: Rows) -> None:
    message = r'train.jsonl:5: no value in column "n" \(data.label\): {"text": "two", "n": null}'
    with pytest.raises(UserError, match=message):
        rows.values("n", "data.label")


def test_an_absent_key_is_a_missing_value() -> None:
    with pytest.raises(UserError, match=r'train.jsonl:2: no value in column "n"'):
        rows_of([{"n": 1}, {"text": "x"}]).values("n", "data.label")


def test_text_must_be_text() -> None:
    message = r'train.jsonl:2: column "text" \(data.text\) must hold text, found int 3'
    with pytest.raises(UserError, match=message):
        rows_of([{"text": "x"}, {"text": 3}]).strings("text", "data.text")


def test_blank_text_is_refused_unless_allowed(rows: Rows) -> None:
    with pytest.raises(UserError, match=r'train.jsonl:8: empty text in column "text" \(data.text\): {"text": " "'):
        rows.strings("text", "data.text")
    assert rows.strings("text", "data.text", blank=True)[2] == " "


def test_a_quoted_row_is_short_and_on_one_line() -> None:
    assert len(quote({"text": "x\n" * 500})) == 120
    assert "\n" not in quote({"text": "x\ny"})
    assert shorten("x" * 120) == "x" * 120


@given(
    st.integers(2, 300),
    st.floats(0.01, 0.9),
    st.integers(0, 3),
)
def test_a_split_is_a_partition_of_the_size_asked_for(count: int, fraction: float, seed: int) -> None:
    kept, cut = split(numbered(count), fraction, seed)
    assert sorted(list(kept.numbers) + list(cut.numbers)) == list(range(1, count + 1))
    assert len(cut) == min(max(1, round(fraction * count)), count - 1)
    assert list(cut.numbers) == sorted(cut.numbers)


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=200), st.floats(0.05, 0.6), st.integers(0, 3))
def test_a_stratified_split_gives_every_group_its_share(groups: list[str], fraction: float, seed: int) -> None:
    if set(Counter(groups).values()) == {1}:
        return  # refused: see below
    kept, cut = split(numbered(len(groups)), fraction, seed, groups)
    assert sorted([*kept.numbers, *cut.numbers]) == list(range(1, len(groups) + 1))
    counts = Counter(groups[i - 1] for i in cut.numbers)
    for group, size in Counter(groups).items():
        assert counts[group] < size, "the last row of a group stays"
        assert counts[group] >= min(int(fraction * size), size - 1)
        # Largest remainders: never more than one above the exact share, but for what others cannot give.
        if all(int(fraction * s) + 1 < s for s in Counter(groups).values()):
            assert abs(counts[group] - fraction * size) < 1 + 1e-9 or len(cut) == 1


def test_a_split_depends_on_the_seed_and_on_nothing_else() -> None:
    first, again, other = (split(numbered(50), 0.2, seed)[1].numbers for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_too_few_rows_cannot_be_split() -> None:
    message = r"train.jsonl: 1 rows are too few to cut 0.1 of them off for validation. Give more rows, or name"
    with pytest.raises(UserError, match=message):
        split(numbered(1), 0.1, 0)


def test_groups_of_one_row_cannot_be_split() -> None:
    with pytest.raises(UserError, match=r"train.jsonl: 3 rows with 3 different labels are too few to cut 0.5"):
        split(numbered(3), 0.5, 0, ["a", "b", "c"])
