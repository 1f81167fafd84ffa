"""Names of modules in messages: which ones are meant, said shortly, and in a form that PEFT's matching takes.

PEFT matches an entry of `target_modules` or `exclude_modules` with a module of this name and with all whose names end
in a dot and the entry; a string instead of a list is a pattern for the whole name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence


def ends_in(name: str, end: str) -> bool:
    """Whether PEFT would take a listed entry to mean this module.

    >>> ends_in("layers.0.fc", "fc"), ends_in("layers.0.fc", "0.fc"), ends_in("layers.0.fc", "c")
    (True, True, False)
    """
    return name == end or name.endswith(f".{end}")


def common_ends(names: Iterable[str], others: Collection[str]) -> list[str]:
    """Return the shortest ends that say these modules and none of the others; a whole name where no end does.

    >>> common_ends(["layers.0.mlp.gate", "layers.1.mlp.gate"], ["layers.0.mlp.up", "layers.1.mlp.up"])
    ['gate']
    >>> common_ends(["layers.0.mlp.up", "layers.1.mlp.up"], ["layers.0.expert.up"])
    ['mlp.up']
    """
    found: list[str] = []
    for name in names:
        if not any(ends_in(name, end) for end in found):
            parts = name.split(".")
            ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
            found.append(next((end for end in ends if not any(ends_in(other, end) for other in others)), name))
    return found


def named(names: Sequence[str], others: Collection[str]) -> str:
    """Say which modules are meant, as the subject of a sentence.

    >>> named(["layers.0.q"], ["layers.1.q"]), named(["layers.0.q", "layers.1.q"], ["layers.0.k"])
    ('layers.0.q', '2 layers whose names end in q')
    """
    if len(names) == 1:
        return names[0]
    if not others:
        return f"all {len(names)} adapted layers"
    return f"{len(names)} layers whose names end in {', '.join(common_ends(names, others))}"


def selecting(names: Sequence[str], others: Collection[str]) -> list[str] | str:
    """Return what to give PEFT for these modules and none of the others: a list of ends, or else a pattern.

    >>> selecting(["a.fc", "b.fc"], ["a.up"]), selecting(["fc"], ["block.fc"])
    (['fc'], 'fc')
    """
    ends = list(names) if len(names) == 1 else common_ends(names, others)
    if any(ends_in(other, end) for end in ends for other in others):
        return "|".join(map(re.escape, names))
    return ends


def excluding(names: Sequence[str], others: Collection[str], already: Iterable[str] | str | None) -> str:
    r"""Return the argument of LoraConfig that leaves these modules out, with what it leaves out already.

    Args:
        names: The modules to leave out.
        others: The other adapted modules.
        already: `exclude_modules` of the adapter's config.

    >>> excluding(["a.fc", "b.fc"], ["a.up"], {"head"})
    'exclude_modules=["head", "fc"]'
    >>> excluding(["fc"], ["block.fc"], ["head"])
    'exclude_modules="(.*\\\\.)?head|fc"'
    """
    chosen = selecting(names, others)
    if isinstance(chosen, list) and not isinstance(already, str):
        return f"exclude_modules={json.dumps([*sorted(already or ()), *chosen])}"
    return f"exclude_modules={json.dumps('|'.join(filter(None, map(_pattern, (already, chosen)))))}"


def _pattern(entries: Iterable[str] | str | None) -> str:
    """The pattern that means what a list of entries does; a pattern as it is."""
    if isinstance(entries, str):
        return entries
    return "|".join(rf"(.*\.)?{re.escape(entry)}" for entry in sorted(entries or ()))
