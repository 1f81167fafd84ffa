"""Validation data: one guard for all methods that look at them, each cure tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from models import labelled_batch, tiny_peft
from torch import Tensor
from trainers import build, sentences

from loralloc import ABLoRA, ALLoRA, AutoLoRA, Budget, UserError, attach
from loralloc.methods.base import Method

TWO = Budget(average_rank=2)
METHODS: dict[str, Callable[[Any], Method]] = {
    "AutoLoRA": lambda data: AutoLoRA(data, check_every=1),
    "AutoLoRA, first order": lambda data: AutoLoRA(data, mode="first_order"),
    "ABLoRA": lambda data: ABLoRA(TWO, data, warmup=4, interval=2, rounds=1),
    "ABLoRA in ALLoRA": lambda data: ALLoRA(allocate=ABLoRA(TWO, data, warmup=4, interval=2, rounds=1)),
}
looks = pytest.mark.parametrize("name", METHODS)

BATCH = labelled_batch("llama", 99)


def nothing_to_learn(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**batch, "labels": torch.full_like(batch["labels"], -100)}


def walk(method: Method, steps: int = 1, loss: Callable[..., Tensor] | None = None) -> Any:
    """Steps of a loop of one's own; `loss` is another loss of the model than its own."""
    run = attach(tiny_peft("llama", lora_alpha=2).train(), method, 12)
    if loss is not None:
        run.model.get_base_model().loss_function = loss
    optimizer = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    for step in range(steps):
        run.model(**labelled_batch("llama", step)).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()
    return run


class TestData:
    """Refused when the method is made."""

    @looks
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (None, r"(\w+) needs validation data; pass \1\(validation=...\), examples that are held out"),
            ([], r"the validation data of (\w+) are empty; pass \1\(validation=...\)"),
            (iter([BATCH]), r"draws validation data by index, and list_iterator has none; .*list\(loader\)"),
            (
                BATCH,
                r"are one mapping \(dict of input_ids, attention_mask, labels\).*a single batch in a list, \[batch\]",
            ),
            (
                DatasetDict(test=Dataset.from_list([{}])),
                r"one mapping \(DatasetDict of test\).*one split of a DatasetDict",
            ),
            ("data.jsonl", r"the validation data of (\w+) are a text, 'data.jsonl'; pass \1\(validation=...\)"),
            ([3, 4], r"the validation data of \w+ hold int \(3, ...\), which is no example; pass"),
            (range(9), r"hold int \(0, ...\), which is no example"),
            ([None], r"hold NoneType \(None, ...\), which is no example"),
        ],
    )
    def test_what_cannot_be_drawn_from_is_refused_in_words(self, name: str, data: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            METHODS[name](data)

    @looks
    def test_the_cures_work(self, name: str) -> None:
        loader = torch.utils.data.DataLoader([{k: v[0] for k, v in BATCH.items()}] * 4, batch_size=2)
        for data in ([BATCH], (BATCH,), list(loader)):
            walk(METHODS[name](data))

    def test_a_split_and_columns_are_examples_in_a_trainer(self, tmp_path: Path) -> None:
        columns = {"ids": [row["ids"] for row in sentences(8, seed=3)]}
        for data in (DatasetDict(test=Dataset.from_dict(columns))["test"], Dataset.from_dict(columns)):
            trainer, allocation = build(tmp_path, method=AutoLoRA(data), max_steps=1)
            trainer.train()
            assert allocation.run.state.updates == 1


class TestBatches:
    """Refused when the first one is drawn."""

    @looks
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (
                ["a text"],
                r"must be a mapping of tensors, .* and this one is a str; .*holds batches as the model takes them",
            ),
            ([[BATCH]], "must be a mapping of tensors, .* and this one is a list"),
            (
                [{"input_ids": [1, 2]}],
                r"this one is a dict of input_ids \(list\); in a loop of your own, validation holds",
            ),
            ([{}], "this one is a dict of nothing"),
        ],
    )
    def test_what_a_model_cannot_take_is_refused_in_words(self, name: str, data: Any, message: str) -> None:
        with pytest.raises(UserError, match=message):
            walk(METHODS[name](data))

    @looks
    def test_without_labels_there_is_no_loss(self, name: str) -> None:
        with pytest.raises(UserError, match=r"(batches must hold labels|must hold labels as a tensor)"):
            walk(METHODS[name]([{k: v for k, v in BATCH.items() if k != "labels"}]))


class TestLabels:
    """Refused in the first step."""

    @looks
    def test_labels_that_are_all_ignored(self, name: str) -> None:
        with pytest.raises(UserError, match=r"has no labels \(all are -100\); give examples with something to learn"):
            walk(METHODS[name]([nothing_to_learn(BATCH)] * 3))

    @looks
    def test_labels_that_are_all_ignored_but_where_nothing_is_predicted(self, name: str) -> None:
        """A language model predicts no first token."""
        batch = nothing_to_learn(BATCH)
        batch["labels"][:, 0] = 3
        with pytest.raises(UserError, match=r"has no labels|is nan, .*all -100 but the first position's"):
            walk(METHODS[name]([batch]))

    @looks
    def test_a_loss_that_is_no_number(self, name: str) -> None:
        """Of the validation batch alone: it has two samples."""

        def loss(logits: Tensor, labels: Tensor, **kwargs: Any) -> Tensor:
            return logits.square().mean() * (float("nan") if len(labels) == 2 else 1.0)

        data = [{key: value[:2] for key, value in BATCH.items()}]
        with pytest.raises(UserError, match="loss of the first validation batch is nan, and from that no ranks can be"):
            walk(METHODS[name](data), loss=loss)

    def test_in_a_trainer_too(self, tmp_path: Path) -> None:
        """Examples as they come from prompts that leave no room for a completion."""
        rows: Any = [{"ids": [3]} for _ in range(8)]  # a single token: nothing is predicted
        for method in (AutoLoRA(rows), ABLoRA(TWO, rows, warmup=4, interval=2, rounds=1)):
            trainer, _ = build(tmp_path, method=method, max_steps=8)
            with pytest.raises(UserError, match=r"has no labels|is nan, .*all -100 but the first position's"):
                trainer.train()

    @pytest.mark.parametrize("mode", ["fast", "paper", "first_order"])
    def test_later_on_a_loss_that_is_no_number_is_a_skipped_update(self, mode: Any) -> None:
        """Its gradients may be 0, which is no answer: the logits must not move by momentum."""
        run = walk(AutoLoRA([BATCH, nothing_to_learn(BATCH)], mode=mode), steps=4)
        assert (run.state.updates, run.state.skipped) == (2, 2)
