"""The contenders that are timed: one training step of each, in parts that can be counted separately.

Every contender is checked before it is timed. One that cannot be built or fails its check is recorded with the reason.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from shapes import Shape
from torch import Tensor, nn

from loralloc import native

STEPS = 100_000
"""Length of the run that the steps belong to: every timed step lies in the phase in which the budget falls."""

INTERVAL = 10
"""Steps between two allocations, for every contender that allocates."""


@dataclass(frozen=True)
class Setting:
    """What the contenders of one comparison share.

    Attributes:
        shape: The model and its batch.
        rank: Starting rank of every adapter.
        device: `cpu` or `cuda`.
        adapter: Dtype of the adapter: `fp32` (PEFT's choice, whatever the base has) or `bf16`.
    """

    shape: Shape
    rank: int = 12
    device: str = "cpu"
    adapter: str = "fp32"


class Step:
    """A frozen model with LoRA from PEFT, and one step of training. The other contenders change parts of it."""

    learning_rate = 1e-3

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        base = setting.shape.build(setting.device)
        self.inputs = setting.shape.inputs(setting.device)
        with torch.no_grad():
            self.base_loss = base(**self.inputs).loss
        torch.manual_seed(1)
        self.model = self.adapt(base)
        if setting.adapter == "bf16":
            for name, parameter in self.model.named_parameters():
                if "lora_" in name and "lora_gate" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        self.prepare()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trained)
        # The Trainer's default, fused.
        self.optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=0.0, fused=True)

    def adapt(self, base: nn.Module) -> nn.Module:
        """Put the adapter on the model."""
        return get_peft_model(base, self.lora_config())

    def lora_config(self, **settings: Any) -> LoraConfig:
        """The configuration that contenders share."""
        shape, rank = self.setting.shape, self.setting.rank
        targets = shape.targets if isinstance(shape.targets, str) else list(shape.targets)
        task = "SEQ_CLS" if shape.family == "bert" else "CAUSAL_LM"
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type=task, **settings)

    def prepare(self) -> None:
        """What has to happen before the optimizer exists."""

    def step(self) -> Tensor:
        """One whole step; returns the loss."""
        loss = self.loss()
        loss.backward()
        self.before_step()
        self.optimizer.step()
        self.after_step()
        self.optimizer.zero_grad()
        return loss.detach()

    def loss(self) -> Tensor:
        """Forward pass."""
        return self.model(**self.inputs).loss

    def before_step(self) -> None:
        """The allocator's part before the optimizer's step."""

    def after_step(self) -> None:
        """The allocator's part after the optimizer's step."""

    def check(self, steps: int = 5) -> None:
        """Refuse a contender that does not start with the base model's loss, or does not learn; also warms up."""
        losses = [self.step().item() for _ in range(steps)]
        tolerance = 1e-4 if self.setting.shape.dtype == torch.float32 else 5e-2
        if abs(losses[0] - self.base_loss.item()) > tolerance:
            raise AssertionError(f"its first loss is {losses[0]}, the frozen model's is {self.base_loss.item()}")
        if not losses[-1] < losses[0]:
            raise AssertionError(f"its loss does not fall: {losses}")


class Frozen(Step):
    """The lower limit: a forward pass, and the gradient with respect to the input alone."""

    def adapt(self, base: nn.Module) -> nn.Module:
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.gradients: list[Tensor] = []
        base.get_input_embeddings().register_forward_hook(self._leaf)
        return base

    def _leaf(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        self.gradients = [leaf]
        return leaf

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.inputs = setting.shape.inputs(setting.device)
        self.model, self.parameters = self.adapt(setting.shape.build(setting.device)), 0

    def step(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss.detach()

    def check(self, steps: int = 5) -> None:
        for _ in range(steps):
            self.step()
        if not torch.isfinite(self.gradients[0].grad).all() or not self.gradients[0].grad.any():  # type: ignore[union-attr]
            raise AssertionError("no gradient reached the input")


class FullFineTuning(Step):
    """Every weight is trained."""

    learning_rate = 1e-5

    def adapt(self, base: nn.Module) -> nn.Module:
        return base


class PeftAdaLoRA(Step):
    """PEFT's AdaLoRA with all its calls: labels in the batch, so that the penalty is there, and update_and_allocate."""

    def adapt(self, base: nn.Module) -> nn.Module:
        shared = self.lora_config().to_dict()
        self.done = 0
        config = AdaLoraConfig(
            init_r=self.setting.rank,
            target_r=max(1, 2 * self.setting.rank // 3),
            # PEFT divides by the rank, as LoRA does: the same scale
            lora_alpha=shared["lora_alpha"],
            tinit=1,
            tfinal=1,
            deltaT=INTERVAL,
            total_step=STEPS,
            orth_reg_weight=0.1,
            target_modules=shared["target_modules"],
            task_type=shared["task_type"],
        )
        return get_peft_model(base, config)

    def after_step(self) -> None:
        self.model.base_model.update_and_allocate(self.done)
        self.done += 1

    def check(self, steps: int = 5) -> None:
        with torch.no_grad():
            penalty = self.loss() - self.base_loss
        if not penalty > 0.01:
            raise AssertionError(f"the orthogonality penalty is missing from the loss: it adds {penalty.item()}")
        self.base_loss = self.base_loss + penalty
        super().check(steps)
        allocator = self.model.base_model.rankallocator
        sites = sum("lora_A" in name for name, _ in self.model.named_parameters())
        if len(allocator.exp_avg_unc) != 3 * sites or not all(t.any() for t in allocator.exp_avg_ipt.values()):
            raise AssertionError("update_and_allocate has not seen every factor of every layer")


@contextmanager
def kernel_in_cpp(wanted: bool) -> Iterator[None]:
    """Compute with the kernel in C++, or with the one in Python also where that in C++ has been built.

    Raises:
        RuntimeError: It has not been built.
    """
    built = native.loaded() if wanted else None
    if wanted and built is None:
        raise RuntimeError("the kernel in C++ has not been built: loralloc build-kernel")
    before, native.loaded = native.loaded, lambda: built
    try:
        yield
    finally:
        native.loaded = before


class Attached(Step, ABC):
    """A method of loralloc on the same LoRA, in the documented loop."""

    compact = False
    in_cpp = False

    def step(self) -> Tensor:
        with kernel_in_cpp(self.in_cpp):
            return super().step()

    @abstractmethod
    def method(self, loralloc: Any) -> Any:
        """Return the method, from the public API."""

    def prepare(self) -> None:
        loralloc = importlib.import_module("loralloc")
        self.run = loralloc.attach(self.model, self.method(loralloc), total_steps=STEPS, compact=self.compact)
        self.events: list[dict[str, Any]] = []
        self.run.on_event = self.events.append

    def before_step(self) -> None:
        self.run.before_step(self.optimizer, wait=False)

    def after_step(self) -> None:
        self.run.after_step(self.optimizer)

    def check(self, steps: int = 5) -> None:
        super().check(steps)
        if self.run.step < steps or self.run.bad_steps:
            raise AssertionError(f"{self.run.step} steps, {self.run.bad_steps} bad ones")


class AdaLoRA(Attached):
    """Our AdaLoRA: same starting rank, target, interval and penalty weight as PEFT's."""

    def method(self, loralloc: Any) -> Any:
        budget = loralloc.Budget(average_rank=max(1, 2 * self.setting.rank // 3))
        return loralloc.AdaLoRA(budget, warmup=1, cooldown=2, interval=INTERVAL)

    def check(self, steps: int = 5) -> None:
        super().check(steps)
        scores = [t for name, t in self.run.state_dict()[0].items() if "mean" in name]
        if not scores or not all(t.any() for t in scores):
            raise AssertionError("a factor has no score")


class CompactAdaLoRA(Attached):
    """Our AdaLoRA in its final phase, with closed ranks removed from the tensors: a quarter is left."""

    FREEZE_AFTER = 4
    compact = True

    def method(self, loralloc: Any) -> Any:
        budget = loralloc.Budget(average_rank=self.setting.rank / 4)
        return loralloc.AdaLoRA(budget, warmup=1, cooldown=STEPS - self.FREEZE_AFTER, interval=1)

    def check(self, steps: int = 2 * FREEZE_AFTER) -> None:
        before = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        super().check(steps)
        self.parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if not self.events[-1]["event"] == "freeze" or not self.parameters < 0.5 * before:
            raise AssertionError(f"{before} parameters have become {self.parameters}, last: {self.events[-1]['event']}")


class ALLoRA(Attached):
    """Our ALLoRA, which is defined for a scale of 1."""

    def lora_config(self, **settings: Any) -> LoraConfig:
        config = super().lora_config(**settings)
        config.lora_alpha = config.r
        return config

    def method(self, loralloc: Any) -> Any:
        return loralloc.ALLoRA()


class ABLoRA(Attached):
    """Our AB-LoRA between two rounds; its capacity is twice the starting rank."""

    settings: Mapping[str, Any] = {}

    def lora_config(self, **settings: Any) -> LoraConfig:
        config = super().lora_config(**settings)
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        return config

    def method(self, loralloc: Any) -> Any:
        self.validation = self.setting.shape.inputs(self.setting.device, seed=2)
        return loralloc.ABLoRA(loralloc.Budget(average_rank=self.setting.rank), [self.validation], **self.settings)


class AutoLoRA(Attached):
    """Our AutoLoRA's search step: validation batches of the size of the training batch."""

    mode = "fast"

    def method(self, loralloc: Any) -> Any:
        batches = [self.setting.shape.inputs(self.setting.device, seed=2)]
        return loralloc.AutoLoRA(validation=batches, mode=self.mode)


class AutoLoRAPaper(AutoLoRA):
    """The same with the paper's passes."""

    mode = "paper"


def in_cpp(contender: type[Attached]) -> type[Attached]:
    """The same contender with the kernel in C++."""
    return type(f"{contender.__name__}InCpp", (contender,), {"in_cpp": True})


CONTENDERS: dict[str, Callable[[Setting], Step]] = {
    "frozen": Frozen,
    "full": FullFineTuning,
    "peft-lora": Step,
    "peft-adalora": PeftAdaLoRA,
    "adalora": AdaLoRA,
    "adalora-compact": CompactAdaLoRA,
    "allora": ALLoRA,
    "ablora": ABLoRA,
    "autolora-fast": AutoLoRA,
    "autolora-paper": AutoLoRAPaper,
    "adalora-cpp": in_cpp(AdaLoRA),
    "allora-cpp": in_cpp(ALLoRA),
    "ablora-cpp": in_cpp(ABLoRA),
    "autolora-fast-cpp": in_cpp(AutoLoRA),
}
REFERENCE = "peft-lora"
TRAINING = ("frozen", "full", "peft-lora", "peft-adalora", "adalora", "allora", "adalora-cpp", "allora-cpp")
SEARCH = ("peft-lora", "autolora-fast", "autolora-fast-cpp", "autolora-paper")


def build(name: str, setting: Setting) -> Step | str:
    """Build and check a contender; return it, or why it cannot be timed."""
    try:
        step = CONTENDERS[name](setting)
        step.check()
    except Exception as error:  # whatever goes wrong is a result, and is kept
        return f"{type(error).__name__}: {error}"
    return step
