"""Promises: what a name or path tells is told from it alone, and what is offered instead is accepted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from loralloc.errors import UserError
from loralloc.tasks import data
from loralloc.tasks.data import read_rows
from loralloc.tasks.locations import HubData, check_source, hub_data, model_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(source: str) -> str:
    with pytest.raises(UserError) as caught:
        check_source(source)
    return str(caught.value)


HUB_NAMES = {
    "nyu-mll/glue": "nyu-mll/glue",
    "nyu-mll/glue/qnli@train": "nyu-mll/glue/qnli@train",
    "imdb": "imdb",
    "owner/name.v2": "owner/name.v2",
    "Hub:imdb": "imdb",
    "hub :imdb": "imdb",
    "hf://datasets/nyu-mll/glue": "nyu-mll/glue",
    "https://huggingface.co/datasets/nyu-mll/glue": "nyu-mll/glue",
    "https://huggingface.co/datasets/nyu-mll/glue/viewer/cola": "nyu-mll/glue",
    "huggingface.co/datasets/nyu-mll/glue": "nyu-mll/glue",
}


@pytest.mark.parametrize("source", HUB_NAMES)
def test_a_hub_name_without_its_mark(source: str) -> None:
    message = told(source)
    assert message == (
        f'{source}: no such file. For a data set of the Hub put hub: before its name: "hub:{HUB_NAMES[source]}".'
    )
    offered = re.findall('"(.*?)"', message)[-1]
    check_source(offered)
    assert hub_data(offered).repository in ("nyu-mll/glue", "imdb", "owner/name.v2")


@pytest.mark.parametrize("source", ["data/train", "./train", "train.docx", "/nowhere/train", "~/train", "a b/c"])
def test_a_path_is_not_taken_for_a_hub_name(source: str, here: Path) -> None:
    (here / "data").mkdir()
    assert told(source) == (
        f"{source}: no such file. A data file ends in .jsonl, .json, .csv, .tsv, .parquet, .txt, each also with .gz; "
        "a data set of the Hub is hub:NAME."
    )


def test_a_file_without_its_extension(here: Path) -> None:
    (here / "train.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert told("train") == 'train: no such file. Did you mean "train.jsonl"?'
    check_source("train.jsonl")


def test_demo_data_without_their_mark() -> None:
    assert told("docstrings") == 'docstrings: no such file. Did you mean "demo:docstrings"?'
    check_source("demo:docstrings")


def test_parts_of_a_hub_name() -> None:
    assert hub_data("hub:nyu-mll/glue/qnli@test") == HubData("nyu-mll/glue", "qnli", "test")
    assert hub_data("hub:imdb") == HubData("imdb", None, "train")


@pytest.mark.parametrize(
    "name", ["hub:google-bert/bert-base-uncased", "https://huggingface.co/google-bert/bert-base-uncased/tree/main"]
)
def test_a_model_with_the_mark_of_data(name: str) -> None:
    with pytest.raises(UserError) as caught:
        model_folder(name)
    message = f'model.name: {name} is not how a model of the Hub is named here: write "google-bert/bert-base-uncased".'
    assert str(caught.value) == message
    assert model_folder("google-bert/bert-base-uncased") is None


CARD = """\
---
configs:
- config_name: first
  data_files: first.csv
- config_name: second
  data_files: second.csv
---
"""


# pandas before 3.1.1 leaves files open that it cannot read
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestHub:
    """`datasets` takes a folder for a data set of the Hub: its own errors, without a network."""

    @pytest.fixture
    def owner(self, here: Path) -> Path:
        folder = here / "owner" / "name"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        for name in ("first", "second"):
            (folder / f"{name}.csv").write_text("text,label\none,x\n", encoding="utf-8")
        return folder

    @pytest.mark.usefixtures("owner")
    def test_a_missing_config_is_named_with_those_there_are(self) -> None:
        with pytest.raises(UserError) as caught:
            read_rows("hub:owner/name@train")
        message = str(caught.value)
        assert "Config name is missing. Please pick one among the available configs: ['first', 'second']" in message
        assert message.endswith("Add one of them to the name: hub:owner/name/CONFIG@train")
        assert read_rows("hub:owner/name/second@train").values("text", "data.text") == ["one"]

    def test_damaged_files(self, owner: Path) -> None:
        (owner / "first.csv").write_bytes(b"text,label\none,x\n\xff\xfe,y\n")
        with pytest.raises(UserError, match=r"hub:owner/name/first cannot be loaded: .*(utf-8|can't decode)"):
            read_rows("hub:owner/name/first")

    def test_rows_that_do_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*_: Any, **__: Any) -> None:
            try:
                raise KeyError("a column")
            except KeyError as error:
                raise data.DatasetsError("An error occurred") from error

        monkeypatch.setattr(data, "load_dataset", load)
        with pytest.raises(UserError, match=r"hub:owner/name cannot be loaded: 'a column'\. HF_HUB_OFFLINE is set"):
            read_rows("hub:owner/name")
