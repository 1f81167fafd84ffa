"""The blocks of a transformer: what each hands to the next, and how to start in the middle.

A model can be walked if its blocks are in one `ModuleList`, each is called exactly once and in order, takes the hidden
state as its first argument and returns nothing else, and the frozen layer under each adapter is called exactly once.
Nothing is assumed about the architecture: `Watcher` observes a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from loralloc.gating import Site


@dataclass(frozen=True)
class States:
    """What a pass through a model that can be walked has shown.

    Attributes:
        hidden: `hidden[l]` is the hidden state that block l returned.
        in_tuples: Whether blocks return a tuple whose other entries are None.
        widths: For each block, the number of entries of that tuple; 1 if it returns no tuple.
        places: For each site, the block it stands in (0 to L − 1); −1 before the first, L behind the last.
        order: For each site, how many others are called before it.
        products: For each site, what its frozen layer returned; None where that was too large to be noted.
    """

    hidden: Sequence[Tensor]
    in_tuples: bool
    widths: Sequence[int]
    places: Sequence[int]
    order: Sequence[int]
    products: Sequence[Tensor] | None

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(tensor.nbytes for tensor in (*self.hidden, *(self.products or ())))

    def block(self, site: int) -> int:
        """The first block that must be computed if this site is the first whose gates differ."""
        return max(0, self.places[site])

    def unchanged(self, site: int) -> list[int]:
        """Sites outside the skipped blocks whose frozen layers return the same if this one is the first to differ."""
        if self.products is None:
            return []
        earlier = range(self.block(site))
        return [i for i, place in enumerate(self.places) if self.order[i] <= self.order[site] and place not in earlier]


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
    """Notes what passes between blocks, and what frozen layers under adapters return, during one forward pass.

    Args:
        blocks: The model's blocks.
        sites: Its gated layers.
        room: Bytes that the products of these layers may take; if they are larger, none is noted.
    """

    def __init__(self, blocks: Sequence[nn.Module], sites: Sequence[Site], room: int) -> None:
        self._blocks, self._sites, self._room = blocks, sites, room
        inside = {id(child): index for index, block in enumerate(blocks) for child in block.modules()}
        self._inside = [inside.get(id(site.layer)) for site in sites]
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._hidden: list[Tensor] = []
        self._order: list[nn.Module] = []
        self._called: list[int] = []
        self._moments: dict[int, tuple[int, int]] = {}
        self._products: dict[int, Tensor] | None = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the pass inside."""
        # Not by hooks: later passes replace `forward`, and hooks of others run on what that returns, then as now.
        with ExitStack() as stack:
            for block in self._blocks:
                stack.enter_context(computing(block, partial(self._through_block, block, block.forward)))
            for index, site in enumerate(self._sites):
                frozen_layer = site.layer.base_layer
                watched = partial(self._through_layer, index, frozen_layer.forward)
                stack.enter_context(computing(frozen_layer, watched))
            yield

    def states(self) -> States | None:
        """Return what was seen; None where the model cannot be walked."""
        depth, count = len(self._blocks), len(self._sites)
        outputs = [output if isinstance(output, tuple) else (output,) for output in self._outputs]
        walks = (
            self._order == list(self._blocks)
            and sorted(self._called) == list(range(count))
            and all(isinstance(value, Tensor) for value in self._inputs)
            and all(isinstance(first, Tensor) and not any(r is not None for r in rest) for first, *rest in outputs)
            and all(handed[0] is taken for handed, taken in zip(outputs, self._inputs[1:], strict=False))
        )
        if not walks:
            return None
        corners = {(0, 0): -1, (depth, depth): depth}
        outside = [corners.get(self._moments[index]) for index in range(count)]
        places = [out if place is None else place for out, place in zip(outside, self._inside, strict=True)]
        if None in places:
            return None
        products = self._products
        return States(
            hidden=self._hidden,
            in_tuples=isinstance(self._outputs[0], tuple),
            widths=[len(output) for output in outputs],
            places=[place for place in places if place is not None],
            order=[self._called.index(index) for index in range(count)],
            products=None if products is None else [products[index] for index in range(count)],
        )

    def _through_block(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._order.append(block)
        self._inputs.append(args[0] if args else None)
        output = forward(*args, **kwargs)
        self._outputs.append(output)
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            self._hidden.append(first.detach().clone())  # the model may change it in place
        return output

    def _through_layer(self, index: int, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._called.append(index)
        self._moments[index] = (len(self._inputs), len(self._outputs))
        output = forward(*args, **kwargs)
        self._room -= output.nbytes
        if self._room < 0:
            self._products = None
        elif self._products is not None:
            self._products[index] = output.detach().clone()
        return output


@contextmanager
def skipped(blocks: Sequence[nn.Module], hidden: Tensor, like: States) -> Iterator[None]:
    """Skip some first blocks inside: the last of them returns a known hidden state, those before it do nothing.

    Args:
        blocks: The blocks not to be computed, at least one.
        hidden: What the last of them returns.
        like: States of the same model, for the form in which blocks return.
    """
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            passed = hidden if index == len(blocks) - 1 else None
            stack.enter_context(computing(block, _passing_on(passed, like.in_tuples, like.widths[index])))
        yield


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward pass inside."""
    earlier = module.__dict__.get("forward")
    try:
        module.forward = forward
        yield
    finally:
        if earlier is None:
            del module.forward
        else:
            module.forward = earlier


def _passing_on(passed: Tensor | None, in_tuple: bool, width: int) -> Callable[..., Any]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        value = hidden if passed is None else passed
        return (value, *([None] * (width - 1))) if in_tuple else value

    return forward


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside, so that only gradients that are asked for explicitly are computed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
