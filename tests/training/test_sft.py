"""The same callback in TRL's SFTTrainer, with the adapter made by the user and by TRL."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from models import BUILDERS, VOCABULARY, logits, lora_config, tiny_llama, tiny_peft
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from trainers import Compare, training_rows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from loralloc import ABLoRA, AdaLoRA, AutoLoRA, Budget, RankAllocation, UserError, export_adapter
from loralloc.gating import is_gated
from loralloc.methods.base import Method

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS = VOCABULARY - len(SPECIAL)
CHAT = "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' </s> ' }}{% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def quiet_datasets() -> None:
    disable_progress_bars()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are w0, w1, ..., with a chat template."""
    words = SPECIAL + ["user", "assistant"] + [f"w{i}" for i in range(WORDS - 2)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT,
    )


def phrases(count: int = 64, *, seed: int = 0) -> list[str]:
    """Phrases of 3 to 11 words with a rule to learn."""
    draw = random.Random(seed)
    return [
        " ".join(f"w{(first + 3 * i) % (WORDS - 2)}" for i in range(draw.randrange(3, 12)))
        for first in (draw.randrange(WORDS - 2) for _ in range(count))
    ]


DATA: dict[str, Any] = {
    "text": lambda: Dataset.from_dict({"text": phrases()}),
    "prompt-completion": lambda: Dataset.from_dict({"prompt": phrases(), "completion": phrases(seed=1)}),
    "chat": lambda: Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                for question, answer in zip(phrases(), phrases(seed=1), strict=True)
            ]
        }
    ),
}


def sft(
    folder: Path, *, made_by: str = "user", data: str = "text", method: Method | None = None, **settings: Any
) -> tuple[SFTTrainer, RankAllocation]:
    """An SFTTrainer on the CPU; everything not named here is TRL's default, gradient checkpointing among it."""
    allocation = RankAllocation(AdaLoRA(Budget(average_rank=2)) if method is None else method)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 16,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": 32,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer = SFTTrainer(
        model=tiny_peft("llama") if made_by == "user" else tiny_llama(),
        args=SFTConfig(**{**defaults, **settings}),
        train_dataset=DATA[data](),
        processing_class=word_tokenizer(),
        callbacks=[allocation],
        peft_config=None if made_by == "user" else lora_config("llama"),
    )
    return trainer, allocation


def trained(folder: Path, **settings: Any) -> tuple[SFTTrainer, RankAllocation]:
    trainer, allocation = sft(folder, **settings)
    trainer.train()
    return trainer, allocation


@pytest.mark.parametrize("made_by", ["user", "trl"])
def test_it_prunes_to_the_budget_and_leaves_plain_lora(made_by: str, tmp_path: Path) -> None:
    trainer, allocation = sft(tmp_path / "run", made_by=made_by)
    model = trainer.model
    assert isinstance(model, PeftModel)
    assert torch.equal(logits(model.eval()), logits(BUILDERS["llama"]()))  # nothing but gates was attached
    trainer.train()
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12
    assert allocation.plan.provenance["steps"] == 16
    assert not is_gated(model, "default")
    assert list(model.state_dict()) == list(tiny_peft("llama").state_dict())
    export = export_adapter(model, tmp_path / "adapter")
    assert export.ranks == allocation.plan.ranks
    reloaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded), logits(model.eval()), rtol=0, atol=1e-5)
    assert (logits(reloaded) - logits(tiny_llama())).abs().max() > 1e-2


def test_the_block_of_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes))
    data, tokenizer = DATA["text"](), word_tokenizer()
    args = SFTConfig("runs/sft", max_steps=6, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True)

    allocation = RankAllocation(AdaLoRA(Budget(average_rank=8)))
    trainer = SFTTrainer(
        model=base,
        args=args,  # an SFTConfig
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=12, lora_alpha=24, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[allocation],
    )
    trainer.train()
    export_adapter(trainer.model, "runs/sft/adapter")

    assert allocation.plan is not None
    assert allocation.plan.total_rank == 8 * 14
    assert (tmp_path / "runs/sft/adapter/adapter_model.safetensors").is_file()


def test_ablation_scores_look_at_tokenized_validation_data(tmp_path: Path) -> None:
    tokenized = word_tokenizer()(phrases(24, seed=7))
    rows = [{"input_ids": ids} for ids in tokenized["input_ids"]]
    method = ABLoRA(Budget(average_rank=2), rows, warmup=4, interval=3, rounds=3, samples=16)
    _, allocation = trained(tmp_path, method=method)
    assert allocation.plan is not None
    assert allocation.plan.total_rank == 12
    assert len(set(allocation.plan.ranks.values())) > 1
    raw = ABLoRA(Budget(average_rank=2), DATA["text"](), warmup=4, interval=3, rounds=3)
    with pytest.raises(UserError, match=r"the validation data of the method cannot be made into a batch .*: tokenized"):
        sft(tmp_path, method=raw)[0].train()


def test_the_log_has_trls_columns_and_ours(tmp_path: Path) -> None:
    rows = training_rows(trained(tmp_path)[0])
    assert len(rows) == 16
    assert all({"mean_token_accuracy", "num_tokens", "rank/total", "budget"} <= row.keys() for row in rows)
    assert (rows[0]["rank/total"], rows[-1]["rank/total"], rows[-1]["budget"]) == (24, 12, 12)


@pytest.mark.parametrize(
    "data", ["text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("chat", "prompt-completion"))]
)
def test_accumulated_micro_batches_give_the_plan_of_the_whole_batch(data: str, tmp_path: Path) -> None:
    whole, expected = trained(tmp_path, data=data)
    parts, allocation = trained(tmp_path, data=data, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert allocation.plan is not None
    assert expected.plan is not None
    assert allocation.plan.to_dict() == expected.plan.to_dict()
    losses = [[row["loss"] for row in training_rows(trainer)] for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("mode", ["fast", pytest.param("paper", marks=pytest.mark.slow)])
@pytest.mark.parametrize("data", ["text", pytest.param("chat", marks=pytest.mark.slow)])
def test_a_method_that_looks_at_validation_data(data: str, mode: str, tmp_path: Path) -> None:
    """With gradient checkpointing, TRL's default, and accumulated batches; the examples are tokenized beforehand."""
    tokenizer = word_tokenizer()
    held_out = [{"input_ids": tokenizer(text)["input_ids"]} for text in phrases(20, seed=7)]
    method = AutoLoRA(held_out, mode=mode, logit_learning_rate=0.05)  # type: ignore[arg-type]
    settings: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    trainer, allocation = sft(tmp_path, data=data, method=method, **settings)
    assert trainer.args.gradient_checkpointing
    compare = Compare(allocation)
    trainer.add_callback(compare)
    trainer.train()
    assert compare.equal == [True] * 16  # with its own way to compute the loss, TRL's step too is computed again
    assert allocation.plan is not None
    assert allocation.run.state.updates == 16
    assert all(1 <= module.rank <= module.start for module in allocation.plan.modules.values())
    assert 6 <= allocation.plan.total_rank < 24
    assert not is_gated(trainer.model, "default")  # type: ignore[arg-type]


def test_what_is_refused_is_refused_here_too(tmp_path: Path) -> None:
    trainer, _ = sft(tmp_path, made_by="trl", max_steps=1)
    with pytest.raises(UserError, match=r"allocating ranks takes at least \d optimizer steps, the run has 1"):
        trainer.train()
