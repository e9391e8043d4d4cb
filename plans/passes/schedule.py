"""Order the nodes of a bound graph so that few bytes are alive at once.

What always holds: data flow is kept, and so is the order of effects on each state (writes before the reads that follow
them, and never past another write). Among ready nodes the one that frees most and allocates least goes first; ties keep
the order they had, so the result is a function of the graph. Greed can lose: where its order does not
lower the peak, the order there was stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.graph import Graph, Node


@dataclass(frozen=True)
class Schedule:
    """List scheduling by bytes: greedy, deterministic."""

    name: str = "schedule"

    def apply(self, graph: Graph) -> Graph:
        """The same nodes in a legal order whose peak of live bytes is no greater than before."""
        nodes = graph.nodes
        waits = _dependencies(graph)
        followers: list[list[int]] = [[] for _ in nodes]
        for index, needed in enumerate(waits):
            for before in needed:
                followers[before].append(index)
        missing = [len(needed) for needed in waits]
        readers_left: dict[str, int] = {name: len(users) for name, users in graph.uses().items()}
        kept = {value.name for value in graph.outputs}
        ready = {index for index, count in enumerate(missing) if count == 0}
        order: list[Node] = []
        while ready:
            chosen = min(ready, key=lambda index: (_growth(nodes[index], readers_left, kept), index))
            ready.discard(chosen)
            order.append(nodes[chosen])
            for value in {v.name for v in nodes[chosen].inputs if v is not None}:
                readers_left[value] -= sum(v is not None and v.name == value for v in nodes[chosen].inputs)
            for index in followers[chosen]:
                missing[index] -= 1
                if missing[index] == 0:
                    ready.add(index)
        scheduled = graph.with_nodes(order)
        return scheduled if peak_bytes(scheduled) < peak_bytes(graph) else graph


def peak_bytes(graph: Graph) -> int:
    """The most bytes of node outputs alive at once, graph outputs left out; a node's inputs and outputs meet."""
    kept = {value.name for value in graph.outputs}
    last = {v.name: index for index, node in enumerate(graph.nodes) for v in node.inputs if v is not None}
    alive = peak = 0
    dying: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.outputs:
            if value.name not in kept:
                alive += value.spec.nbytes()
                end = last.get(value.name, index)
                dying[end] = dying.get(end, 0) + value.spec.nbytes()
        peak = max(peak, alive)
        alive -= dying.pop(index, 0)
    return peak


def _dependencies(graph: Graph) -> list[set[int]]:
    """For each node, the positions of those that must come before it."""
    made: dict[str, int] = {}
    last_write: dict[str, int] = {}
    reads: dict[str, list[int]] = {}
    waits: list[set[int]] = []
    for index, node in enumerate(graph.nodes):
        needed = {made[v.name] for v in node.inputs if v is not None and v.name in made}
        for effect in node.effects:
            if effect.state in last_write:
                needed.add(last_write[effect.state])
            if effect.kind == "writes":
                needed.update(reads.pop(effect.state, ()))
                last_write[effect.state] = index
            else:
                reads.setdefault(effect.state, []).append(index)
        needed.discard(index)
        waits.append(needed)
        made.update({v.name: index for v in node.outputs})
    return waits


def _growth(node: Node, readers_left: dict[str, int], kept: set[str]) -> int:
    """Bytes that running `node` now adds to what is alive."""
    added = sum(v.spec.nbytes() for v in node.outputs)
    freed = 0
    for value in {v for v in node.inputs if v is not None and v.kind == "value"}:
        uses_here = sum(v == value for v in node.inputs)
        if value.name not in kept and readers_left[value.name] == uses_here:
            freed += value.spec.nbytes()
    return added - freed
