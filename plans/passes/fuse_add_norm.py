"""Fuse a residual addition with the RMS norm that follows it.

What always holds: the sum stays available (the residual stream goes on), and every other use of it is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.builder import FreshNames, make_node
from slotwise.core.graph import Graph, Node


@dataclass(frozen=True)
class FuseAddNorm:
    """`t = add(a, b); n = rms_norm(t, w)` becomes `t, n = add_rms_norm(a, b, w)`."""

    name: str = "fuse_add_norm"

    def apply(self, graph: Graph) -> Graph:
        """Fuse each sum with the first norm that reads it, where that norm reads nothing defined in between."""
        uses, fresh = graph.uses(), FreshNames(graph)
        taken: dict[int, Node] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            if id(node) in taken:
                continue
            if node.op == "add":
                norm = next((u for u in uses.get(node.outputs[0].name, []) if u.op == "rms_norm"), None)
                # A norm's weight is a parameter, so it can always move up to the sum.
                if norm is not None and norm.inputs[0] == node.outputs[0] and _is_parameter(norm):
                    inputs = (*node.inputs, norm.inputs[1])
                    outputs = (node.outputs[0], norm.outputs[0])
                    node = make_node("add_rms_norm", inputs, norm.attr_dict, fresh, outputs)
                    taken[id(norm)] = node
            nodes.append(node)
        return graph.with_nodes(nodes)


def _is_parameter(norm: Node) -> bool:
    weight = norm.inputs[1]
    return weight is not None and weight.kind == "parameter"
