"""Classification with several labels a row, and with classes that count more than others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import EvalPrediction

from loralloc.errors import UserError
from loralloc.tasks.base import TaskData
from loralloc.tasks.classes import label_sets
from loralloc.tasks.classification_metrics import example_losses, label_set_metrics, predictions
from loralloc.tasks.data import read_rows
from loralloc.tasks.formats import rows_of_dataset
from loralloc.tasks.sequence_classification import prepare, prepare_evaluation

Write = Callable[..., str]

ROWS: list[dict[str, Any]] = [
    {"text": "the film is good", "label": ["good", "film"]},
    {"text": "bad", "label": ["bad"]},
    {"text": "the film", "label": ["film"]},
    {"text": "hello", "label": []},
] * 3
RARE = [{"text": "a b", "label": "common"}] * 6 + [{"text": "c", "label": "rare"}] * 2
NAMES = ["bad", "film", "good"]


@pytest.fixture
def task(
    encoder: str, write: Write, model_section: Callable[..., Any], data_section: Callable[..., Any]
) -> Callable[..., TaskData]:
    def make(rows: list[dict[str, Any]], **given: Any) -> TaskData:
        data = data_section(write(rows), text="text", label="label", **given)
        return prepare(model_section(encoder), data, 0)

    return make


class TestSeveralLabels:
    def test_the_model_learns_each_by_itself(self, task: Callable[..., TaskData]) -> None:
        data = task(ROWS)
        config = data.model.config
        assert config.problem_type == "multi_label_classification"
        assert list((config.id2label or {}).values()) == NAMES
        rows = [data.train[i] for i in range(4)]
        batch = data.options["data_collator"](rows)
        output = data.model.eval()(**batch)
        expected = binary_cross_entropy_with_logits(output.logits, torch.tensor([row["labels"] for row in rows]))
        torch.testing.assert_close(output.loss, expected)
        assert data.metric == "micro_f1"
        assert data.greater_is_better
        counts = {name: sum(labels[n] for labels in data.train["labels"]) for n, name in enumerate(NAMES)}
        assert data.classes == counts
        assert data.reference == {}

    def test_metrics(self) -> None:
        target = np.array([[1, 0, 0], [1, 1, 0]], dtype=np.float32)
        logits = np.array([[3.0, -1, -2], [2, -3, np.nan]])
        found = label_set_metrics(EvalPrediction(logits, target))
        assert found == {"micro_f1": 2 * 2 / (2 * 2 + 1), "macro_f1": (1 + 0) / 2, "accuracy": 0.5}
        none = label_set_metrics(EvalPrediction(-np.ones((2, 3)), np.zeros((2, 3), dtype=np.float32)))
        assert none == {"micro_f1": 0.0, "macro_f1": 0.0, "accuracy": 1.0}

    def test_the_loss_of_every_row_is_torchs(self) -> None:
        logits, target = torch.randn(5, 3) * 20, (torch.rand(5, 3) > 0.5).float()
        expected = binary_cross_entropy_with_logits(logits.double(), target.double(), reduction="none").mean(1)
        assert example_losses(EvalPrediction(logits.numpy(), target.numpy())) == pytest.approx(expected.numpy())

    def test_predictions(self) -> None:
        (told,) = predictions(
            EvalPrediction(np.array([[2.0, -1.0, 0.0]]), np.array([[0, 1, 1]], dtype=np.float32)),
            dict(enumerate(NAMES)),
        )
        assert told["labels"] == ["film", "good"]
        assert told["prediction"] == ["bad", "good"]
        assert told["scores"] == pytest.approx({"bad": 0.880797, "film": 0.268941, "good": 0.5})

    def test_an_evaluation_alone(self, task: Callable[..., TaskData], write: Write, data_section: Any) -> None:
        data = task(ROWS)
        section = data_section("x", text="text", label="label")
        found = prepare_evaluation(data.model, data.tokenizer, section, write(ROWS[:2], "other.jsonl"))
        assert found.test is not None
        assert found.test["labels"] == [[0, 1, 1], [1, 0, 0]]
        odd = write([{"text": "a", "label": ["bad", "odd"]}], "odd.jsonl")
        with pytest.raises(UserError, match=r'odd\.jsonl:1: label "odd" is not among the labels of the training data'):
            prepare_evaluation(data.model, data.tokenizer, section, odd)

    def test_names_of_numbered_classes(self) -> None:
        features = Features({"label": List(ClassLabel(names=["no", "yes"])), "text": Value("string")})
        table = Dataset.from_dict({"label": [[1, 0], []], "text": ["a", "b"]}, features=features)
        assert label_sets(rows_of_dataset("hub:x", table), "label") == [["yes", "no"], []]

    @pytest.mark.parametrize("label", ["good", ["good", "good"], ["good", None], [1.5], [["good"]]])
    def test_what_is_no_list_of_labels(self, label: Any, write: Write) -> None:
        rows = read_rows(write([ROWS[0], {"text": "a", "label": label}]))
        with pytest.raises(
            UserError, match=r"train\.jsonl:2: column \"label\" \(data\.label\) must hold a list of labels"
        ):
            label_sets(rows, "label")


class TestWeights:
    def test_the_training_loss_is_the_weighted_mean_and_others_are_not(self, task: Callable[..., TaskData]) -> None:
        data = task(RARE, class_weights={"common": 1, "rare": 3})
        plain = task(RARE)
        batch = data.options["data_collator"]([data.train[i] for i in range(6)])
        for model in (data.model, plain.model):
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        output = data.model.train()(**batch)
        expected = cross_entropy(output.logits, batch["labels"], torch.tensor([1.0, 3.0]))
        torch.testing.assert_close(output.loss, expected)
        assert not torch.allclose(output.loss, plain.model.train()(**batch).loss)
        torch.testing.assert_close(data.model.eval()(**batch).loss, plain.model.eval()(**batch).loss)
        assert data.again is not None
        torch.testing.assert_close(data.again().eval()(**batch).logits, output.logits)

    def test_balanced(self, task: Callable[..., TaskData]) -> None:
        data = task(RARE, class_weights="balanced")  # 4 and 2 training rows, or 5 and 1, by the cut
        batch = data.options["data_collator"]([data.train[i] for i in range(len(data.train))])
        output = data.model.train()(**batch)
        losses = cross_entropy(output.logits, batch["labels"], reduction="none")
        classes = [losses[batch["labels"] == n].mean() for n in range(2)]
        torch.testing.assert_close(output.loss, (classes[0] + classes[1]) / 2)  # every class counts the same

    @pytest.mark.parametrize(
        ("rows", "given", "told"),
        [
            (
                RARE,
                {"class_weights": {"rara": 2.0}},
                'there is no class rara; there are common, rare. Did you mean "rare"?',
            ),
            (ROWS, {"class_weights": "balanced"}, "these rows have several labels; take them out"),
            (
                [{**row, "label": 1.5} for row in RARE],
                {"class_weights": "balanced", "labels": "regression"},
                "these rows have numbers; take them out",
            ),
            (
                RARE,
                {"class_weights": "balanced", "labels": ["common", "rare", "never"]},
                "weighs every class by its training rows, and never has none",
            ),
        ],
    )
    def test_that_mean_nothing(
        self, rows: list[dict[str, Any]], given: dict[str, Any], told: str, task: Callable[..., TaskData]
    ) -> None:
        with pytest.raises(UserError) as error:
            task(rows, **given)
        assert told in str(error.value)
