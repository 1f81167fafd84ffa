"""Bad steps that are skipped on the device: the host does not wait, and everything else is as if it had.

Fused AdamW skips a step on a CPU as it does on a GPU; only the claim that reading from a CPU is free is taken away.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest
import torch
from models import labelled_batch, tiny_peft
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loralloc import AdaLoRA, ALLoRA, Budget, Uniform, attach
from loralloc.training import bad_steps
from loralloc.training.bad_steps import MAX_BAD_STEPS, StepChecks, can_skip

STEPS, DEVICE = 14, torch.device("cpu")
NAN = float("nan")


@pytest.fixture(autouse=True)
def reading_costs_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_steps, "on_host", lambda device: False)


class Loop:
    """Steps whose batches depend on their number alone; some of them bad."""

    def __init__(self, wait: bool, bad: tuple[int, ...] = (), allora: str | None = None, **settings: Any) -> None:
        self.model = tiny_peft("llama", lora_alpha=4)
        torch.manual_seed(0)
        method = AdaLoRA(Budget(average_rank=2), warmup=2, cooldown=5, interval=2, **settings)
        self.run = attach(self.model, ALLoRA(mode=allora, allocate=method) if allora else method, STEPS)
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=0.01, fused=True)
        self.wait, self.bad = wait, bad

    def backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(**labelled_batch("llama", self.run.step)).loss.backward()
        if self.run.step in self.bad:
            for parameter in self.trained.values():
                parameter.grad.view(-1)[0] = NAN

    def step(self) -> bool | None:
        self.backward()
        sound = self.run.before_step(self.optimizer, wait=self.wait)
        self.optimizer.step()
        self.run.after_step(self.optimizer)
        return sound

    def walk(self, until: int = STEPS) -> Loop:
        while self.run.step < until:
            self.step()
        return self

    def scores(self) -> dict[str, Tensor]:
        return {n: t.clone() for n, t in self.run.state_dict()[0].items()}

    def snapshot(self) -> dict[str, Tensor]:
        moments = {
            f"{n}.{key}": value.clone()
            for n, p in self.trained.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        return {n: p.detach().clone() for n, p in self.trained.items()} | moments | self.scores()


@pytest.mark.parametrize("importance", ["smoothed", "sensitivity"])
@pytest.mark.parametrize("order", ["paper", "reference"])
def test_a_bad_step_moves_nothing_and_a_sound_one_does(order: str, importance: str) -> None:
    loop = Loop(False, bad=(5,), order=order, importance=importance).walk(5)
    before = loop.snapshot()
    assert loop.step() is None
    after = loop.snapshot()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if "lora_gate" not in n), "no gate is due either"
    assert loop.run.bad_steps == 1
    loop.step()
    moved = loop.snapshot()
    assert all(not torch.equal(moved[n], after[n]) for n in loop.trained)
    assert all(torch.isfinite(t).all() for t in moved.values())


@pytest.mark.parametrize("bad", [(), (0,), (4, 5), (3, 6, STEPS - 4, STEPS - 1)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{"order": "paper"}, {"order": "reference"}, {"allora": "hybrid"}, {"allora": "post"}],
    ids=lambda settings: next(iter(settings.values())),
)
def test_a_run_that_does_not_wait_is_the_run_that_does(bad: tuple[int, ...], settings: dict[str, str]) -> None:
    waiting, other = Loop(True, bad, **settings).walk(), Loop(False, bad, **settings).walk()
    for n, parameter in waiting.trained.items():
        torch.testing.assert_close(other.trained[n], parameter, rtol=1e-4, atol=1e-6)
    plans = [loop.run.finish().to_dict() for loop in (waiting, other)]
    assert plans[0] == plans[1]
    assert plans[0]["provenance"]["bad_steps"] == len(bad)
    assert other.events == waiting.events, "in the order of the steps"


class Reads(TorchDispatchMode):
    """Count what needs a number, or a shape, from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("wait", "reads"), [(False, 0), (True, 1)])
def test_a_step_that_does_not_allocate_reads_nothing(monkeypatch: pytest.MonkeyPatch, wait: bool, reads: int) -> None:
    loop = Loop(wait).walk(5)
    assert not loop.run.schedule.closes(5)  # type: ignore[attr-defined]
    loop.backward()
    if not wait:
        monkeypatch.setattr(StepChecks, "settle", lambda self, wait=True: None)  # the verdicts have not arrived
    with Reads() as found:
        loop.run.before_step(loop.optimizer, wait=wait)
        loop.optimizer.step()
        loop.run.after_step(loop.optimizer)
    assert found.found.total() == reads


@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize(("value", "sound"), [(1e30, True), (-3e38, True), (NAN, False), (-float("inf"), False)])
def test_large_is_not_infinite(monkeypatch: pytest.MonkeyPatch, host: bool, value: float, sound: bool) -> None:
    monkeypatch.setattr(bad_steps, "on_host", lambda device: host)
    parameter = torch.nn.Linear(3, 3)
    parameter.weight.grad = torch.zeros(3, 3)
    parameter.weight.grad[1, 2] = value
    assert StepChecks(parameter, lambda step: None).is_sound(0) is sound


@pytest.mark.parametrize("wait", [True, False])
def test_what_the_optimizer_holds_outside_the_model_counts(wait: bool) -> None:
    loop, head = Loop(wait).walk(2), torch.nn.Linear(3, 1)
    loop.optimizer.add_param_group({"params": head.parameters()})
    for step, value in ((2, 1.0), (3, NAN), (4, 1.0)):
        loop.backward()
        head.weight.grad = torch.full((1, 3), value)
        before = {n: p.detach().clone() for n, p in {**loop.trained, "head": head.weight}.items()}
        loop.run.before_step(loop.optimizer, wait=wait)
        loop.optimizer.step()
        loop.run.after_step(loop.optimizer)
        moved = {n for n, p in {**loop.trained, "head": head.weight}.items() if not torch.equal(p, before[n])}
        assert ("head" in moved, len(moved) > 1) == ((False, False) if step == 3 else (True, True))
    assert loop.run.bad_steps == 1


def test_a_bad_gradient_of_the_model_stops_the_momentum_of_what_is_outside() -> None:
    loop, head = Loop(True, bad=(3,)).walk(2), torch.nn.Linear(3, 1)
    loop.optimizer.add_param_group({"params": head.parameters()})
    for _ in range(2):
        before = head.weight.detach().clone()
        head.weight.grad = torch.ones(1, 3)
        loop.step()
    assert torch.equal(head.weight, before)


def test_sparse_gradients_outside_the_model_are_looked_at() -> None:
    parameter, table = torch.nn.Linear(3, 3), torch.nn.Embedding(9, 2, sparse=True)
    optimizer = torch.optim.SGD([*parameter.parameters(), *table.parameters()])
    for scale, sound in ((1.0, True), (NAN, False)):
        parameter.weight.grad = torch.ones(3, 3)
        table.zero_grad()
        (scale * table(torch.tensor([1, 4])).sum()).backward()
        checks = StepChecks(parameter, lambda step: None)
        assert checks.is_sound(0, optimizer) is sound


def test_a_verdict_is_about_one_step() -> None:
    loop = Loop(False, bad=(3,)).walk(3)
    loop.backward()
    loop.run.before_step(loop.optimizer, wait=False)
    assert loop.optimizer.found_inf.item() == 1
    loop.optimizer.step()
    loop.run.after_step(loop.optimizer)
    assert not {"found_inf", "grad_scale"} & vars(loop.optimizer).keys()


def test_bad_steps_without_end_are_given_up() -> None:
    loop = Loop(False)
    loop.run.begin(10 * MAX_BAD_STEPS)
    loop.bad = tuple(range(2, 10 * MAX_BAD_STEPS))
    with pytest.raises(FloatingPointError, match=rf"{MAX_BAD_STEPS + 1} optimizer steps in a row .*; lower"):
        loop.walk(10 * MAX_BAD_STEPS)
    assert loop.run.step == 2 + MAX_BAD_STEPS + 1, "known one step later"


class TestWhatIsSaid:
    @staticmethod
    def checks(bad: Collection[int], until: int = 30, every: int = 10) -> tuple[StepChecks, list[str]]:
        """Verdicts on steps some of which are bad, and the sentences about them."""
        parameter = torch.nn.Linear(2, 2)
        checks, said = StepChecks(parameter, lambda step: None), []
        checks.say, checks.say_every = said.append, every
        for step in range(until):
            parameter.weight.grad = torch.full((2, 2), NAN if step in bad else 1.0)
            assert checks.is_sound(step) is (step not in bad)
        return checks, said

    def test_the_first_at_once_then_one_in_a_while_and_the_sum_at_the_end(self) -> None:
        checks, said = self.checks({3, 4, 12, 13, 14, 29})
        assert said == [
            "step 3 was skipped: a gradient was not finite",
            "step 13 was skipped (4 so far): a gradient was not finite",
            "step 29 was skipped (6 so far): a gradient was not finite",
        ]
        assert checks.conclude(30) == 6
        assert said[3:] == ["6 of 30 steps were skipped: their gradients were not finite"]

    def test_nothing_of_a_sound_run(self) -> None:
        checks, said = self.checks(())
        assert checks.conclude(30) == 0
        assert said == []

    @pytest.mark.parametrize("wait", [True, False])
    def test_a_loop_of_ones_own_warns_in_the_log(self, wait: bool, caplog: pytest.LogCaptureFixture) -> None:
        Loop(wait, bad=(3, 5)).walk().run.finish()
        told = [(record.levelname, record.message) for record in caplog.records]
        assert told == [
            ("WARNING", "step 3 was skipped: a gradient was not finite"),
            ("WARNING", f"2 of {STEPS} steps were skipped: their gradients were not finite"),
        ]

    @pytest.mark.parametrize("warns", [True, False])
    def test_of_several_processes_the_first_one_warns(
        self, warns: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(bad_steps, "is_main", lambda: warns)
        bad_steps._warn("a step was skipped")
        assert (caplog.messages == ["a step was skipped"]) is warns


class TestWhereTheHostHasToWait:
    METHOD = AdaLoRA(Budget(average_rank=2))

    @staticmethod
    def adamw(**settings: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], **settings)

    def test_not_with_a_fused_adam(self) -> None:
        assert can_skip(self.adamw(fused=True), self.METHOD, DEVICE)

    def test_not_with_allora_unless_for_the_method_that_allocates(self) -> None:
        for allocate, skips in ((None, True), (self.METHOD, True), (Uniform(Budget(average_rank=2)), False)):
            assert can_skip(self.adamw(fused=True), ALLoRA(allocate=allocate), DEVICE) is skips

    def test_not_without_a_method(self) -> None:
        assert can_skip(self.adamw(fused=True), None, DEVICE)
        assert not can_skip(self.adamw(), None, DEVICE)

    def test_not_with_one_that_accelerate_has_wrapped(self) -> None:
        wrapped = type("Wrapped", (), {"optimizer": self.adamw(fused=True), "scaler": None})()
        assert can_skip(wrapped, self.METHOD, DEVICE)

    def test_with_a_loss_scaler(self) -> None:
        wrapped = type("Wrapped", (), {"optimizer": self.adamw(fused=True), "scaler": object()})()
        assert not can_skip(wrapped, self.METHOD, DEVICE)

    def test_with_another_optimizer_or_none(self) -> None:
        sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, fused=True)
        for optimizer in (self.adamw(), self.adamw(foreach=True), sgd, None):
            assert not can_skip(optimizer, self.METHOD, DEVICE)

    def test_with_a_method_that_would_see_the_bad_gradients(self) -> None:
        assert not can_skip(self.adamw(fused=True), Uniform(Budget(average_rank=2)), DEVICE)

    def test_on_the_host_where_reading_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        assert not can_skip(self.adamw(fused=True), self.METHOD, DEVICE)
