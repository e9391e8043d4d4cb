"""Place every intermediate value, and every kernel's workspace, in one arena.

Owns `Placement` and `plan_buffers`. What always holds: two placements whose lifetimes meet do not overlap; a node's
inputs, outputs and workspace are alive together (no kernel works in place unless its contract says so); offsets are
multiples of `ALIGNMENT`. Largest first, each at the lowest offset that fits: greedy-by-size, after Pisarchyk and Lee,
"Efficient memory management for deep neural net inference", 2020.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

from slotwise.core.backend import Backend, CallSpec
from slotwise.core.graph import Graph, Node

ALIGNMENT = 256
"""Bytes: a whole number of cache lines and of a GPU's widest memory transactions."""


@dataclass(frozen=True, slots=True)
class Placement:
    """`nbytes` at `offset` in the arena for `value`, alive from node `first` to node `last`, both included.

    A workspace is named `ws<i>` after its node's position.
    """

    value: str
    offset: int
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Placement) -> bool:
        """Whether the two share a byte at the same time."""
        in_time = self.first <= other.last and other.first <= self.last
        in_space = self.offset < other.offset + other.nbytes and other.offset < self.offset + self.nbytes
        return in_time and in_space


def plan_buffers(graph: Graph, backends: Mapping[str, Backend]) -> tuple[Placement, ...]:
    """Placements of all node outputs that are not graph outputs, and of workspaces, sorted by offset."""
    lifetimes = _lifetimes(graph, backends)
    placed: list[Placement] = []
    for name, (nbytes, first, last) in sorted(lifetimes.items(), key=lambda item: (-item[1][0], item[1][1], item[0])):
        offset = 0
        for other in placed:
            if other.first > last or first > other.last:
                continue
            if offset + nbytes <= other.offset:
                break
            offset = max(offset, _aligned(other.offset + other.nbytes))
        bisect.insort(
            placed, Placement(name, offset, nbytes, first, last), key=lambda place: (place.offset, place.first)
        )
    return tuple(placed)


def arena_bytes(placements: tuple[Placement, ...]) -> int:
    """The arena's size for these placements."""
    return _aligned(max((p.offset + p.nbytes for p in placements), default=0))


def call_spec(node: Node) -> CallSpec:
    """The node as a backend sees it."""
    inputs = tuple(None if v is None else v.spec for v in node.inputs)
    return CallSpec(node.op, inputs, tuple(v.spec for v in node.outputs), node.attr_dict)


def _lifetimes(graph: Graph, backends: Mapping[str, Backend]) -> dict[str, tuple[int, int, int]]:
    """Name -> (bytes, first node, last node)."""
    outputs = {value.name for value in graph.outputs}
    found: dict[str, tuple[int, int, int]] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.inputs:
            if value is not None and value.name in found:
                nbytes, first, _ = found[value.name]
                found[value.name] = (nbytes, first, index)
        for value in node.outputs:
            if value.name not in outputs:
                found[value.name] = (value.spec.nbytes(), index, index)
        if node.selection is not None:
            kernel = backends[node.selection.backend].kernel(node.selection.kernel.partition(":")[2])
            scratch = kernel.workspace(call_spec(node))
            if scratch:
                found[f"ws{index}"] = (scratch, index, index)
    return found


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT
