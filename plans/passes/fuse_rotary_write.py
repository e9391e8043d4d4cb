"""Fuse rotary embedding with the cache write that takes its keys.

What always holds: rotated keys that anything else reads, or queries that something reads before the write, keep the
two ops apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.builder import FreshNames, make_node
from slotwise.core.graph import Graph, Node, Value


@dataclass(frozen=True)
class FuseRotaryWrite:
    """`q', k' = rotary(q, k, ...); write_slots(k', v, ...)` becomes `q' = rotary_write(q, k, v, ...)`."""

    name: str = "fuse_rotary_write"

    def apply(self, graph: Graph) -> Graph:
        """Put the fused node where the write stood, for V is defined there."""
        uses, producer, fresh = graph.uses(), graph.producer(), FreshNames(graph)
        fused: dict[int, Node | None] = {}
        for node in graph.nodes:
            if node.op != "write_slots":
                continue
            keys, values, *rest = node.inputs
            rotary = producer.get(keys.name) if keys is not None else None
            if rotary is None or rotary.op != "rotary" or keys != rotary.outputs[1]:
                continue
            if len(uses[keys.name]) > 1 or keys in graph.outputs:
                continue
            if self._reads_before(graph, rotary.outputs[0], node):
                continue
            q, k, positions, cos, sin = rotary.inputs
            inputs = (q, k, values, positions, cos, sin, *rest)
            fused[id(rotary)] = None
            fused[id(node)] = make_node("rotary_write", inputs, node.attr_dict, fresh, (rotary.outputs[0],))
        nodes = [fused.get(id(node), node) for node in graph.nodes]
        return graph.with_nodes([node for node in nodes if node is not None])

    def _reads_before(self, graph: Graph, query: Value, write: Node) -> bool:
        """Whether a node before `write` reads `query`."""
        for node in graph.nodes:
            if node is write:
                return False
            if query in node.inputs:
                return True
        return False
