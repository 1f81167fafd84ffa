"""Adapters cut down from their folder: what stock PEFT loads afterwards, and what is refused.

1. The result is the best approximation: per module Eckart and Young, over all modules one threshold.
2. Stock PEFT loads it, whatever the source spelled its scales with; heads come along.
3. Everything that is not plain LoRA, or would overwrite something, ends with one message and exit code 2.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.command import done, files, refused
from exports import AUTO, adapted, config_of, saved_base, stored
from models import cycled_ranks, logits, lora_config, lora_layers, set_ranks, tiny_llama, tiny_peft, train_adapter
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralloc import AdaLoRA, Budget, RankPlan, UserError, attach, export_adapter, truncate_adapter
from loralloc.adapter.folders import RECORD

SCALES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3, "v_proj": 7}},
}


def updates(model: PeftModel) -> dict[str, Tensor]:
    """ΔW of every module, formed in full."""
    return {
        name: layer.scaling["default"]
        * (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach().double()
        for name, layer in lora_layers(model).items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Callable[..., tuple[PeftModel, Path]]:
    def make(name: str = "llama", **settings: Any) -> tuple[PeftModel, Path]:
        model = adapted(name, **settings)
        model.save_pretrained(str(tmp_path / "source"))
        return model, tmp_path / "source"

    return make


def reload(name: str, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(AUTO[name].from_pretrained(saved_base(name)), str(folder)).eval()


@pytest.mark.parametrize("scales", SCALES)
def test_the_copy_is_the_best_approximation_under_one_threshold(scales: str, source, tmp_path: Path) -> None:
    model, folder = source(**SCALES[scales])
    wanted = updates(model)
    result = truncate_adapter(folder, tmp_path / "small", Budget(total_rank=9))
    found, plan = updates(reload("llama", tmp_path / "small")), result.plan
    spectra = {name: torch.linalg.svdvals(delta) for name, delta in wanted.items()}
    threshold = torch.cat(list(spectra.values())).sort(descending=True).values[8]
    assert plan.ranks == {name: int((sigma >= threshold).sum()) for name, sigma in spectra.items()}
    assert plan.total_rank == 9
    for name, delta in wanted.items():
        U, sigma, Vt = torch.linalg.svd(delta, full_matrices=False)
        k = plan.ranks[name]
        best = (U[:, :k] * sigma[:k]) @ Vt[:k]
        torch.testing.assert_close(found.get(name, torch.zeros_like(delta)), best, rtol=0, atol=1e-6)
    energy = sum(float(sigma.square().sum()) for sigma in spectra.values())
    kept = sum(float(sigma[: plan.ranks[name]].square().sum()) for name, sigma in spectra.items())
    assert result.kept == pytest.approx(kept / energy, rel=1e-6)
    assert plan.modules["model.layers.0.self_attn.v_proj"].scale == pytest.approx(
        lora_layers(model)["model.layers.0.self_attn.v_proj"].scaling["default"]
    )


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_with_every_rank_it_computes_the_same_heads_included(name: str, source, tmp_path: Path) -> None:
    model, folder = source(name)
    truncate_adapter(folder, tmp_path / "small", Budget(average_rank=4))
    expected = logits(model)
    assert (logits(reload(name, tmp_path / "small")) - expected).abs().max() < 1e-5
    truncate_adapter(folder, tmp_path / "small", Budget(average_rank=1))  # our own export is replaced
    assert (logits(reload(name, tmp_path / "small")) - expected).abs().max() > 1e-3


def test_no_choice_under_a_budget_in_parameters_keeps_more_of_the_squared_norm(source, tmp_path: Path) -> None:
    model, folder = source()
    result = truncate_adapter(folder, tmp_path / "small", Budget(parameters=400))
    plan = result.plan
    costs = {name: module.inputs + module.outputs for name, module in plan.modules.items()}
    left = 400 - plan.parameters
    assert 0 <= left < min(costs[name] for name, module in plan.modules.items() if module.rank < module.start)
    spectra = {name: torch.linalg.svdvals(delta)[:4].square() for name, delta in updates(model).items()}
    best = {0: 0.0}  # by what is spent, after each module
    for name, squares in spectra.items():
        more: dict[int, float] = {}
        for spent, energy in best.items():
            for rank in range(5):
                paid = spent + rank * costs[name]
                if paid <= 400:
                    more[paid] = max(more.get(paid, 0.0), energy + float(squares[:rank].sum()))
        best = more
    whole = sum(float(squares.sum()) for squares in spectra.values())
    assert result.kept == pytest.approx(max(best.values()) / whole, rel=1e-6)


NARROW: dict[str, Callable[[str], bool]] = {
    "nothing": lambda key: False,
    "the first layer": lambda key: "layer.0" in key,
    "A": lambda key: "lora_A" in key,
    "everything": lambda key: True,
}
"""Factors that are stored in bfloat16."""


def factor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of the factors of each module, as they stand in the file."""
    found: dict[str, int] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        if ".lora_" in key:
            name = key.partition(".lora_")[0].removeprefix("base_model.model.")
            found[name] = found.get(name, 0) + tensor.numel() * tensor.element_size()
    return found


@pytest.mark.parametrize("narrow", NARROW)
def test_a_budget_in_bytes_is_what_the_file_holds(narrow: str, source, tmp_path: Path) -> None:
    """Whatever the dtypes, which stay: never above, and no further rank fits. The head is not counted."""
    _, folder = source("bert")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if ".lora_" in key and NARROW[narrow](key)]:
        tensors[key] = tensors[key].bfloat16()
    save_file(tensors, file)
    start = factor_bytes(folder)
    most = sum(start.values()) // 3
    plan = truncate_adapter(folder, tmp_path / "small", Budget(adapter_bytes=most)).plan
    assert plan.budget == {"adapter_bytes": most}
    kept = factor_bytes(tmp_path / "small")
    assert kept == {name: start[name] * rank // 4 for name, rank in plan.ranks.items() if rank}
    left = most - sum(kept.values())
    assert 0 <= left < min(start[name] // 4 for name, rank in plan.ranks.items() if rank < 4)


def test_no_module_keeps_more_than_max_rank(source, tmp_path: Path) -> None:
    _, folder = source()
    free = truncate_adapter(folder, tmp_path / "free", Budget(total_rank=5)).plan
    capped = truncate_adapter(folder, tmp_path / "small", Budget(total_rank=5, max_rank=1)).plan
    assert max(free.ranks.values()) > 1 == max(capped.ranks.values())
    assert capped.total_rank == 5
    assert config_of(tmp_path / "small")["r"] == 1
    done("truncate", folder, "--max_rank", 1, "--output", tmp_path / "alone")
    assert RankPlan.load(tmp_path / "alone" / "ranks.json").ranks == dict.fromkeys(free.ranks, 1)
    done("truncate", folder, "--adapter_bytes", 900, "--max_rank", 1, "--output", tmp_path / "both")
    assert RankPlan.load(tmp_path / "both" / "ranks.json").budget == {"adapter_bytes": 900, "max_rank": 1}
    assert 0 < sum(factor_bytes(tmp_path / "both").values()) <= 900


def test_a_share_of_the_base_model_is_refused_with_what_to_give_instead(source, tmp_path: Path) -> None:
    _, folder = source()
    with pytest.raises(UserError, match=r"which an adapter's folder does not hold; give parameters or adapter_bytes"):
        truncate_adapter(folder, tmp_path / "small", Budget(share_of_base=0.01))
    assert not (tmp_path / "small").exists()


def test_the_folder_is_a_plain_ragged_adapter_with_its_plan(source, tmp_path: Path) -> None:
    _, folder = source()
    plan = truncate_adapter(folder, tmp_path / "small", Budget(total_rank=3)).plan
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ranks.json",
        "loralloc_export.json",
    }
    assert RankPlan.load(tmp_path / "small" / "ranks.json").to_dict() == plan.to_dict()
    assert (plan.method, plan.budget, plan.peak) == ("truncate", {"total_rank": 3}, 24)
    factors = stored(tmp_path / "small")
    assert {name: len(A) for name, (A, _) in factors.items()} == {n: r for n, r in plan.ranks.items() if r}
    config = config_of(tmp_path / "small")
    assert config["alpha_pattern"] == {}
    assert config["inference_mode"]
    assert {name for name, rank in plan.ranks.items() if not rank} <= set(config["exclude_modules"])
    for A, B in factors.values():  # balanced: both carry the root of the singular values
        assert torch.allclose((A @ A.T).diagonal() / (A @ A.T).diagonal()[0], (B.T @ B).diagonal() / (B.T @ B)[0, 0])


def test_a_module_with_more_ranks_than_dimensions_has_no_more_singular_values(source, tmp_path: Path) -> None:
    model, folder = source(rank_pattern={"v_proj": 12}, alpha_pattern={"v_proj": 18})  # v_proj has 8 outputs
    plan = truncate_adapter(folder, tmp_path / "small", Budget(fraction=1.0)).plan
    assert plan.ranks["model.layers.0.self_attn.v_proj"] == 8
    assert (logits(reload("llama", tmp_path / "small")) - logits(model)).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own about output layers
@pytest.mark.parametrize("kept", [False, True])
def test_an_output_layer_may_keep_no_rank(kept: bool, tmp_path: Path) -> None:
    """PEFT saves the layer itself beside its factors, and finds no place for it where there is no adapter."""
    base = tiny_llama()
    base.lm_head = nn.Linear(base.config.hidden_size, base.config.vocab_size)
    model = get_peft_model(copy.deepcopy(base), lora_config("llama", target_modules=["q_proj", "lm_head"])).eval()
    train_adapter(model)
    set_ranks(model, {name: 2 if kept or name != "lm_head" else 0 for name in lora_layers(model)})
    model.save_pretrained(str(tmp_path / "source"))
    total = 2 * len(lora_layers(model)) - 2 * (not kept)
    truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(total_rank=total))
    export_adapter(model, tmp_path / "export")
    for folder in (tmp_path / "small", tmp_path / "export"):
        stock = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
        assert set(load_file(folder / "adapter_model.safetensors")) == set(get_peft_model_state_dict(stock))
        assert ("lm_head" in lora_layers(stock)) is kept
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_keeps_its_number_of_ranks(tmp_path: Path) -> None:
    tiny_peft("llama").save_pretrained(str(tmp_path / "source"))
    result = truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(total_rank=7))
    assert result.plan.total_rank == 7
    assert result.kept == 1.0
    assert (logits(reload("llama", tmp_path / "small")) - logits(tiny_peft("llama").unload())).abs().max() == 0


def test_what_an_allocation_exported_can_be_cut_further(tmp_path: Path) -> None:
    model = tiny_peft("llama")
    run = attach(model, AdaLoRA(Budget(average_rank=2)), 10)
    run.finish()
    train_adapter(model)
    export_adapter(model, tmp_path / "source")
    plan = truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(fraction=0.5)).plan
    assert plan.parameters <= plan.start_parameters / 2
    assert (logits(reload("llama", tmp_path / "small")) - logits(model)).abs().max() > 0


# ---- From the shell ----


def test_the_command_writes_the_same_folder(source, tmp_path: Path) -> None:
    _, folder = source()
    said = done("truncate", folder, "--average_rank", 1.5, "--output", tmp_path / "shell")
    truncate_adapter(folder, tmp_path / "python", Budget(average_rank=1.5))
    assert files(tmp_path / "shell") == files(tmp_path / "python")
    assert "ranks   9 of 24 over the 6 modules that have a rank" in said
    assert "of the updates' squared norm" in said


def test_an_average_is_over_all_modules_of_an_export(tmp_path: Path) -> None:
    """As `loralloc frontier` and the report count; where nothing records the others, the output says so."""
    model = tiny_peft("llama", trained=True)
    set_ranks(model, cycled_ranks(model, 4, 0, 3))
    count = len(lora_layers(model))
    export_adapter(model, tmp_path / "source")
    said = done("truncate", tmp_path / "source", "--average_rank", 1, "--output", tmp_path / "small")
    assert f"ranks   {count} of " in said
    assert f" over {count} modules\n" in said
    result = truncate_adapter(tmp_path / "small", tmp_path / "smaller", Budget(average_rank=0.5))
    assert (result.plan.total_rank, result.modules) == (count // 2, count)
    (tmp_path / "small" / RECORD).unlink()
    result = truncate_adapter(tmp_path / "small", tmp_path / "smaller", Budget(average_rank=0.5))
    stored = len(result.plan.modules)
    assert stored < count
    assert (result.plan.total_rank, result.modules) == (stored // 2, None)


def test_a_record_of_another_adapter_counts_nothing(tmp_path: Path) -> None:
    model = tiny_peft("llama", trained=True)
    export_adapter(model, tmp_path / "source")
    record = tmp_path / "source" / RECORD
    record.write_text(json.dumps({**json.loads(record.read_text(encoding="utf-8")), "ranks": {"a": 1}}))
    assert truncate_adapter(tmp_path / "source", tmp_path / "small", Budget(average_rank=1)).modules is None


def _drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _configure(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def _tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _break_first(tensors: dict[str, Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def _pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _prompt_tuning(folder: Path) -> None:
    shutil.rmtree(folder)
    model = tiny_peft("llama").unload()
    get_peft_model(model, IA3Config(target_modules=["v_proj"], feedforward_modules=[])).save_pretrained(str(folder))  # type: ignore[arg-type]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no config": (lambda f: _drop(f, "adapter_config.json"), "is no adapter: it has no adapter_config.json"),
    "no weights": (lambda f: _drop(f, "adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "a pickle": (_pickle, "convert adapter_model.bin, a pickle, with PEFT's save_pretrained"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "is no config of PEFT"),
    "no mapping": (lambda f: (f / "adapter_config.json").write_text("[]"), "is no config of PEFT"),
    "not LoRA": (_prompt_tuning, "is an adapter of type IA3: only LoRA can be read"),
    "DoRA": (
        lambda f: _configure(f, use_dora=True),
        "is no plain LoRA, which alone can be truncated: use_dora makes the update more, or other, than B·A",
    ),
    "changed base": (lambda f: _configure(f, init_lora_weights="pissa"), "changes the base weights at the start"),
    "trained bias": (lambda f: _configure(f, bias="all"), 'bias="all" trains biases of the base model'),
    "another rank": (lambda f: _configure(f, r=5), "has rank 4 where adapter_config.json says 5"),
    "cut off": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x09"), "cannot be read"),
    "not finite": (lambda f: _tensors(f, _break_first), "holds numbers that are not finite"),
    "half a pair": (lambda f: _tensors(f, lambda t: t.pop(next(iter(t)))), "do not fit together"),
    "no factors": (lambda f: _tensors(f, lambda t: [t.pop(key) for key in list(t)]), "holds no LoRA factors"),
    "gates": (
        lambda f: _tensors(f, lambda t: t.update({"base_model.model.x.lora_gate": torch.ones(2)})),
        "x.lora_gate is no factor of a linear layer",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_source_that_is_not_plain_lora_is_refused(damage: str, source, tmp_path: Path) -> None:
    _, folder = source()
    spoil, pattern = DAMAGES[damage]
    spoil(folder)
    message = refused("truncate", folder, "--average_rank", 1, "--output", tmp_path / "small")
    assert pattern in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_a_run_folder_meets_the_adapter_in_it(source, tmp_path: Path) -> None:
    _, folder = source()
    folder.rename(tmp_path / "adapter")
    message = refused("truncate", tmp_path, "--average_rank", 1, "--output", tmp_path / "small")
    assert f"the adapter of this run is {tmp_path / 'adapter'}" in message


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (["--average_rank", 5], "asks for 30 ranks, but the 6 adapted modules start with 24; lower the budget"),
        (["--parameters", 20], "not even one rank (the cheapest costs 24)"),
        (["--total_rank", 0], "the budget must be positive, got total_rank=0"),
        ([], "or max_rank alone; got none"),
        (["--total_rank", 9, "--max_rank", 1], "can have no more than 6; raise max_rank to 2 or lower the budget"),
        (["--adapter_bytes", 90], "leaves 90 bytes for 6 modules: not even one rank (the cheapest costs 96)"),
        (["--total_rank", 3, "--fraction", 0.5], "got total_rank, fraction"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(words: list[Any], pattern: str, source, tmp_path: Path) -> None:
    _, folder = source()
    message = refused("truncate", folder, *words, "--output", tmp_path / "small")
    assert pattern in message
    assert "LoraConfig" not in message  # the adapter is trained
    assert not (tmp_path / "small").exists()


def test_nothing_but_an_export_is_overwritten(source, tmp_path: Path) -> None:
    _, folder = source()
    budget = ("--average_rank", 1)
    before = files(tmp_path)
    for output in (folder, tmp_path):
        assert "exists and is no export of loralloc" in refused("truncate", folder, *budget, "--output", output)
    assert "is a file" in refused("truncate", folder, *budget, "--output", folder / "README.md")
    assert files(tmp_path) == before
    done("truncate", folder, *budget, "--output", tmp_path / "small")
    itself = refused("truncate", tmp_path / "small", "--total_rank", 2, "--output", tmp_path / "small")
    assert "cannot be replaced by its own truncation" in itself
