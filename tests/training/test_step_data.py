"""The data of a run as a method may look at them: replayed steps, validation batches, and no trace left behind."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from models import labelled_batch, tiny_peft
from torch import Tensor, nn

from loralloc import UserError
from loralloc.gating import attach_gates
from loralloc.training.precision import prepared_dtype
from loralloc.training.step_data import CollatedBatches, ObservedData


def watched(name: str = "llama", validation: Any = None, **lora: Any) -> tuple[nn.Module, ObservedData]:
    model = tiny_peft(name, trained=True, **lora).train()
    held_out = [labelled_batch(name, 90 + i) for i in range(3)] if validation is None else validation
    return model, ObservedData(model, attach_gates(model), held_out)


def gradients(data: ObservedData) -> list[Tensor]:
    """The step's gradient of the weights, computed again."""
    total = [torch.zeros_like(w) for w in data.weights()]
    for loss in data.train_losses():
        found = torch.autograd.grad(loss, data.weights())
        total = [t + g for t, g in zip(total, found, strict=True)]
    return total


def matches(data: ObservedData) -> bool:
    """Whether the step computed again is the step."""
    pairs = zip(gradients(data), data.weights(), strict=True)
    return all(w.grad is not None and torch.allclose(g, w.grad, rtol=1e-5, atol=1e-8) for g, w in pairs)


SCALINGS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda loss, parts: loss / parts,
    "sum": lambda loss, parts: loss,
    "processes": lambda loss, parts: 4 * loss / parts,
    "weighted": lambda loss, parts: loss * loss.detach(),
}


class TestReplay:
    @pytest.mark.parametrize("scaling", SCALINGS)
    @pytest.mark.parametrize("name", ["llama", "bert"])
    def test_the_steps_gradient_comes_back_however_the_loop_scales_it(self, name: str, scaling: str) -> None:
        model, data = watched(name)
        for part in range(3):
            SCALINGS[scaling](model(**labelled_batch(name, part)).loss, 3).backward()
        assert matches(data)

    def test_items_in_the_batch_are_passed_on(self) -> None:
        model, data = watched()
        for part in range(2):
            model(**labelled_batch("llama", part), num_items_in_batch=torch.tensor(40)).loss.backward()
        assert matches(data)

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_a_batch_whose_gradients_the_loop_has_dropped_does_not_count(self, set_to_none: bool) -> None:
        """As in a loop, or a Trainer with auto_find_batch_size, that goes on after it has run out of memory."""
        model, data = watched()
        model(**labelled_batch("llama", 7)).loss.backward()
        model.zero_grad(set_to_none)
        for part in range(2):
            (model(**labelled_batch("llama", part)).loss / 2).backward()
        assert len(list(data.train_losses())) == 2
        assert matches(data)

    def test_passes_before_one_backward_are_one_step(self) -> None:
        model, data = watched()
        losses = [model(**labelled_batch("llama", part)).loss for part in range(2)]
        torch.stack(losses).sum().backward()
        assert len(list(data.train_losses())) == 2
        assert matches(data)

    def test_positional_inputs_count(self) -> None:
        model, data = watched()
        batch = labelled_batch("llama")
        model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss.backward()
        assert matches(data)

    def test_dropout_has_the_masks_it_had(self) -> None:
        model, data = watched(lora_dropout=0.5)
        torch.manual_seed(7)
        for part in range(2):
            (model(**labelled_batch("llama", part)).loss / 2).backward()
        torch.manual_seed(8)
        assert matches(data)
        model.eval()  # the partner: without the masks it is another step
        assert not matches(data)

    @pytest.mark.parametrize("outside", [True, False], ids=["around the model", "in its forward"])
    def test_autocast_is_what_it_was(self, outside: bool) -> None:
        model, data = watched()
        with torch.no_grad():
            plain = model(**labelled_batch("llama")).loss.item()
        if not outside:  # as accelerate does
            model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
            loss = model(**labelled_batch("llama")).loss
        loss.backward()
        assert [value.item() for value in data.train_losses()] == [loss.item()]
        assert loss.item() != plain

    @pytest.mark.parametrize(("mixed", "expected"), [("no", torch.float32), ("bf16", torch.bfloat16)])
    def test_the_precision_is_that_of_accelerates_autocast_too(self, mixed: str, expected: torch.dtype) -> None:
        """It is in the model's forward, where nothing around the model can see it."""
        AcceleratorState._reset_state(reset_partial_state=True)  # one process has one precision
        model, data = watched()
        prepared = Accelerator(cpu=True, mixed_precision=mixed).prepare_model(model)
        prepared(**labelled_batch("llama")).loss.backward()
        assert data.precision() == expected
        assert prepared_dtype(model) == (None if mixed == "no" else expected)
        AcceleratorState._reset_state(reset_partial_state=True)

    def test_only_what_was_learned_from_is_the_steps(self) -> None:
        """Neither an evaluation nor a pass whose loss nobody differentiates."""
        model, data = watched()
        with torch.no_grad():
            model(**labelled_batch("llama", 5))
        model(**labelled_batch("llama", 6))
        model(**labelled_batch("llama", 0)).loss.backward()
        assert len(list(data.train_losses())) == 1
        assert matches(data)

    def test_a_model_in_evaluation_mode_learns_too(self) -> None:
        model, data = watched()
        model.eval()
        model(**labelled_batch("llama")).loss.backward()
        assert matches(data)

    def test_a_step_is_forgotten_when_it_is_over(self) -> None:
        model, data = watched()
        model(**labelled_batch("llama")).loss.backward()
        data.forget()
        with pytest.raises(UserError, match=r"batches of this step are not known.*train on model\(\*\*batch\).loss"):
            next(data.train_losses())

    def test_one_graph_is_alive_at_a_time(self) -> None:
        model, data = watched()
        for part in range(3):
            (model(**labelled_batch("llama", part)).loss / 3).backward()
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        losses = data.train_losses()
        next(losses)
        assert len(calls) == 1
        assert len(list(losses)) == 2


class TestNoTrace:
    def test_looking_changes_nothing(self) -> None:
        model, data = watched(lora_dropout=0.5)
        model(**labelled_batch("llama")).loss.backward()
        tensors = {n: t.clone() for n, t in model.state_dict().items()}
        slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        random = torch.get_rng_state()
        torch.autograd.grad(data.validation_loss(), data.weights())
        gradients(data)
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())
        assert {n for n, p in model.named_parameters() if p.grad is not None} == set(slopes)
        assert all(torch.equal(p.grad, slopes[n]) for n, p in model.named_parameters() if p.grad is not None)
        assert matches(data), "what it looked at is no batch of the step"

    def test_looking_is_no_step_even_when_it_fails(self) -> None:
        model, data = watched(validation=[{"input_ids": torch.ones(1, 3, dtype=torch.long)}])
        model(**labelled_batch("llama")).loss.backward()
        with pytest.raises(UserError, match="the model returned no loss: batches must hold labels"):
            data.validation_loss()
        assert matches(data)

    def test_closing_stops_the_watch(self) -> None:
        model, data = watched()
        data.close()
        model(**labelled_batch("llama")).loss.backward()
        assert not list(model._forward_hooks.values()) + list(model._forward_pre_hooks.values())
        with pytest.raises(UserError, match="not known"):
            next(data.train_losses())


class TestRefusals:
    def test_a_loss_of_ones_own(self) -> None:
        model, data = watched()
        batch = labelled_batch("llama")
        logits = model(**batch).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).backward()
        with pytest.raises(UserError, match="no gradient came through the loss that the model returns"):
            next(data.train_losses())

    def test_a_loss_that_weighs_tokens_by_their_probability(self) -> None:
        model, data = watched()
        output = SimpleNamespace(log_probs=None)

        def forward(**batch: Any) -> Any:
            output.log_probs = torch.log_softmax(model.base_model(**batch).logits, -1)[..., 0]
            return output

        model.forward = forward  # type: ignore[method-assign]
        found = model(**labelled_batch("llama")).log_probs
        (-found * found.exp().detach()).sum().backward()
        with pytest.raises(UserError, match=r"weights tokens by the model's own predictions.*train on model"):
            next(data.train_losses())
        data.forget()
        data._weights_checked = False
        (-model(**labelled_batch("llama")).log_probs).sum().backward()  # the partner: a plain sum will do
        assert torch.isfinite(next(data.train_losses()))

    def test_the_gradient_scaler_of_fp16(self) -> None:
        model, data = watched()
        (model(**labelled_batch("llama")).loss * 65536).backward()
        with pytest.raises(UserError, match=r"multiplied by 65536 before backward.*fp16.*use bf16"):
            next(data.train_losses())

    def test_no_validation_data(self) -> None:
        _, data = watched(validation=[])
        with pytest.raises(UserError, match="the validation data are empty"):
            data.validation_loss()


class TestValidation:
    def test_batches_come_in_turn_and_start_again(self) -> None:
        model, data = watched()
        drawn = [data.validation_loss().item() for _ in range(4)]
        assert drawn[3] == drawn[0]
        assert len(set(drawn)) == 3
        with torch.no_grad():
            assert drawn[1] == model(**labelled_batch("llama", 91)).loss.item()

    def test_a_resumed_probe_goes_on_where_it_stopped(self) -> None:
        _, first = watched()
        _, second = watched()
        losses = [first.validation_loss().item() for _ in range(2)]
        second.load_state_dict(first.state_dict())
        third = second.validation_loss().item()
        assert third not in losses
        assert third == first.validation_loss().item()

    def test_collated_batches_are_passes_in_their_own_order(self) -> None:
        batches = CollatedBatches(list(range(10)), lambda rows: {"rows": rows}, 4, seed=3)
        passes = [[batches[3 * p + i]["rows"] for i in range(3)] for p in range(2)]
        assert [[len(rows) for rows in one] for one in passes] == [[4, 4, 2]] * 2
        flat = [[row for rows in one for row in rows] for one in passes]
        assert all(sorted(one) == list(range(10)) for one in flat)
        assert flat[0] != flat[1]
        again = CollatedBatches(list(range(10)), lambda rows: {"rows": rows}, 4, seed=3)
        assert again[4] == batches[4], "it depends on the index alone"
        assert CollatedBatches(list(range(10)), lambda rows: {"rows": rows}, 4, seed=4)[0] != batches[0]

    def test_weights_are_what_is_trained_without_the_gates(self) -> None:
        model, data = watched("bert")
        names = {id(p): n for n, p in model.named_parameters()}
        found = {names[id(w)] for w in data.weights()}
        assert found == {n for n, p in model.named_parameters() if p.requires_grad and "lora_gate" not in n}
        assert any("classifier" in n for n in found)
