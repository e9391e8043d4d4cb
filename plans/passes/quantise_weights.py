"""Hold the weights of matrix products quantised.

What always holds: each product with a weight becomes the op of its name with `_q`, and its weight becomes codes, scale
and perhaps offset, derived at load from the same sources; a weight used twice is quantised once. Tables that are looked
up in stay as they are, so tied embeddings are held twice: as a table, and quantised for the logits. A weight that has
no whole groups and octets stays as it is too, and the plan shows it: its op has no `_q`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slotwise.core.builder import make_node
from slotwise.core.errors import PlanError
from slotwise.core.graph import Graph, Node, Parameter, Value
from slotwise.core.layouts import OCTET
from slotwise.core.ops import contract_of
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.core.quantise import GROUP, Scheme, scheme_of
from slotwise.plans.options import NATIVE


@dataclass(frozen=True)
class QuantiseWeights:
    """Quantise by `scheme`, or leave the graph as it is where that is `native`."""

    scheme: str
    name: str = "quantise_weights"

    def apply(self, graph: Graph) -> Graph:
        """Raises PlanError where no weight can be quantised."""
        if self.scheme == NATIVE:
            return graph
        scheme = scheme_of(self.scheme)
        quantised = {op.name: name for name, op in FLOAT_OPS.items()}
        parameters = {p.value.name: p for p in graph.parameters}
        made: dict[str, tuple[Parameter, ...]] = {}
        nodes: list[Node] = []
        for node in graph.nodes:
            weight = node.inputs[1] if node.op in quantised else None
            if weight is None or weight.name not in parameters or not self._fits(node, weight):
                nodes.append(node)
                continue
            if weight.name not in made:
                made[weight.name] = self._parts(parameters[weight.name], scheme)
            parts = [parameter.value for parameter in made[weight.name]]
            inputs = (node.inputs[0], *parts, *[None] * (3 - len(parts)), *node.inputs[2:])
            attrs = {**node.attr_dict, "bits": scheme.bits}
            nodes.append(make_node(quantised[node.op], inputs, attrs, None, node.outputs))
        if not made:
            raise PlanError(
                f"weights={scheme.name!r} quantises weights whose columns are a multiple of {GROUP} and whose rows are "
                f"one of {OCTET}, and graph {graph.name} has none; use weights='native'"
            )
        used = {v.name for node in nodes for v in node.inputs if v is not None}
        held = tuple(part for p in graph.parameters for part in (p, *made.get(p.value.name, ())))
        return replace(graph, parameters=tuple(p for p in held if p.value.name in used), nodes=tuple(nodes))

    def _fits(self, node: Node, weight: Value) -> bool:
        """Whether all parts of the weight have whole groups, and stand in octets where a backend likes that."""
        joined = contract_of(node.op).inputs[1].joined
        rows, columns = weight.spec.sizes()
        return columns % GROUP == 0 and rows % (OCTET * joined) == 0

    def _parts(self, weight: Parameter, scheme: Scheme) -> tuple[Parameter, ...]:
        name, (rows, columns) = weight.value.name, weight.value.spec.sizes()
        return tuple(
            Parameter(Value(f"{name}.{part}", of_part, "parameter"), weight.sources, f"{scheme.name}.{part}")
            for part, of_part in scheme.specs(rows, columns).items()
        )
