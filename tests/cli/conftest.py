from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import pytest

from .command import RECIPE, done, examples, save_decoder, save_encoder, save_t5, write_rows


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="session")
def encoder_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of train.jsonl, validation.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, count) in enumerate({"train": 48, "validation": 21, "test": 15}.items()):
        write_rows(folder / f"{name}.jsonl", examples(count, seed))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def write(here: Path, encoder: Path, decoder: Path, encoder_decoder: Path, data: Path) -> Callable[[str], Path]:
    """Writes a recipe into the current directory."""

    def make(text: str = RECIPE) -> Path:
        path = here / "recipe.yaml"
        model = {"task: causal-lm": decoder, "task: seq2seq": encoder_decoder}.get(text.partition("\n")[0], encoder)
        path.write_text(text.format(encoder=model, data=data), encoding="utf-8")
        return path

    return make


@pytest.fixture
def recipe(write: Callable[[str], Path]) -> Path:
    """recipe.yaml in the current directory: AdaLoRA on a small classifier, into ./run."""
    return write(RECIPE)


@pytest.fixture(scope="session")
def kept_run(tmp_path_factory: pytest.TempPathFactory, encoder: Path, data: Path) -> Path:
    """A run of RECIPE with test data that has finished; to be looked at only."""
    folder = tmp_path_factory.mktemp("kept")
    (folder / "recipe.yaml").write_text(RECIPE.format(encoder=encoder, data=data), encoding="utf-8")
    with chdir(folder):
        done("train", "recipe.yaml", "--data.test", data / "test.jsonl")
    return folder / "run"


@pytest.fixture
def run(kept_run: Path, here: Path) -> Path:
    """A run that has finished, in ./run."""
    return Path(shutil.copytree(kept_run, here / "run"))


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figures and no page, which take longer than to train a tiny model."""
    monkeypatch.setattr("loralloc.recipe.run.write_report", lambda folder: folder / "report.html")
