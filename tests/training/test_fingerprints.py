"""Fingerprints: equal for equal things however they lie in memory, different for whatever changes a run."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from models import tiny_peft

from loralloc import native
from loralloc.training import fingerprints
from loralloc.training.fingerprints import repeated_rows, rows_fingerprint, versions, weights_fingerprint

ROWS: list[dict[str, Any]] = [
    {"input_ids": list(range(n % 5)), "labels": n % 3, "text": f"row {n}", "score": n / 7} for n in range(30)
]


def dataset(rows: list[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(rows)


class TestRows:
    @pytest.mark.parametrize(
        "same",
        [
            concatenate_datasets([dataset(ROWS[:7]), dataset(ROWS[7:])]),
            dataset([*reversed(ROWS)]).select(range(29, -1, -1)),
            dataset([*ROWS, *ROWS]).select(range(30)),
            dataset(ROWS).with_format("torch", columns=["labels"]),
            dataset([dict(reversed(row.items())) for row in ROWS]),
        ],
        ids=["chunks", "order of storage", "part", "format", "order of columns"],
    )
    def test_are_known_wherever_they_lie(self, same: Dataset) -> None:
        assert rows_fingerprint(same) == rows_fingerprint(dataset(ROWS))

    @pytest.mark.parametrize("chunk", [1, 7, 30, 1000])
    def test_are_read_a_piece_at_a_time(self, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fingerprints, "CHUNK", chunk)
        parted = concatenate_datasets([dataset(ROWS[:7]), dataset(ROWS[7:])])
        assert rows_fingerprint(parted) == rows_fingerprint(dataset(ROWS))

    @pytest.mark.parametrize(
        "other",
        [
            dataset([ROWS[1], ROWS[0], *ROWS[2:]]),
            dataset(ROWS[:29]),
            dataset([*ROWS[:-1], {**ROWS[-1], "labels": 9}]),
            dataset([*ROWS[:-1], {**ROWS[-1], "text": "row 29."}]),
            dataset([*ROWS[:-1], {**ROWS[-1], "score": None}]),
            dataset([*ROWS[:-1], {**ROWS[-1], "input_ids": [0, 1, 2, 9]}]),
            dataset([*ROWS[:-2], {**ROWS[-2], "input_ids": [0, 1]}, {**ROWS[-1], "input_ids": [2, 0, 1, 2, 3]}]),
            dataset([*ROWS[:-5], {**ROWS[-5], "input_ids": None}, *ROWS[-4:]]),
            dataset(ROWS).remove_columns("score"),
            dataset(ROWS).rename_column("score", "weight"),
        ],
        ids=["order", "count", "number", "text", "null", "token", "borders", "null list", "fewer columns", "name"],
    )
    def test_that_differ_are_told_apart(self, other: Dataset) -> None:
        assert rows_fingerprint(other)["sha256"] != rows_fingerprint(dataset(ROWS))["sha256"]

    def test_without_any(self) -> None:
        empty = Dataset.from_dict({"input_ids": []}, features=Features({"input_ids": List(Value("int32"))}))
        assert rows_fingerprint(empty)["rows"] == 0


class TestRepeated:
    def test_rows_are_counted_whatever_their_order_and_their_other_columns(self) -> None:
        others = dataset([{**row, "weight": 1.0} for row in reversed(ROWS[10:])]).remove_columns("score")
        assert repeated_rows(dataset(ROWS), others) == 20
        assert repeated_rows(dataset([ROWS[29], ROWS[29], ROWS[0]]), others) == 2

    def test_a_row_that_differs_in_a_token_is_another(self) -> None:
        others = dataset([{**row, "input_ids": [*row["input_ids"], 1]} for row in ROWS])
        assert repeated_rows(dataset(ROWS), others) == 0
        assert repeated_rows(dataset(ROWS), dataset([{"other": 1}])) == 0


class TestWeights:
    def test_are_those_of_the_frozen_base(self) -> None:
        model = tiny_peft("llama")
        before = weights_fingerprint(model)
        assert weights_fingerprint(tiny_peft("llama")) == before
        assert before["tensors"] > 10
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight += 1
        assert weights_fingerprint(model) == before, "what is trained does not count"

    def test_do_not_depend_on_which_layers_have_an_adapter(self) -> None:
        """A search adapts all of them; its plan may leave some without."""
        whole = weights_fingerprint(tiny_peft("llama"))
        assert weights_fingerprint(tiny_peft("llama", target_modules=["q_proj"])) == whole
        assert weights_fingerprint(tiny_peft("llama", target_modules=["down_proj"])) == whole

    @pytest.mark.parametrize("name", ["q_proj", "norm", "embed_tokens", "lm_head"])
    def test_a_tensor_that_was_scaled_is_seen(self, name: str) -> None:
        model = tiny_peft("llama")
        before = weights_fingerprint(model)
        key, weight = next((k, w) for k, w in model.named_parameters() if name in k and "lora_" not in k)
        assert not weight.requires_grad, key
        weight.data *= 1.1
        assert weights_fingerprint(model) != before

    def test_a_dtype_and_a_name_are_seen(self) -> None:
        module = torch.nn.Sequential(torch.nn.Linear(2, 2)).requires_grad_(False)
        named = torch.nn.ModuleDict({"other": module[0]})
        found = {weights_fingerprint(one)["sha256"] for one in (module, named, deepcopy(module).bfloat16())}
        assert len(found) == 3

    def test_a_large_tensor_is_looked_at_all_over(self) -> None:
        module = torch.nn.Linear(3 * fingerprints.SAMPLES, 2, bias=False).requires_grad_(False)
        before = weights_fingerprint(module)
        for part in range(6):
            with torch.no_grad():
                module.weight.view(6, -1)[part] += 1
            assert weights_fingerprint(module) != before
            with torch.no_grad():
                module.weight.view(6, -1)[part] -= 1


def test_versions_are_those_that_are_installed() -> None:
    found = versions()
    assert {"python", "loralloc", "torch", "transformers", "peft"} <= found.keys()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


def test_a_run_depends_on_the_kernel_that_it_computes_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "kernel in C++" not in versions()
    monkeypatch.setattr("loralloc.native.loaded", lambda: print)
    assert versions()["kernel in C++"] == native.version()
