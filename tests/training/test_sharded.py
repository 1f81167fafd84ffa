"""A base model sharded by FSDP2 over two processes on gloo: the run of one process with the whole batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import tiny_peft
from peft import PeftModel
from safetensors.torch import load_file
from sharded_loop import Loop, Scenario, in_one_process, loop, methods, shard
from torch import nn
from torch.multiprocessing.spawn import spawn
from trainers import language_batch, sentences

from loralloc import AdaLoRA, AutoLoRA, Budget, UserError, attach, export_adapter, kept_whole
from loralloc.adapter import check
from loralloc.training.shared_gradients import average_gradients

pytestmark = pytest.mark.slow

ORDERS = ("before", "after")
TWO_RANKS = AdaLoRA(Budget(average_rank=2))


def refusal(run: Callable[[], Any]) -> str:
    """The message that ends a run."""
    with pytest.raises(UserError) as error:
        run()
    return str(error.value)


def everything_sharded(order: str) -> None:
    """A loop that forgets what `kept_whole` is for."""
    model = tiny_peft("llama").train()
    if order == "before":
        shard(model, set())
    attach(model, TWO_RANKS, total_steps=4)
    shard(model, set())
    model(**language_batch(sentences(4)))


def tensor_parallel() -> None:
    """A projection is split along its inputs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = tiny_peft("llama").train()
    layer: Any = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer  # type: ignore[union-attr]
    mesh = init_device_mesh("cpu", (2,))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(1)]), requires_grad=False)
    attach(model, TWO_RANKS, total_steps=4)


def second_derivatives() -> None:
    """AutoLoRA's exact mode, up to its first step."""
    model = tiny_peft("llama").train()
    shard(model)
    batch = language_batch(sentences(4))
    run = attach(model, AutoLoRA([batch], mode="exact"), total_steps=4)
    model(**batch).loss.backward()
    run.before_step(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def merged(rank: int, folder: Path) -> None:
    """An export that adds the adapter to weights which nobody has."""
    model: PeftModel = tiny_peft("llama", trained=True)
    shard(model)
    export_adapter(model, folder / "merged", profile="merged")


def with_a_head(folder: Path) -> list[float]:
    """An export beside a head that is saved whole, and sharded where it is the base model's."""
    model: PeftModel = tiny_peft("llama", trained=True, modules_to_save=["lm_head"])
    shard(model, heads=True)
    exported = export_adapter(model, folder / "head")
    return [exported.difference, exported.allowed]


def rounding(folder: Path) -> int:
    """How often an export computes with other rounding, which on this data no process needs."""
    model: PeftModel = tiny_peft("llama", trained=True)
    shard(model)
    with patch.object(check, "rounded_otherwise", wraps=check.rounded_otherwise) as rounded:
        export_adapter(model, folder / "rounding")
    return rounded.call_count


def means(rank: int) -> list[Any]:
    """Averages of gradients that each process has, one has, and none has; of a narrow dtype too."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32,) * 3 + (torch.bfloat16,)]
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    parameters[1].grad = torch.tensor([4.0, 8.0]) if rank else None
    parameters[3].grad = torch.tensor([256.0, 1.0], dtype=torch.bfloat16) if rank else torch.zeros(2).bfloat16()
    average_gradients(parameters)
    return [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters]


def scenarios(folder: Path) -> dict[str, Scenario]:
    return {
        **{f"{name}, {order}": loop(method=name, order=order) for name in methods() for order in ORDERS},
        "collected": loop(parts=2),
        "bad step": loop(poison=(6, 1)),
        "saved": loop(method="ablora", save=folder / "half", export=folder / "adapter"),
        "resumed": loop(method="ablora", resume=folder / "half"),
        "head": lambda rank, world: with_a_head(folder),
        "rounding": lambda rank, world: rounding(folder),
        "means": lambda rank, world: means(rank),
        **{
            f"all sharded, {order}": lambda rank, world, o=order: refusal(lambda: everything_sharded(o))
            for order in ORDERS
        },
        "tensor parallel": lambda rank, world: refusal(tensor_parallel),
        "exact": lambda rank, world: refusal(second_derivatives),
        "merged": lambda rank, world: refusal(lambda: merged(rank, folder)),
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and the results of every scenario on each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    spawn(in_one_process, args=(folder, 2, scenarios), nprocs=2)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def of(two: Any, name: str) -> Any:
    """What both processes found, which is the same."""
    first, second = (results[name] for results in two[1])
    if isinstance(first, dict):  # the files are checked on each process's own data
        apart = ("difference", "allowed")
        first, second = ({k: v for k, v in found.items() if k not in apart} for found in (first, second))
    assert first == second
    return first


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", methods())
def test_every_method_decides_as_one_process_with_the_whole_batch(name: str, order: str, two: Any) -> None:
    found, alone = of(two, f"{name}, {order}"), Loop(method=name, order="whole").run(0, 1)
    assert found["ranks"] == alone["ranks"]
    kinds = [event["event"] for event in found["events"]]
    assert kinds == [event["event"] for event in alone["events"]]


@pytest.mark.parametrize("name", methods())
def test_the_order_of_attaching_and_sharding_does_not_matter(name: str, two: Any) -> None:
    assert of(two, f"{name}, before")["checksum"] == of(two, f"{name}, after")["checksum"]


def test_the_base_is_sharded_and_the_adapter_is_not(two: Any) -> None:
    """Accelerate would train unsharded on a CPU without a word: these are DTensors, or the test is worth nothing."""
    found = of(two, "adalora, before")
    assert len(found["sharded"]) > 20
    assert not any("lora_" in name for name in found["sharded"])
    assert all("lora_" in name for name in found["whole"])
    assert sum("lora_gate" in name for name in found["whole"]) == 6


def test_gradients_that_are_collected_are_averaged_once(two: Any) -> None:
    found, alone = of(two, "collected"), Loop(parts=2, order="whole").run(0, 1)
    assert found["ranks"] == alone["ranks"]


def test_a_step_that_is_bad_on_one_process_is_skipped_on_both(two: Any) -> None:
    found = of(two, "bad step")
    assert found["bad_steps"] == 1
    assert sum(found["ranks"].values()) == 12
    assert found["checksum"] != of(two, "adalora, before")["checksum"]


def test_gradients_become_means_where_any_process_has_one(two: Any) -> None:
    assert of(two, "means") == [[1.5, 3.0], [2.0, 4.0], None, [128.0, 0.5]]


def test_a_run_goes_on_with_as_many_processes_bit_for_bit(two: Any) -> None:
    whole, resumed = of(two, "saved"), of(two, "resumed")
    assert resumed["checksum"] == whole["checksum"]
    assert whole["events"][-len(resumed["events"]) :] == resumed["events"]


def test_a_run_goes_on_with_another_number_of_processes(two: Any) -> None:
    """What is saved knows nothing of processes; on one, the sums of the same batches are rounded otherwise."""
    alone = Loop(method="ablora", order="whole", resume=two[0] / "half").run(0, 1)
    assert alone["ranks"] == of(two, "saved")["ranks"]


def test_nothing_of_the_base_is_saved(two: Any) -> None:
    assert {path.name for path in (two[0] / "half").iterdir()} == {
        *("adapter.safetensors", "optimizer.safetensors", "tensors.safetensors", "numbers.json")
    }
    assert all("lora_" in name for name in load_file(two[0] / "half" / "adapter.safetensors"))


def test_the_first_process_exports_what_all_have_checked(two: Any) -> None:
    for results in two[1]:
        assert results["saved"]["difference"] <= results["saved"]["allowed"]
        assert results["saved"]["path"] == str(two[0] / "adapter")
    tensors = load_file(two[0] / "adapter" / "adapter_model.safetensors")
    ranks = {name: len(value) for name, value in tensors.items() if "lora_A" in name}
    assert sorted(ranks.values()) == sorted(rank for rank in of(two, "saved")["ranks"].values() if rank)


def test_a_head_that_is_saved_whole_is_exported(two: Any) -> None:
    difference, allowed = of(two, "head")
    assert difference <= allowed
    assert "base_model.model.lm_head.weight" in load_file(two[0] / "head" / "adapter_model.safetensors")


def test_other_rounding_is_computed_by_all_processes(two: Any) -> None:
    """A forward pass of a sharded model takes all of them, and each process finds its own differences."""
    assert of(two, "rounding") == check.DRAWS


WHOLE = "ignored_params=loralloc.kept_whole(model)"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        *(
            (
                f"all sharded, {order}",
                "fully_shard has spread the adapter over the processes as well (base_model.model.model.layers.0."
                "self_attn.q_proj.lora_A.default.weight, ...), and ranks are scored and closed whole; build the model "
                f"anew and give {WHOLE} to every call of fully_shard",
            )
            for order in ORDERS
        ),
        (
            "tensor parallel",
            "the weights are split by tensor parallelism (base_model.model.model.layers.0.self_attn.q_proj.base_layer."
            "weight, ...), where a layer's output is spread over processes; load the model without tp_plan, and shard "
            f"it with FSDP2 instead, fully_shard(block, {WHOLE})",
        ),
        (
            "exact",
            'mode="exact" differentiates the backward pass, and FSDP2 has let go of the base weights by then; use '
            'mode="paper", or "fast"',
        ),
        (
            "merged",
            "the base model is sharded over processes, and no process holds a weight to merge into; export "
            'profile="ragged", and merge in one process: export_adapter(PeftModel.from_pretrained(base, "ADAPTER"), '
            'path, profile="merged"), or loralloc export RUN --profile merged',
        ),
    ],
)
def test_what_cannot_be_is_refused_at_once_by_both(name: str, said: str, two: Any) -> None:
    assert of(two, name) == said


def smoke(folder: Path) -> dict[str, Scenario]:
    return {"four": loop(method="ablora", order="after", export=folder / "adapter")}


def test_four_processes(tmp_path: Path) -> None:
    spawn(in_one_process, args=(tmp_path, 4, smoke), nprocs=4)
    found = [json.loads((tmp_path / f"{rank}.json").read_text())["four"] for rank in range(4)]
    assert len({result["checksum"] for result in found}) == 1
    assert found[0]["ranks"] == Loop(method="ablora", order="whole").run(0, 1)["ranks"]
    assert found[0]["sharded"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def joining_late(rank: int, folder: Path) -> None:
    """A loop that attaches before it joins the other process."""
    torch.set_num_threads(1)
    found = Loop(order="after", meet=folder / "store").run(rank, 2)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_processes_may_join_after_attaching(two: Any, tmp_path: Path) -> None:
    spawn(joining_late, args=(tmp_path,), nprocs=2)
    late = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert late[0] == late[1] == of(two, "adalora, after")


def test_zero_3_is_refused() -> None:
    model = tiny_peft("llama").train()
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]
    assert refusal(lambda: attach(model, TWO_RANKS, total_steps=4)) == (
        "DeepSpeed ZeRO-3 has taken the weights apart, so that no process holds a factor of the adapter; shard the "
        f"base model with FSDP2 instead, fully_shard(block, {WHOLE})"
    )


def test_what_is_kept_whole_is_what_is_trained_and_every_gate() -> None:
    model = tiny_peft("bert").train()
    run = attach(model, methods()["truncate"], total_steps=4)
    whole = kept_whole(model)
    assert all(site.gate in whole and not site.gate.requires_grad for site in run.sites)
    assert {p for p in model.parameters() if p.requires_grad} < whole
    base = {id(p) for name, p in model.named_parameters() if "base_layer" in name or "embeddings" in name}
    assert not base & {id(parameter) for parameter in whole}
