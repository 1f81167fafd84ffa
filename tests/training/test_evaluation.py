"""Promise: metrics are computed of predictions and of examples, in the examples' order and with all their columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import TARGETS, lora_config, tiny_bert
from peft import get_peft_model
from trainers import arguments

from loralloc.tasks.base import Evaluated
from loralloc.training.trainer import PlainTrainer

LENGTHS = (3, 9, 1, 7, 5, 2, 8)


def rows() -> Dataset:
    """Sentences of unlike length, each with a name that no model takes."""
    columns = {
        "input_ids": [[1 + n] * length for n, length in enumerate(LENGTHS)],
        "labels": [n % 3 for n in range(len(LENGTHS))],
        "name": [f"row {n}" for n in range(len(LENGTHS))],
    }
    return Dataset.from_dict(columns)


def collate(chosen: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    assert all("name" not in row for row in chosen)
    ids = [torch.tensor(row["input_ids"]) for row in chosen]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = torch.tensor([row["labels"] for row in chosen])
    return {"input_ids": padded, "attention_mask": (padded != 0).long(), "labels": labels}


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_metrics_see_every_example_beside_its_own_prediction(strategy: str, tmp_path: Path) -> None:
    seen: list[Evaluated] = []
    model = get_peft_model(tiny_bert(), lora_config("bert", target_modules=TARGETS["bert"]))

    def metrics(evaluated: Evaluated) -> dict[str, float]:
        seen.append(evaluated)
        return {"rows": len(evaluated.examples)}

    trainer = PlainTrainer(
        model=model,
        args=arguments(tmp_path, train_sampling_strategy=strategy, remove_unused_columns=True),
        eval_dataset=rows(),
        data_collator=collate,
        compute_metrics=metrics,
        log=tmp_path / "log.jsonl",
    )
    assert trainer.evaluate()["eval_rows"] == len(LENGTHS)
    assert trainer.evaluate(rows().select(range(3)))["eval_rows"] == 3
    whole = seen[0]
    assert trainer.evaluated is not None
    assert list(trainer.evaluated.examples["name"]) == ["row 0", "row 1", "row 2"]
    assert list(whole.examples["name"]) == rows()["name"]
    assert list(whole.label_ids) == rows()["labels"]
    for row, predicted in zip(rows(), whole.predictions, strict=True):
        batch = collate([{key: row[key] for key in ("input_ids", "labels")}])
        with torch.no_grad():
            logits = model.eval()(**batch).logits[0]
        torch.testing.assert_close(torch.from_numpy(predicted), logits, rtol=1e-4, atol=1e-5)
