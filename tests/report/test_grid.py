from __future__ import annotations

import pytest

from loralloc.report.grid import arrange

from .fabricate import BERT_TYPES, GPT2_TYPES, LLAMA_TYPES, Shapes, bert, gpt2, llama


@pytest.mark.parametrize(
    ("modules", "stack", "types"),
    [
        (bert(3), "bert.encoder.layer", BERT_TYPES),
        (llama(3), "model.layers", LLAMA_TYPES),
        (gpt2(3), "transformer.h", GPT2_TYPES),
    ],
)
def test_rows_are_layers_and_columns_module_types(modules: Shapes, stack: str, types: Shapes) -> None:
    grid = arrange(modules)
    assert grid.rows == ((stack, 0), (stack, 1), (stack, 2))
    assert grid.types == tuple(types)
    assert grid.cells == {(stack, layer, kind): f"{stack}.{layer}.{kind}" for layer in range(3) for kind in types}
    assert grid.others == ()


def test_layers_are_in_numeric_order_whatever_the_order_of_the_names() -> None:
    names = sorted(llama(12))
    assert names.index("model.layers.10.mlp.up_proj") < names.index("model.layers.2.mlp.up_proj")
    assert [layer for _, layer in arrange(names).rows] == list(range(12))


def test_names_without_a_place_are_listed_apart() -> None:
    grid = arrange([*gpt2(2), "lm_head", "projections.3", "score.³"])
    assert grid.others == ("lm_head", "projections.3", "score.³")
    assert len(grid.cells) == 8


def test_encoder_and_decoder_are_two_stacks() -> None:
    names = [
        f"{stack}.block.{layer}.layer.0.SelfAttention.q" for stack in ("encoder", "decoder") for layer in (0, 1, 2)
    ]
    grid = arrange(names)
    assert grid.stacks == ("encoder.block", "decoder.block")
    assert grid.types == ("layer.0.SelfAttention.q",)
    assert [layer for _, layer in grid.rows] == [0, 1, 2, 0, 1, 2]
    assert grid.column("layer.0.SelfAttention.q") == names


@pytest.mark.parametrize("layers", [4, 2])
def test_experts_are_columns_however_many_there_are(layers: int) -> None:
    names = [f"model.layers.{layer}.experts.{expert}.w1" for layer in range(layers) for expert in range(3)]
    assert arrange(names).types == ("experts.0.w1", "experts.1.w1", "experts.2.w1")
    assert len(arrange(names).rows) == layers


def test_a_wrapper_with_one_index_is_not_a_layer() -> None:
    assert arrange(["0.auto_model.layer.0.query", "0.auto_model.layer.1.query"]).types == ("query",)


def test_no_name_is_lost_and_none_appears_twice() -> None:
    names = ["a.3.x", "a.03.x", "a.3.y", "b", "7", ""]
    grid = arrange(names)
    assert sorted([*grid.cells.values(), *grid.others]) == sorted(names)


def test_rows_are_named_by_their_stack_where_there_are_two() -> None:
    assert arrange(["encoder.block.0.q", "encoder.block.1.q", "decoder.block.0.q"]).row_names == [
        "encoder.block 0",
        "encoder.block 1",
        "decoder.block 0",
    ]
    assert arrange(bert(2)).row_names == ["0", "1"]
