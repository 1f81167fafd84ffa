"""The contract that every method keeps, as a test class for authors of methods.

It needs pytest, which nothing else in the package does: `pip install "loralloc[testing]"`.

    from loralloc.testing import MethodContract

    class TestMine(MethodContract):
        methods = {"mine": Mine, "mine-faster": lambda budget: Mine(budget, faster=True)}

The tests run every row of the table on a tiny causal language model and on a tiny classifier, for 18 steps. What the
class may say about its methods beside the table is in `loralloc.testing.hooks`; examples/own_method has one that does.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("loralloc.testing.contract", "loralloc.testing.loop")  # before they are imported

from loralloc.testing.contract import MethodContract  # noqa: E402

__all__ = ["MethodContract"]
