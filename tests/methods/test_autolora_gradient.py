"""AutoLoRA's gradient of the selection variables, held against closed forms, the naive twin and autograd itself."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from autolora_loop import F64, HELD_OUT, Functions, Loop, batch, net, sgd
from models import labelled_batch, tiny_peft
from reference import autolora as twin
from torch import Tensor

from loralloc import AutoLoRA, UserError, attach
from loralloc.methods.autolora.hypergradient import (
    central_difference,
    global_norm,
    mixed_derivative,
    one_sided_difference,
    train_gradients,
    validation_gradients,
)
from loralloc.methods.autolora.state import softmax_gradient

ETA = 0.1


class Scalars:
    """A data of two numbers, L_tr = ½(w − a·x)² and L_val = ½(w − c)² + ½d·x²; x is the gate, without a softmax."""

    def __init__(self, w: float = 2.0, x: float = 0.5, a: float = 2.0, c: float = 0.0, d: float = 0.3) -> None:
        self.w = torch.tensor([w], dtype=F64, requires_grad=True)
        self.x = torch.tensor([x], dtype=F64, requires_grad=True)
        self.a, self.c, self.d = a, c, d

    def weights(self) -> list[Tensor]:
        return [self.w]

    def train_losses(self, twice: bool = False) -> Iterator[Tensor]:
        yield 0.5 * (self.w - self.a * self.x).square().sum()

    def validation_loss(self) -> Tensor:
        return 0.5 * (self.w - self.c).square().sum() + 0.5 * self.d * self.x.square().sum()

    def gradient(self, mode: str, radius: float = 0.01) -> float:
        """What `mode` computes before the step."""
        method = AutoLoRA([{}], mode=mode, radius=radius)  # type: ignore[arg-type]
        self.w.grad = self.w.detach() - self.a * self.x.detach()
        state: Any = SimpleNamespace(gates=lambda: [self.x], updates=0)
        with torch.no_grad():
            (found,) = method._gradient_before_step(state, self, ETA)
        return found.item()


class TestClosedForms:
    """Spec, 28 to 30 and 35."""

    @pytest.mark.parametrize("radius", [1e-3, 0.01, 10.0])
    @pytest.mark.parametrize(("mode", "expected"), [("paper", 0.53), ("exact", 0.53), ("reference", 3.95)])
    def test_two_numbers(self, mode: str, expected: float, radius: float) -> None:
        assert Scalars().gradient(mode, radius) == pytest.approx(expected, abs=1e-12)

    def test_the_direct_term_alone(self) -> None:
        toy = Scalars()
        direct, v = validation_gradients(toy, [toy.x], [toy.w])
        assert (direct[0].item(), v[0].item()) == pytest.approx((0.15, 2.0))

    def test_one_side_is_enough_where_the_loss_is_quadratic(self) -> None:
        toy = Scalars()
        known = train_gradients(toy, [toy.x])
        v = [torch.tensor([1.9], dtype=F64)]
        (second,) = one_sided_difference(toy, [toy.x], [toy.w], v, 0.01, [toy.w.detach().clone()], known)
        assert second.item() == pytest.approx(-2 * 1.9)
        assert toy.w.item() == 2.0

    @pytest.mark.parametrize("mode", ["paper", "exact", "reference"])
    def test_no_direction_has_no_second_term(self, mode: str) -> None:
        """v = 0: w′ = c. No NaN, and the direct term is left."""
        assert Scalars(c=1.9).gradient(mode) == pytest.approx(0.15)

    def test_no_direction_in_the_one_sided_difference(self) -> None:
        toy = Scalars()
        zero = [torch.zeros(1, dtype=F64)]
        assert not one_sided_difference(toy, [toy.x], [toy.w], zero, 0.01, zero, zero)[0].any()

    def test_softmax_gradient_is_the_jacobian_and_sums_to_zero(self) -> None:
        generator = torch.Generator().manual_seed(0)
        logits, gradient = torch.randn(2, 3, 5, generator=generator, dtype=F64).unbind()
        found = softmax_gradient(torch.softmax(logits, 1), gradient)
        assert found.sum(1) == pytest.approx(0, abs=1e-15)
        for row, g, f in zip(logits.tolist(), gradient, found, strict=True):
            jacobian = torch.tensor(twin.softmax_jacobian(twin.softmax(row)), dtype=F64)
            torch.testing.assert_close(f, jacobian @ g)

    def test_a_fresh_adapter_has_no_gradient_of_the_gates(self) -> None:
        """B = 0: exactly zero on both splits (29). After a step it is not."""
        loop = Loop(optimizer=sgd)
        data, gates = loop.run.data, loop.state.gates()
        assert data is not None
        loop.backward()
        assert not any(g.any() for g in train_gradients(data, gates))
        assert not any(g.any() for g in validation_gradients(data, gates, data.weights())[0])
        loop.update()
        loop.backward()
        assert all(g.any() for g in train_gradients(data, gates))


class TestDifferences:
    """Spec, 31."""

    def loop(self) -> tuple[Any, list[Tensor], list[Tensor], list[Tensor], Functions]:
        loop = Loop().walk(5)
        loop.backward()
        data, gates = loop.run.data, loop.state.gates()
        assert data is not None
        _, v = validation_gradients(data, gates, data.weights())
        return data, gates, data.weights(), v, Functions.of(loop)

    def test_converge_on_the_second_derivative_at_the_rate_of_the_radius(self) -> None:
        data, gates, weights, v, _ = self.loop()
        exact = mixed_derivative(data, gates, weights, v)
        errors = []
        for radius in (0.1, 0.01, 0.001):
            found = central_difference(data, gates, weights, v, radius)
            errors.append(max((f - e).abs().max().item() for f, e in zip(found, exact, strict=True)))
        size = max(e.abs().max().item() for e in exact)
        assert errors[1] < 1e-3 * size
        assert errors[2] < 1e-5 * size
        assert errors[0] / errors[1] == pytest.approx(100, rel=0.3)
        assert errors[1] / errors[2] == pytest.approx(100, rel=0.3)
        assert size > 1e-3

    def test_the_step_is_radius_over_one_norm_of_all_weights(self) -> None:
        data, gates, weights, v, functions = self.loop()
        found = central_difference(data, gates, weights, v, 0.5)  # far enough for the length to matter
        train = functions.loss(batch(5))
        naive = twin.difference(train, [w.detach() for w in weights], functions.gates, v, 0.5)
        torch.testing.assert_close(found, naive)
        assert float(global_norm(v)) == pytest.approx(twin.norm(v))

    def test_weights_come_back_bit_for_bit_and_nothing_lands_in_grad(self) -> None:
        data, gates, weights, v, _ = self.loop()
        before = [w.detach().clone() for w in weights]
        gradients = [None if w.grad is None else w.grad.clone() for w in weights]
        random = torch.get_rng_state()
        central_difference(data, gates, weights, v, 0.01)
        one_sided_difference(data, gates, weights, v, 0.01, before, train_gradients(data, gates))
        mixed_derivative(data, gates, weights, v)
        assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
        for weight, gradient in zip(weights, gradients, strict=True):
            assert (weight.grad is None) == (gradient is None)
            assert gradient is None or torch.equal(weight.grad, gradient)  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), random)


class TestModes:
    """Every mode is what the twin computes around a step of gradient descent (spec, 32 and 33)."""

    def after_one_step(self, mode: str, radius: float = 0.01) -> tuple[Tensor, Functions, int]:
        """The logits' gradient in the step after five of another mode, and what it was computed from."""
        model = net()
        first = Loop("first_order", model, logit_learning_rate=0.2).walk(5)
        tensors = {n: p.detach().clone() for n, p in model.state_dict().items()}
        loop = Loop(mode, net(), radius=radius)
        loop.model.load_state_dict(tensors)
        loop.state.logits.copy_(first.state.logits)
        loop.run.step = 5
        functions = Functions.of(loop)
        loop.backward()
        loop.update()
        return loop.last_gradient(), functions, loop.run.step

    @pytest.mark.parametrize("mode", ["fast", "paper", "exact", "first_order", "reference"])
    def test_the_gradient_is_the_twins(self, mode: str) -> None:
        found, f, _ = self.after_one_step(mode)
        train, validation = f.loss(batch(5)), f.loss(HELD_OUT[0])
        expected = twin.hypergradient(mode, train, validation, f.weights, f.gates, ETA)
        in_logits = softmax_gradient(torch.stack(f.gates), torch.stack(expected))
        torch.testing.assert_close(found, in_logits, rtol=1e-6, atol=1e-12)

    def test_modes_differ_by_what_they_say(self) -> None:
        """Exact is the unrolled step; the differences are near it, the first order and the reference are not."""
        found = {mode: self.after_one_step(mode)[0] for mode in ("fast", "paper", "exact", "first_order", "reference")}
        distance = {mode: (gradient - found["exact"]).norm().item() for mode, gradient in found.items()}
        assert distance["paper"] < 1e-6
        assert distance["fast"] < 1e-3
        assert distance["first_order"] > 10 * distance["fast"]
        assert distance["reference"] > 5 * distance["first_order"]

    @pytest.mark.parametrize("mode", ["fast", "paper", "exact"])
    def test_without_a_learning_rate_only_the_direct_term_is_left(self, mode: str) -> None:
        def frozen(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, lr=0.0)

        def gradient(mode: str) -> Tensor:
            loop = Loop(mode, optimizer=frozen)
            for site in loop.run.sites:
                torch.nn.init.ones_(site.B)
            loop.backward()
            loop.update()
            return loop.last_gradient()

        assert gradient("first_order").abs().max() > 1e-4
        assert torch.equal(gradient(mode), gradient("first_order"))


class TestRepeatedStep:
    """Modes that repeat the step's gradient under the new logits (spec, 34)."""

    @pytest.mark.parametrize("mode", ["paper", "exact", "reference"])
    def test_the_step_is_taken_from_the_old_weights_with_the_new_logits(self, mode: str) -> None:
        loop = Loop(mode, logit_learning_rate=0.3).walk(4)
        f = Functions.of(loop)
        loop.backward()
        loop.update()
        new = [site.gate.detach().clone() for site in loop.run.sites]
        assert all((n - o).abs().max() > 0.01 for n, o in zip(new, f.gates, strict=True))
        train = f.loss(batch(4))
        weights = [p for n, p in loop.model.named_parameters() if n in f.names]
        with_new = twin.moved(f.weights, twin.gradient(train, f.weights, new)[0], -ETA)
        with_old = twin.moved(f.weights, twin.gradient(train, f.weights, f.gates)[0], -ETA)
        torch.testing.assert_close(weights, with_new, check_dtype=False)
        assert max((w - o).abs().max().item() for w, o in zip(weights, with_old, strict=True)) > 1e-4

    @pytest.mark.parametrize("norm", [0.05, 1e3])
    def test_the_repeated_gradient_is_clipped_where_the_step_was(self, norm: float) -> None:
        loop = Loop("paper", logit_learning_rate=0.3).walk(4)
        loop.run.max_grad_norm = norm
        f = Functions.of(loop)
        loop.backward()
        parameters = [p for p in loop.model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grad_norm_(parameters, norm)
        loop.run.before_step(loop.optimizer)
        gates = [site.gate.detach() for site in loop.run.sites]
        free, _ = twin.gradient(f.loss(batch(4)), f.weights, gates)
        factor = min(1.0, norm / twin.norm(free))
        assert (factor < 1) == (norm < 1)
        found = [p.grad for n, p in loop.model.named_parameters() if n in f.names]
        for gradient, expected in zip(found, free, strict=True):
            torch.testing.assert_close(gradient, factor * expected, rtol=1e-4, atol=1e-9)


class TestDropout:
    """All passes of a step share its masks (spec, 36)."""

    def differences(self, replay: bool) -> Tensor:
        loop = Loop(model=net(dropout=0.1)).walk(5)
        data, gates = loop.run.data, loop.state.gates()
        assert data is not None
        loop.backward()
        _, v = validation_gradients(data, gates, data.weights())

        class Redrawn:
            """The same batch with new masks every time."""

            def train_losses(self, twice: bool = False) -> Iterator[Tensor]:
                yield loop.model(**batch(5)).loss

        source: Any = data if replay else Redrawn()
        found = []
        for seed in range(12):
            torch.manual_seed(seed)
            found.append(torch.cat(central_difference(source, gates, data.weights(), v, 0.01)))
        return torch.stack(found)

    def test_shared_masks_repeat_bit_for_bit_and_new_ones_drown_the_difference(self) -> None:
        shared, redrawn = self.differences(replay=True), self.differences(replay=False)
        assert all(torch.equal(row, shared[0]) for row in shared)
        assert shared[0].abs().max() > 0
        noise = redrawn.std(0).mean() / shared[0].abs().mean()
        assert noise > 5


class TestPasses:
    """What a step costs (spec, 42): forward and backward passes, the step's own included."""

    PASSES: ClassVar = {"fast": (3, 3), "first_order": (2, 2), "paper": (5, 5), "reference": (5, 5), "exact": (4, 5)}

    @pytest.mark.parametrize("parts", [1, 3])
    @pytest.mark.parametrize("mode", PASSES)
    def test_are_as_documented(self, mode: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_peft("llama")
        run = attach(model, AutoLoRA([labelled_batch("llama", 99)], mode=mode), 9)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        count = {"forward": 0, "backward": 0}
        model.register_forward_hook(lambda *_: count.update(forward=count["forward"] + 1))
        engine = torch.autograd.graph._engine_run_backward

        def counted(*args: Any, **kwargs: Any) -> Any:
            count["backward"] += 1
            return engine(*args, **kwargs)

        for module in (torch.autograd, torch.autograd.graph):
            monkeypatch.setattr(module, "_engine_run_backward", counted)
        for _ in range(3):  # the first two steps are compared with what comes out again
            count.update(forward=0, backward=0)
            optimizer.zero_grad()
            for part in range(parts):
                (model(**labelled_batch("llama", part)).loss / parts).backward()
            run.before_step(optimizer)
            optimizer.step()
            run.after_step(optimizer)
        forward, backward = self.PASSES[mode]
        # Validation takes one batch a step, however many the step has.
        assert (count["forward"], count["backward"]) == ((forward - 1) * parts + 1, (backward - 1) * parts + 1)


class TestRefusals:
    @pytest.mark.parametrize("mode", ["fast", "paper", "exact", "first_order"])
    def test_reentrant_checkpointing(self, mode: str) -> None:
        model = tiny_peft("llama")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        run = attach(model.train(), AutoLoRA([labelled_batch("llama", 99)], mode=mode), 9)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(**labelled_batch("llama")).loss.backward()
        step = run.after_step if mode == "first_order" else run.before_step
        if mode == "first_order":
            run.before_step(optimizer)
        with pytest.raises(UserError, match=r'reentrant gradient checkpointing.*"use_reentrant": False'):
            step(optimizer)

    @pytest.mark.parametrize("mode", ["fast", "paper", "exact"])
    def test_checkpointing_without_reentry_works(self, mode: str) -> None:
        found = []
        for checkpointing in (False, True):
            model = tiny_peft("llama").train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.enable_input_require_grads()
            run = attach(model, AutoLoRA([labelled_batch("llama", 99)], mode=mode), 9)  # type: ignore[arg-type]
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
            for step in range(2):
                model(**labelled_batch("llama", step)).loss.backward()
                run.before_step(optimizer)
                optimizer.step()
                run.after_step(optimizer)
                optimizer.zero_grad()
            found.append(run.state.mean)
        torch.testing.assert_close(found[0], found[1])
        assert found[0].abs().max() > 0

    def test_a_layer_without_second_derivatives(self) -> None:
        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                return gradient * 2

        loop = Loop("exact")
        loop.model.base_model.model.dropout.forward = Once.apply  # type: ignore[union-attr]
        for site in loop.run.sites:
            torch.nn.init.ones_(site.B)
        loop.backward()
        with pytest.raises(UserError, match=r'mode="exact" needs second derivatives.*use mode="paper"'):
            loop.run.before_step(loop.optimizer)

    def test_an_optimizer_that_was_not_shown(self) -> None:
        loop = Loop()
        loop.backward()
        with pytest.raises(UserError, match=r"needs the learning rate.*run.before_step\(optimizer\)"):
            loop.run.before_step()
        loop = Loop("first_order")
        loop.backward()
        assert loop.run.before_step()
