"""Methods in transformers' Trainer, in TRL's SFTTrainer and in a loop of one's own: the same three lines each.

Those that look at validation data have tests of their own there: test_sft.py, test_resume_callback.py and the contract.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from models import labelled_batch, logits, tiny_llama, tiny_peft
from peft import PeftModel
from test_sft import DATA, quiet_datasets, word_tokenizer  # noqa: F401
from trainers import build, sentences
from trl import SFTConfig, SFTTrainer

from loralloc import (
    AdaLoRA,
    ALLoRA,
    Budget,
    DepthLinear,
    Random,
    RankAllocation,
    RankPlan,
    Truncate,
    Uniform,
    UserError,
    attach,
    export_adapter,
)
from loralloc.methods.base import Method

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA.*AdamW")

HALF = Budget(average_rank=2)
METHODS: Mapping[str, Method] = {
    "adalora": AdaLoRA(HALF),
    "allora": ALLoRA(),
    "allora-adalora": ALLoRA(mode="hybrid", allocate=AdaLoRA(HALF)),
    "uniform": Uniform(HALF),
    "random": Random(HALF),
    "depth_linear": DepthLinear(HALF),
    "truncate": Truncate(HALF),
}
STEPS = 6


def in_trainer(model: PeftModel, method: Method, folder: Path) -> RankPlan | None:
    trainer, allocation = build(folder, model=model, method=method, max_steps=STEPS)
    trainer.train()
    return allocation.plan


def in_sft_trainer(model: PeftModel, method: Method, folder: Path) -> RankPlan | None:
    allocation = RankAllocation(method)
    settings = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "max_length": 32,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], **settings),
        train_dataset=DATA["text"](),
        processing_class=word_tokenizer(),
        callbacks=[allocation],
    ).train()
    return allocation.plan


def in_a_loop(model: PeftModel, method: Method, folder: Path) -> RankPlan:
    run = attach(model, method, total_steps=STEPS)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(STEPS):
        model(**labelled_batch("llama", step)).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    return run.finish()


@pytest.mark.parametrize("train", [in_trainer, in_sft_trainer, in_a_loop])
@pytest.mark.parametrize("name", METHODS)
def test_it_trains_meets_its_budget_and_exports(
    name: str, train: Callable[[PeftModel, Method, Path], RankPlan | None], tmp_path: Path
) -> None:
    model = tiny_peft("llama", lora_alpha=4)
    base = logits(model)
    plan = train(model, METHODS[name], tmp_path / "run")
    assert plan is not None
    assert plan.total_rank == (24 if name == "allora" else 12)
    assert (plan.method, plan.provenance["steps"]) == (METHODS[name].id, STEPS)
    model.eval()
    assert (logits(model) - base).abs().max() > 1e-2
    assert export_adapter(model, tmp_path / "adapter").ranks == plan.ranks
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)


def test_a_checkpoint_cannot_win_where_ranks_are_chosen_at_the_end(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 3}
    data = {"extra": {"eval_dataset": sentences(8)}, "eval_steps": 3, "max_steps": STEPS}
    trainer, _ = build(tmp_path, method=Truncate(HALF, recover=0), **best, **data)
    with pytest.raises(UserError, match=r"from before the ranks are chosen, .*; set load_best_model_at_end=False"):
        trainer.train()
    trainer, allocation = build(tmp_path, method=Uniform(HALF), **best, **data)  # ranks that are final from the start
    trainer.train()
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12
