"""Promises: classes are listed with counts; those that differ in spelling only are told, with a cure that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from loralloc.errors import UserError
from loralloc.tasks.base import TaskData
from loralloc.tasks.labels import alike, class_words, warnings
from loralloc.tasks.sequence_classification import prepare

ALIKE = {
    "a blank before": ("pos", " pos"),
    "a blank within": ("a b", "a  b"),
    "a blank that does not break": ("a b", "a\N{NO-BREAK SPACE}b"),
    "nothing to be seen": ("pos", "pos\N{ZERO WIDTH SPACE}"),
    "case": ("Pos", "pos"),
    "sharp s": ("STRASSE", "straße"),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "width": ("\uff11", "1"),
    "zeros after the point": ("1", "1.0"),
    "zeros before": ("7", "007"),
    "a plus": ("1", "+1"),
}
DIFFERENT = [
    ("pos", "neg"),
    ("a b", "ab"),
    ("1", "-1"),
    ("10", "1"),
    ("1.5", "1.05"),
    ("0", "00x"),
    ("12345678901234567890", "12345678901234567891"),
]


@pytest.mark.parametrize("case", ALIKE)
def test_classes_that_differ_in_spelling_only(case: str) -> None:
    first, second = ALIKE[case]
    assert alike({second: 1, "else": 9, first: 2}) == [[first, second]]
    (told,) = warnings({second: 1, "else": 9, first: 2})
    shown = re.match(r"(.+) \(2\), (.+) \(1\) are 2 classes, though they differ in spelling only", told)
    assert shown is not None
    assert shown[1] != shown[2], "the difference can be seen"
    assert re.search("[\u00a0\u200b]", told.partition("data.labels")[0]) is None


@pytest.mark.parametrize("names", DIFFERENT)
def test_classes_that_differ(names: tuple[str, str]) -> None:
    assert alike(dict.fromkeys(names, 1)) == []
    assert warnings(dict.fromkeys(names, 1)) == []


def test_groups_of_more_than_two_and_several_groups() -> None:
    found = alike({"a": 1, "A": 2, " a": 3, "b": 4, "B": 5, "c": 6})
    assert found == [["B", "b"], [" a", "A", "a"]]
    assert alike({" Pos": 3, "pos": 3}) == [["pos", " Pos"]]


def test_few_classes_are_all_named_and_many_are_not() -> None:
    assert class_words({str(i): 9 - i for i in range(9)}).endswith('"7" 2, "8" 1')
    many = class_words({f"class {i}": 1000 - i for i in range(2000)} | {"clas 1": -1001})
    assert many.startswith('"class 0" 1,000, "class 1" 999')
    assert many.endswith('"class 7" 993 and 1,993 more, down to "clas 1" -1,001')
    assert len(many) < 250
    assert class_words({"x" * 500: 3, "y\n": 1}) == f'"{"x" * 37}..." 3, "y\\n" 1'


class TestCure:
    """What the warning says to do, done literally."""

    @pytest.fixture
    def task(
        self, encoder: str, model_section: Callable[..., Any], data_section: Callable[..., Any], write: Any
    ) -> Callable[..., TaskData]:
        def make(rows: list[dict[str, str]], **given: Any) -> TaskData:
            section = data_section(write(rows), text="text", label="label", **given)
            return prepare(model_section(encoder), section, 0)

        return make

    ROWS = [{"text": "a", "label": "pos"}, {"text": "b", "label": "neg"}] * 4 + [{"text": "c", "label": " Pos"}] * 2

    def test_the_classes_are_counted(self, task: Callable[..., TaskData]) -> None:
        prepared = task(self.ROWS, validation=0.2)
        assert list(prepared.classes) == list(prepared.model.config.id2label.values()) == [" Pos", "neg", "pos"]
        assert sum(prepared.classes.values()) == len(prepared.train) == 8
        given = task(self.ROWS, labels=["pos", "neg", " Pos", "never"], validation=0.2)
        assert given.classes == {**prepared.classes, "never": 0}
        assert list(given.classes)[-1] == "never"

    def test_the_list_of_labels_names_the_rows(self, task: Callable[..., TaskData]) -> None:
        (told,) = warnings(task(self.ROWS).classes)
        labels = yaml.safe_load(told[told.index("[") : told.index("]") + 1])
        with pytest.raises(UserError, match=r'train.jsonl:9: label " Pos" is not among data.labels.*mean "pos"'):
            task(self.ROWS, labels=labels)

    def test_written_alike_they_are_one_class(self, task: Callable[..., TaskData]) -> None:
        alike_now = [{**row, "label": row["label"].strip().lower()} for row in self.ROWS]
        prepared = task(alike_now)
        assert list(prepared.classes) == ["neg", "pos"]
        assert warnings(prepared.classes) == []

    def test_no_list_is_offered_that_could_not_be_given(self) -> None:
        assert "data.labels" not in warnings({"pos": 2, " pos": 1})[0]
        assert "data.labels" not in warnings({"pos": 2, " pos": 1} | {f"class {i}": 1 for i in range(50)})[0]

    def test_numbers_to_predict_have_no_classes(self, task: Callable[..., TaskData]) -> None:
        rows = [{"text": "a", "label": "1"}, {"text": "b", "label": "1.0"}] * 4
        assert task(rows, labels="regression").classes == {}
