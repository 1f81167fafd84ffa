"""Numbers that are none, in gradients, losses, activations and scores, at some steps of a loop of one's own.

Steps whose gradients are not finite move nothing and are counted exactly, the ranks meet the budget in the end, and
whatever a run keeps is finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from drills.outcome import Outcome
from drills.tries import Tried, tries
from loralloc import ABLoRA, AdaLoRA, ALLoRA, AutoLoRA, Truncate, Uniform
from loralloc.errors import UserError
from loralloc.methods.base import Method
from loralloc.testing.loop import HALF, STEPS, UNSEEN, Decides, Loop, adamw, may_stay, momentum, with_examples
from loralloc.testing.models import TINY, adapted, logits
from loralloc.training.bad_steps import MAX_BAD_STEPS

PHASES: dict[str, Any] = {"warmup": 2, "cooldown": 7, "interval": 1}
ROUNDS: dict[str, Any] = {"warmup": 3, "interval": 5, "rounds": 3, "samples": 12}

METHODS: dict[str, tuple[Callable[[], Method], Decides]] = {
    "adalora": (lambda: AdaLoRA(HALF, **PHASES), "while training"),
    "adalora as published": (lambda: AdaLoRA.as_published(HALF, **PHASES), "while training"),
    "ablora": (lambda: ABLoRA(HALF, UNSEEN, **ROUNDS), "while training"),
    "ablora by sensitivity": (lambda: ABLoRA(HALF, score="sensitivity", **ROUNDS), "while training"),
    "autolora": (lambda: AutoLoRA(UNSEEN, logit_learning_rate=0.01), "by a search"),
    "allora": (lambda: ALLoRA(mode="hybrid"), "never"),
    "allora over adalora": (lambda: ALLoRA(mode="hybrid", allocate=AdaLoRA(HALF, **PHASES)), "while training"),
    "truncate": (lambda: Truncate(HALF, recover=6), "while training"),
    "uniform": (lambda: Uniform(HALF), "at the start"),
}
VALUES = (math.nan, math.inf, -math.inf)
LARGE = (1e12, -1e18)
"""Numbers that are far too large, and still numbers."""


@dataclass(frozen=True)
class Trouble:
    """What is wrong in a step.

    Attributes:
        where: `gradient`, `loss` or `activation`.
        value: The number.
        place: A random number, which says where it goes.
    """

    where: str
    value: float
    place: int

    @classmethod
    def drawn(cls, random: Random) -> Trouble:
        """Any."""
        where = random.choice(("gradient", "gradient", "loss", "activation"))
        values = (*VALUES, *LARGE) if where == "gradient" else VALUES
        return cls(where, random.choice(values), random.randrange(2**16))


class _Troubled(Loop):
    """A loop with a trouble in some of its steps."""

    troubles: dict[int, Trouble]

    def trouble(self, troubles: dict[int, Trouble]) -> None:
        """Say which; wherever the model computes in such a step, also when a method looks at other data."""
        self.troubles = troubles
        layers = [module for name, module in self.model.named_modules() if name.endswith("base_layer")]
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, __, output, index=index: self._spoil(index, len(layers), output))
        self.model.register_forward_hook(self._spoil_loss)

    def _spoil(self, index: int, count: int, output: Tensor) -> Tensor | None:
        trouble = self.troubles.get(self.run.step)
        if trouble is None or trouble.where != "activation" or trouble.place % count != index:
            return None
        output = output.clone()
        output[..., trouble.place % output.shape[-1]] = trouble.value
        return output

    def _spoil_loss(self, _: Any, __: Any, output: Any) -> Any:
        trouble = self.troubles.get(self.run.step)
        if trouble is not None and trouble.where == "loss" and output.get("loss") is not None:
            output["loss"] = output["loss"] * trouble.value
        return output

    def backward(self, parts: int = 1) -> None:
        """Go through a batch, and spoil a gradient where it is due."""
        super().backward(parts)
        trouble = self.troubles.get(self.run.step)
        if trouble is not None and trouble.where == "gradient":
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            gradient = gradients[trouble.place % len(gradients)].view(-1)
            gradient[trouble.place % len(gradient)] = trouble.value

    def changes_gradient(self, step: int) -> bool:
        """Whether a gradient of a step is another one, and finite."""
        trouble = self.troubles.get(step)
        return trouble is not None and trouble.where == "gradient" and trouble.value in LARGE

    def is_bad(self) -> bool:
        """Whether a gradient is not finite, found one by one."""
        return not all(p.grad is None or bool(p.grad.isfinite().all()) for p in self.trainable.values())


def _drawn(random: Random) -> tuple[str, _Troubled]:
    """A loop, and its troubles: some steps alone, several in a row, or more than a run bears."""
    label, model = random.choice(list(METHODS)), random.choice(list(TINY))
    make, decides = METHODS[label]
    optimizer = random.choice((adamw, momentum))
    steps = STEPS
    pattern = random.choice(("alone", "alone", "in a row", "without end"))
    if pattern == "without end":
        steps = STEPS + MAX_BAD_STEPS + 10
        first = random.randrange(steps)
        steps_of = range(first, first + random.randint(MAX_BAD_STEPS - 3, MAX_BAD_STEPS + 8))
    elif pattern == "in a row":
        first = random.randrange(steps)
        steps_of = range(first, first + random.randint(2, 8))
    else:
        steps_of = random.sample(range(steps), random.randint(1, 5))
    troubles = {step: Trouble.drawn(random) for step in steps_of}
    torch.manual_seed(0)
    alpha = 4 if label.startswith("allora") else 8
    adapter = adapted(TINY[model], lora_alpha=alpha)
    loop = _Troubled(with_examples(make(), model), adapter, model, decides=decides, optimizer=optimizer, steps=steps)
    loop.trouble(troubles)
    return f"{label}, {model}, {optimizer.__name__}, {steps} steps, {troubles}", loop


def _attempt(random: Random) -> Tried:
    case, loop = _drawn(random)
    bad: list[int] = []
    in_a_row = 0
    while loop.run.step < loop.run.schedule.total_steps:
        step = loop.run.step
        loop.backward()
        is_bad = loop.is_bad()
        bad += [step] if is_bad else []
        in_a_row = in_a_row + 1 if is_bad else 0
        try:
            wrong = _step(loop, is_bad)
        except FloatingPointError as error:
            expected = in_a_row > MAX_BAD_STEPS and "optimizer steps in a row had a non-finite gradient" in str(error)
            return Tried(case, expected, "" if expected else f"after {in_a_row} bad steps in a row: {error}")
        except UserError as error:  # a search computes some of its steps again, and finds that a gradient was changed
            expected = loop.changes_gradient(step) and "changes gradients" in str(error)
            return Tried(case, expected, "" if expected else f"step {step}: {error}")
        if wrong:
            return Tried(case, lost=f"step {step}: {wrong}")
    return Tried(case, lost=_wrong_in_the_end(loop, bad))


def _step(loop: _Troubled, is_bad: bool) -> str:
    """Make a step; say what is wrong about it, if anything."""
    before = {name: p.detach().clone() for name, p in loop.trainable.items()} if is_bad else {}
    events = len(loop.events)
    if loop.update() is is_bad:
        return f"a step is taken to be {'sound' if is_bad else 'bad'}"
    decided = any(event["event"] != "bad_step" for event in loop.events[events:])
    moved = [name for name, old in before.items() if "lora_gate" not in name and not old.equal(loop.trainable[name])]
    if moved and not decided:
        return f"a bad step moved {moved[0]}"
    broken = [name for name, tensor in loop.run.state_dict()[0].items() if not tensor.isfinite().all()]
    broken += [name for name, p in loop.trainable.items() if not p.isfinite().all()]
    return f"{', '.join(broken)}: not finite" if broken else ""


def _wrong_in_the_end(loop: _Troubled, bad: list[int]) -> str:
    counted = [event["step"] for event in loop.events if event["event"] == "bad_step"]
    loop.troubles = {}
    overflows = not logits(loop.model).isfinite().all()  # of a gradient that was far too large, and a number
    plan = loop.run.finish()
    if counted != bad or plan.provenance["bad_steps"] != len(bad):
        return f"bad steps {bad} were counted as {counted} and {plan.provenance['bad_steps']}"
    if not may_stay(loop, list(plan.ranks.values())):
        return f"ranks {list(plan.ranks.values())} do not meet the budget"
    finite = overflows or bool(logits(loop.model).isfinite().all())
    return "" if finite else "the finished model computes numbers that are not finite"


def drill(seed: int, cases: int) -> Outcome:
    """Spoil numbers, and count."""
    return tries("numbers", _attempt, cases, seed)
