"""What a test class says about its methods: their table, and what the contract cannot know of them by itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loralloc.budget import Budget
from loralloc.methods.base import Method
from loralloc.testing.loop import HALF, STEPS, Decides, Loop, adamw, momentum, with_examples
from loralloc.testing.models import TINY, adapted

Make = Callable[[Budget], Method]
"""Makes a method for a budget; a method that takes no budget ignores it."""


class Hooks:
    """The table of methods, and what a subclass may override.

    Attributes:
        methods: What is tested, by a name for each row.
        optimizers: What the runs are trained with. A method whose settings fit only the learning rate of one of them
            may lower that of the other.
        device: Where the models are; `cuda` holds the methods to the contract on a GPU.
    """

    device: ClassVar[str] = "cpu"
    methods: ClassVar[Mapping[str, Make]]
    optimizers: ClassVar[Mapping[str, Callable[[list[Tensor]], torch.optim.Optimizer]]] = {
        "adamw": adamw,
        "momentum": momentum,
    }

    def decides(self, method: Method) -> Decides:
        """Tell when a method chooses ranks; override it for one that does so as it goes."""
        method = allocator(method)
        if method.search is not None:
            return "by a search"
        ranks = 6 * 4  # both models have six modules
        steps = method.schedule(STEPS, ranks, ranks // 2).steps_until_final
        if not steps:
            return "never" if method.budget is None else "at the start"
        return "at the end" if steps > STEPS else "while training"

    def least_rank(self, method: Method) -> int:
        """Tell the fewest ranks that a method leaves to a module where no budget says how many stay."""
        del method
        return 0

    def lora_alpha(self, method: Method) -> float:
        """Choose lora_alpha, with ranks of 4; override it for a method that takes a certain scale alone."""
        del method
        return 6

    def refusal(self, method: Method, budget: Budget) -> str | None:
        """Tell the pattern of the message with which a method refuses a budget; None where it takes it."""
        del method, budget
        return None

    def models(self, row: str) -> Sequence[str]:
        """Choose the models that a row of the table runs on where a test names none."""
        del row
        return tuple(TINY)

    def marks(self, row: str) -> pytest.MarkDecorator | Collection[pytest.MarkDecorator]:
        """Choose pytest's marks for a row of the table."""
        del row
        return ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for every row of the table, on the models that the row asks for."""
        names = [name for name in ("freezing_method", "method", "name") if name in metafunc.fixturenames]
        if names == ["method", "name"]:
            cases = [self._case(row, name) for row in self.methods for name in self.models(row)]
        else:
            freezing = "freezing_method" in names
            cases = [self._case(row) for row in self.methods if not freezing or self._freezes(row)]
        if names:
            metafunc.parametrize(names, cases)

    def _case(self, row: str, *name: str) -> Any:
        return pytest.param(self.methods[row], *name, id="-".join((row, *name)), marks=self.marks(row))

    def _freezes(self, row: str) -> bool:
        return self.decides(self.methods[row](HALF)) == "while training"

    def model(self, make: Make, name: str, budget: Budget = HALF, *, dtype: torch.dtype = torch.float32) -> PeftModel:
        """Build a tiny model for a method."""
        return self.plain(name, dtype=dtype, lora_alpha=self.lora_alpha(make(budget)))

    def plain(self, name: str, **settings: Any) -> PeftModel:
        """Build a tiny model with a fresh adapter, on the device."""
        return adapted(TINY[name], **settings).to(self.device)

    def loop(
        self,
        make: Make,
        name: str,
        budget: Budget = HALF,
        *,
        seed: int = 0,
        optimizer: str = "adamw",
        dtype: torch.dtype = torch.float32,
        model: PeftModel | None = None,
        steps: int = STEPS,
    ) -> Loop:
        """Begin a run of a method on a model."""
        method = make(budget)
        return Loop(
            with_examples(method, name),
            self.model(make, name, budget, dtype=dtype) if model is None else model,
            name,
            decides=self.decides(method),
            least_rank=self.least_rank(method),
            seed=seed,
            optimizer=self.optimizers[optimizer],
            steps=steps,
        )


def allocator(method: Method) -> Method:
    """Find the method that chooses the ranks: where one composes with another, the other one."""
    return method if method.allocator is None else allocator(method.allocator)
