"""Python of the pages that no other test has: the code that their blocks are excerpts of."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import labelled_batch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from loralloc import AdaLoRA, Budget, attach, export_adapter, kept_whole
from loralloc.tasks.metrics import paired_difference


def losses(run):
    return np.array(json.loads(Path(run, "losses.json").read_text(encoding="utf-8"))["losses"])


def test_two_runs_are_told_apart_by_the_losses_of_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, numbers in {"adalora": [1.0, 2.0, 3.0], "lora": [1.5, 2.5, 3.6]}.items():
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        (folder / "losses.json").write_text(json.dumps({"losses": numbers}), encoding="utf-8")

    print(paired_difference(losses("runs/adalora"), losses("runs/lora")))  # mean, and the ends of its 95 % interval

    assert "-0.533" in capsys.readouterr().out


def shard(model):
    for block in model.get_base_model().model.layers:
        fully_shard(block, ignored_params=kept_whole(model))
    fully_shard(model, ignored_params=kept_whole(model))


def train(model, batches, total_steps):
    run = attach(model, AdaLoRA(Budget(average_rank=8)), total_steps=total_steps)
    shard(model)  # before attach() or after it
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    for batch in batches:
        model(**batch).loss.backward()  # averages the adapter's gradients, too
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    run.finish()  # in every process
    return export_adapter(model, "adapter")  # in every process; the first one's files stay


def in_a_process(rank: int, folder: str) -> None:
    """Train a small Llama that is sharded over all the processes that there are: one."""
    os.chdir(folder)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=1)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, num_hidden_layers=2, **sizes))
    model = get_peft_model(base, LoraConfig(r=12, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    export = train(model, [labelled_batch("llama", seed) for seed in range(6)], 6)
    Path("ranks").write_text(str(sum(export.ranks.values())), encoding="utf-8")
    dist.destroy_process_group()


@pytest.mark.slow
def test_the_loop_over_a_sharded_model(tmp_path: Path) -> None:
    mp.spawn(in_a_process, args=(str(tmp_path),), nprocs=1)
    assert (tmp_path / "ranks").read_text(encoding="utf-8") == str(8 * 14)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
