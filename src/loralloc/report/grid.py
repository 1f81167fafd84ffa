"""Module names as a grid: one row per layer, one column per module type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loralloc.naming import places


@dataclass(frozen=True)
class Grid:
    """Where each module stands in the heat map.

    Attributes:
        rows: (stack, layer index) from the first layer to the last; the stack is the name before the index.
        types: Module types, in the order in which the model has them.
        cells: (stack, layer index, type) to full module name.
        others: Names without a layer index, or with nothing after it: they have no place in the grid.
    """

    rows: tuple[tuple[str, int], ...]
    types: tuple[str, ...]
    cells: dict[tuple[str, int, str], str]
    others: tuple[str, ...]

    @property
    def stacks(self) -> tuple[str, ...]:
        """Stacks of layers: one for most models, two for an encoder with a decoder."""
        return tuple(dict.fromkeys(stack for stack, _ in self.rows))

    @property
    def row_names(self) -> list[str]:
        """What each row is called: its layer, behind the stack where there are several."""
        several = len(self.stacks) > 1
        return [f"{stack} {layer}" if several else f"{layer}" for stack, layer in self.rows]

    def column(self, module_type: str) -> list[str]:
        """Return the modules of one type, from the first layer to the last."""
        keys = ((stack, layer, module_type) for stack, layer in self.rows)
        return [self.cells[key] for key in keys if key in self.cells]


def arrange(names: Iterable[str]) -> Grid:
    """Split names at their layer index.

    >>> grid = arrange(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"])
    >>> grid.rows, grid.types, grid.others
    ((('model.layers', 0), ('model.layers', 1)), ('mlp.up_proj',), ('lm_head',))
    """
    names = list(names)
    cells: dict[tuple[str, int, str], str] = {}
    others = []
    for name, place in zip(names, places(names), strict=True):
        if place is not None and place.kind and place not in cells:
            cells[place] = name
        else:
            others.append(name)
    stacks = list(dict.fromkeys(stack for stack, _, _ in cells))
    rows = sorted({(stack, layer) for stack, layer, _ in cells}, key=lambda row: (stacks.index(row[0]), row[1]))
    types = tuple(dict.fromkeys(module_type for _, _, module_type in cells))
    return Grid(tuple(rows), types, cells, tuple(others))
