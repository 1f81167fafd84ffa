"""Sections of a recipe, files of rows, and two tiny models on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import build_tokenizer, save_decoder, save_encoder, save_encoder_decoder

from loralloc.recipe.sections import DataConfig


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a BERT of two layers, without a head, and its tokenizer."""
    tokenizer = build_tokenizer(
        "[CLS] $A [SEP]",
        "[CLS] $A [SEP] $B:1 [SEP]:1",
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )
    return save_encoder(tmp_path_factory.mktemp("encoder"), tokenizer)


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Llama whose tokenizer begins texts with `<s>` and pads with `<unk>`, which texts use too."""
    tokenizer = build_tokenizer("<s> $A", None, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    return save_decoder(tmp_path_factory.mktemp("decoder"), tokenizer)


@pytest.fixture
def model_section() -> Callable[..., Any]:
    """Makes a recipe's model section."""

    def make(name: str, dtype: str = "float32", load_in: str | None = None) -> Any:
        return SimpleNamespace(name=name, dtype=dtype, load_in=load_in, trust_remote_code=False, load={})

    return make


@pytest.fixture
def data_section() -> Callable[..., Any]:
    """Makes a recipe's data section."""

    def make(train: str | Path, **given: Any) -> Any:
        keys = {key: field.get_default() for key, field in DataConfig.model_fields.items()}
        return SimpleNamespace(**{**keys, "validation": 0.25, "max_length": 16, **given, "train": str(train)})

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Iterable[Mapping[str, Any]], str], str]:
    """Writes rows as JSON lines and gives the path."""

    def make(rows: Iterable[Mapping[str, Any]], name: str = "train.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return make


@pytest.fixture(scope="session", params=["t5", "bart"])
def encoder_decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an encoder with a decoder and its tokenizer: a T5, then a BART of 32 positions."""
    return save_encoder_decoder(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a T5 and its tokenizer."""
    return save_encoder_decoder("t5", tmp_path_factory.mktemp("t5"))
