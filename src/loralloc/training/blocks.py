"""The blocks of a transformer: what each hands to the next, and how to start in the middle.

A model can be walked when its blocks stand in one `ModuleList`, each is called exactly once and in order, takes the
hidden state as first argument and returns nothing else. Nothing about an architecture is assumed: `Watcher` looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loralloc.gating import Site


@dataclass(frozen=True)
class States:
    """What a pass through a model that can be walked has shown.

    Attributes:
        hidden: `hidden[l]` is the hidden state that block l returned.
        in_tuples: Whether blocks return it as the only entry of a tuple that is not None.
        widths: Number of entries of that tuple; 1 for none.
        places: For each site, the block it stands in (0 to L − 1); −1 before the first, L behind the last.
    """

    hidden: Sequence[Tensor]
    in_tuples: bool
    widths: Sequence[int]
    places: Sequence[int]


def find_blocks(model: nn.Module, sites: Sequence[Site]) -> Sequence[nn.Module]:
    """Return the `ModuleList` whose entries hold the most sites, the outermost of several; empty for none."""
    layers = {id(site.layer) for site in sites}
    best, most = (), 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            inside = sum(id(child) in layers for child in module.modules())
            if inside > most:
                best, most = tuple(module), inside
    return best


class Watcher:
    """Notes what passes between blocks during one forward pass."""

    def __init__(self, blocks: Sequence[nn.Module], sites: Sequence[Site]) -> None:
        self._blocks = blocks
        inside = {id(child): index for index, block in enumerate(blocks) for child in block.modules()}
        self._inside = [inside.get(id(site.layer)) for site in sites]
        self._sites = sites
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._order: list[nn.Module] = []
        self._outside: dict[int, set[tuple[int, int]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the pass inside."""
        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(self._enter).remove)
                stack.callback(block.register_forward_hook(self._leave).remove)
            for index, (site, block) in enumerate(zip(self._sites, self._inside, strict=True)):
                if block is None:
                    self._outside[index] = set()
                    hook = site.layer.register_forward_pre_hook(lambda *_, index=index: self._pass_by(index))
                    stack.callback(hook.remove)
            yield

    def states(self) -> States | None:
        """Return what was seen; None where the model cannot be walked."""
        depth = len(self._blocks)
        outputs = [output if isinstance(output, tuple) else (output,) for output in self._outputs]
        walks = (
            self._order == list(self._blocks)
            and all(isinstance(value, Tensor) for value in self._inputs)
            and all(isinstance(first, Tensor) and not any(r is not None for r in rest) for first, *rest in outputs)
            and all(handed[0] is taken for handed, taken in zip(outputs, self._inputs[1:], strict=False))
        )
        corners = {(0, 0): -1, (depth, depth): depth}
        outside = {index: [corners.get(moment) for moment in moments] for index, moments in self._outside.items()}
        if not walks or any(len(set(places)) != 1 or None in places for places in outside.values()):
            return None
        places = [outside[index][0] if place is None else place for index, place in enumerate(self._inside)]
        return States(
            hidden=[output[0].detach() for output in outputs],
            in_tuples=isinstance(self._outputs[0], tuple),
            widths=[len(output) for output in outputs],
            places=[place for place in places if place is not None],
        )

    def _enter(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self._order.append(block)
        self._inputs.append(args[0] if args else None)

    def _leave(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._outputs.append(output)

    def _pass_by(self, index: int) -> None:
        self._outside[index].add((len(self._inputs), len(self._outputs)))


@contextmanager
def skipped(blocks: Sequence[nn.Module], hidden: Tensor, like: States) -> Iterator[None]:
    """Let the last of the first blocks return a known hidden state, and those before it do nothing.

    Args:
        blocks: The blocks not to be computed, at least one.
        hidden: What the last of them returns.
        like: States of the same model, for the form in which blocks return.
    """
    earlier = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            known = hidden if index == len(blocks) - 1 else None
            block.forward = _passing_on(known, like.in_tuples, like.widths[index])
        yield
    finally:
        for block, forward in zip(blocks, earlier, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _passing_on(known: Tensor | None, in_tuple: bool, width: int) -> Any:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        value = hidden if known is None else known
        return (value, *([None] * (width - 1))) if in_tuple else value

    return forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: only what is asked for by name is computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
