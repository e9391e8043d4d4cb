"""Let weights stand in memory as the kernels that will read them like best.

What always holds: the layout of a weight is that of the first backend, in the order of the user's preference, that has
kernels for its op; a weight that does not divide into octets stays in rows, and so do all parts of it; a weight that
ops want in two layouts is held in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from slotwise.core.backend import Backend
from slotwise.core.builder import make_node
from slotwise.core.contract import Argument
from slotwise.core.graph import Graph, Node, Parameter, Value
from slotwise.core.layouts import ROWS
from slotwise.core.ops import contract_of
from slotwise.plans.options import PlanOptions


@dataclass(frozen=True)
class LayOutWeights:
    """Layouts by the preference in `options` among `backends`."""

    options: PlanOptions
    backends: Mapping[str, Backend]
    name: str = "lay_out_weights"

    def apply(self, graph: Graph) -> Graph:
        """The same graph with weights in their layouts."""
        parameters = {p.value.name: p for p in graph.parameters}
        made: dict[str, Parameter] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            weights = self._weights(node, parameters)
            layout = self._layout(node.op) if weights and node.attr("layout") == ROWS else ROWS
            if layout == ROWS or not all(a.stands_in_octets(v.spec) for a, v in weights):
                nodes.append(node)
                continue
            new: dict[str, Value] = {}
            for argument, value in weights:
                name = f"{value.name}.{layout}"
                laid = replace(parameters[value.name], value=replace(value, name=name))
                made[value.name] = replace(laid, layout=layout, word=argument.word)
                new[value.name] = made[value.name].value
            inputs = tuple(new.get(v.name, v) if v is not None else None for v in node.inputs)
            nodes.append(make_node(node.op, inputs, {**node.attr_dict, "layout": layout}, None, node.outputs))
        used = {v.name for node in nodes for v in node.inputs if v is not None}
        held = [each for p in graph.parameters for each in (p, made.get(p.value.name)) if each is not None]
        return replace(graph, parameters=tuple(p for p in held if p.value.name in used), nodes=tuple(nodes))

    def _layout(self, op: str) -> str:
        for name in self.options.backends_for(op):
            if name in self.backends and self.backends[name].kernels_for(op):
                return self.backends[name].layout
        return ROWS

    def _weights(self, node: Node, parameters: Mapping[str, Parameter]) -> list[tuple[Argument, Value]]:
        """The node's inputs of which its layout speaks, if all of them are parameters."""
        pairs = zip(contract_of(node.op).inputs, node.inputs, strict=True)
        found = [(argument, value) for argument, value in pairs if argument.word and value is not None]
        return found if all(value.name in parameters for _, value in found) else []
