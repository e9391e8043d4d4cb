"""The passes, one small file each; `plans/compile.py` holds the one visible order in which they run.

Owns `Pass`. What always holds: a pass is a frozen class with its options as fields, a public `name` and an `apply`; it
takes a legal graph and makes a legal graph, which is checked after each.
"""

from __future__ import annotations

from typing import Protocol

from slotwise.core.graph import Graph


class Pass(Protocol):
    """One step from graph to graph."""

    @property
    def name(self) -> str:
        """The name that `--print-after` takes."""

    def apply(self, graph: Graph) -> Graph:
        """The graph after this pass; the argument is not changed."""
