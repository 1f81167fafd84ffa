"""Training data before the first step: a start that is made of what the layers see."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from models import labelled_batch, logits, tiny_peft
from peft import PeftModel
from torch import Tensor, nn

from loralloc import AdaLoRA, AutoLoRA, Budget, UserError, attach
from loralloc.allocate import select
from loralloc.gating import Site
from loralloc.methods.base import Method, TrainingBatch, agree, modules_of
from loralloc.schedule import ConstantSchedule
from loralloc.training.run import AllocationRun

BATCHES = [labelled_batch("llama", seed) for seed in range(3)]


@dataclass(eq=False)
class Seen:
    """The layers, and how often data were looked at."""

    sites: Sequence[Site]
    calls: int = 0


@dataclass(frozen=True)
class Activations(Method):
    """A starts with the right singular vectors of a layer's inputs; ranks go where they tell most of them (EVA)."""

    id: ClassVar[str] = "activations"
    label: ClassVar[str] = "activations"

    budget: Budget | None = None

    def schedule(self, total_steps: int, start: int, target: int) -> ConstantSchedule:
        return ConstantSchedule(total_steps, target, target)

    def prepare(self, sites: Sequence[Site]) -> Seen:
        for site in sites:
            site.freeze_gate()
        return Seen(sites)

    def calibrate(self, state: Seen, batches: Iterable[TrainingBatch]) -> None:
        inputs: dict[str, list[Tensor]] = {site.name: [] for site in state.sites}

        def keep(name: str) -> Any:
            return lambda layer, args: inputs[name].append(args[0].flatten(0, -2))

        hooks = [site.layer.register_forward_pre_hook(keep(site.name)) for site in state.sites]
        for batch in batches:
            assert not torch.is_grad_enabled()
            assert not any(site.layer.training for site in state.sites)
            batch.forward()
        for hook in hooks:
            hook.remove()
        explained = []
        for site in state.sites:
            _, sigma, V = torch.linalg.svd(torch.cat(inputs[site.name]), full_matrices=False)
            site.A.copy_(V[: site.rank])
            explained.append((sigma.square() / sigma.square().sum())[: site.rank])
        if self.budget is not None:
            modules = modules_of(state.sites)
            kept = agree(select(torch.cat(explained), self.budget, modules, self.budget.resolve(modules)))
            for site, open_ranks in zip(state.sites, kept.split([site.rank for site in state.sites]), strict=True):
                site.set_scale(open_ranks)
        state.calls += 1

    def finish(self, state: Seen, target: int) -> Tensor:
        return torch.cat([site.scale != 0 for site in state.sites])


@dataclass(frozen=True)
class Careless(Activations):
    """Leaves a trace wherever it can."""

    def calibrate(self, state: Seen, batches: Iterable[TrainingBatch]) -> None:
        for batch in batches:
            with torch.enable_grad():
                batch.forward().loss.backward()
            assert state.sites[0].B.grad is not None
            state.sites[0].layer.train()
            torch.rand(3)


def inner(model: PeftModel) -> Any:
    """The Llama without adapter and head."""
    return cast(Any, model.get_base_model()).model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def calibrated(budget: Budget | None = None) -> tuple[PeftModel, AllocationRun]:
    model = tiny_peft("llama").train()
    run = attach(model, Activations(budget), total_steps=4)
    run.calibrate(BATCHES)
    return model, run


def walk(model: PeftModel, run: AllocationRun, steps: int) -> None:
    optimizer = optimizer_of(model)
    for step in range(steps):
        model(**BATCHES[step % 3]).loss.backward()
        run.before_step(optimizer)
        optimizer.step()
        run.after_step(optimizer)
        optimizer.zero_grad()


def test_a_starts_from_what_the_layers_see() -> None:
    base = logits(tiny_peft("llama"))
    model, run = calibrated()
    assert run.state.calls == 1
    for site in run.sites:
        torch.testing.assert_close(site.A @ site.A.T, torch.eye(site.rank))
    first, llama = run.sites[0], inner(model)
    embedded = torch.cat([llama.embed_tokens(batch["input_ids"]).flatten(0, 1) for batch in BATCHES])
    _, _, V = torch.linalg.svd(llama.layers[0].input_layernorm(embedded), full_matrices=False)
    torch.testing.assert_close((first.A * V[: first.rank]).sum(1).abs(), torch.ones(first.rank))
    torch.testing.assert_close(logits(model), base)  # B is still 0


def test_the_run_goes_on_as_any_other() -> None:
    model, run = calibrated()
    walk(model, run, 4)
    assert run.state.calls == 1
    assert run.finish().total_rank == 24


def test_ranks_that_the_data_close_are_closed_from_the_start() -> None:
    events: list[dict[str, Any]] = []
    model, run = calibrated(Budget(total_rank=9))
    run.on_event = events.append
    assert run.statistics()["rank/total"] == 9
    walk(model, run, 4)
    plan = run.finish()
    assert plan.total_rank == sum(module.start for module in plan.modules.values()) == 9
    assert sum(events[0]["ranks"]) == 9
    assert len(set(plan.ranks.values())) > 1


def test_modes_gradients_and_random_states_are_as_before() -> None:
    model = tiny_peft("llama", lora_dropout=0.5).train()
    inner(model).layers[0].eval()  # modules of several modes
    run = attach(model, Careless(), total_steps=4)
    model(**BATCHES[0]).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    values = {n: grad.clone() for n, grad in gradients.items() if grad is not None}
    modes = {n: module.training for n, module in model.named_modules()}
    random, required = torch.get_rng_state(), {n: p.requires_grad for n, p in model.named_parameters()}
    run.calibrate(BATCHES)
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: module.training for n, module in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    for n, parameter in model.named_parameters():
        assert parameter.grad is gradients[n]
        assert parameter.grad is None or torch.equal(parameter.grad, values[n])
    assert values
    assert torch.is_grad_enabled()


def test_they_are_as_before_also_where_it_fails() -> None:
    model = tiny_peft("llama").train()
    run = attach(model, Activations(), total_steps=4)
    with pytest.raises(UserError, match=r"batches as the model does, mappings .*, and this one is a str; a single bat"):
        run.calibrate(cast(Any, BATCHES[0]))  # one batch, in no list
    assert model.training


@pytest.mark.parametrize(
    "method", [AdaLoRA(Budget(average_rank=2)), AutoLoRA(BATCHES, mode="first_order")], ids=lambda method: method.id
)
def test_methods_that_need_none_leave_the_batches_alone(method: Method) -> None:
    model = tiny_peft("llama").train()
    run = attach(model, method, total_steps=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.calibrate(iter(BATCHES))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    walk(model, run, 4)
    assert run.finish().total_rank > 0


class TestRefusals:
    def test_after_the_first_step(self) -> None:
        model = tiny_peft("llama").train()
        run = attach(model, Activations(), total_steps=4)
        walk(model, run, 1)
        expected = (
            r"the start of a run, and this one is at step 1; call it right after attach\(\), and not in a run that"
        )
        with pytest.raises(UserError, match=expected):
            run.calibrate(BATCHES)

    def test_after_the_end(self) -> None:
        _, run = calibrated()
        run.finish()
        with pytest.raises(UserError, match="the start of a run, and this one is finished"):
            run.calibrate(BATCHES)

    def test_twice(self) -> None:
        _, run = calibrated()
        with pytest.raises(UserError, match=r"calibrated already; give calibrate\(\) all batches in one call"):
            run.calibrate(BATCHES)
        assert run.state.calls == 1
