"""What the page on exports says of PEFT and of servers: loading, swapping and merging, and the line for vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from exports import AUTO, adapted, saved_base
from models import cycled_ranks, logits, set_ranks
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor

from loralloc import export_adapter
from loralloc.adapter.export import Export, Profile

PAGE = Path(__file__).resolve().parents[2] / "docs" / "export.md"


def exported(folder: Path, profile: Profile, *ranks: int) -> Tensor:
    """Export an adapter with these ranks, in turn; returns what the model computes."""
    model = adapted("llama")
    if ranks:
        set_ranks(model, cycled_ranks(model, *ranks))
    export_adapter(model, folder, profile)
    return logits(model.eval())


def fresh_base() -> torch.nn.Module:
    return AUTO["llama"].from_pretrained(saved_base("llama")).eval()


def test_swapping_uniform_adapters_gives_what_each_was_trained_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = exported(tmp_path / "first", "uniform", 3, 0, 1, 4)
    second = exported(tmp_path / "second", "uniform", 1, 4, 0)
    base = fresh_base()

    model = PeftModel.from_pretrained(base, "first")
    before = logits(model)
    hotswap_adapter(model, "second", adapter_name="default")

    torch.testing.assert_close(before, first, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model), second, rtol=0, atol=1e-5)
    assert (first - second).abs().max() > 1e-2


def test_swapping_to_a_ragged_adapter_fails(tmp_path: Path) -> None:
    exported(tmp_path / "first", "ragged", 3, 0, 1, 4)
    exported(tmp_path / "second", "ragged", 1, 4, 0)
    model = PeftModel.from_pretrained(fresh_base(), tmp_path / "first")
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default")


def test_merging_by_peft_gives_what_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = exported(tmp_path / "adapter", "ragged", 3, 0, 1)
    base = fresh_base()

    model = PeftModel.from_pretrained(base, "adapter")
    merged = model.merge_and_unload()

    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize("profile", ["ragged", "uniform", "merged"])
def test_the_lines_for_vllm_are_those_that_an_export_prints(profile: Profile) -> None:
    ranks = {"q_proj": 12, "v_proj": 3}
    export = Export(Path("ADAPTER" if profile != "merged" else "MODEL"), profile, ranks, 0.0, 1.0, base="BASE")
    (line,) = export.serving
    command = line.partition("   #")[0]
    shown = re.findall(r"^vllm .*?(?=\s+#|$)", PAGE.read_text(encoding="utf-8"), re.M)
    assert command in shown
