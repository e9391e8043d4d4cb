"""Bind a symbolic graph to one program: every dimension becomes a size.

What always holds: after it no name is left in any spec; in a decode-side program every row gives logits, so the row
selection in front of them is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slotwise.core.graph import Graph, Node, Value
from slotwise.core.specs import TensorSpec


@dataclass(frozen=True)
class Specialise:
    """Replace dimension names by `sizes`; with `all_rows`, drop `take_rows` (then R must equal T)."""

    sizes: tuple[tuple[str, int], ...]
    all_rows: bool
    name: str = "specialise"

    def apply(self, graph: Graph) -> Graph:
        """Raises GraphError for a dimension without a size."""
        sizes = dict(self.sizes)
        renamed: dict[str, Value] = {}
        bound: dict[TensorSpec, TensorSpec] = {}

        def spec_of(spec: TensorSpec) -> TensorSpec:
            found = bound.get(spec)
            if found is None:
                found = bound[spec] = spec.sized(sizes)
            return found

        def value_of(value: Value) -> Value:
            value = renamed.get(value.name, value)
            return replace(value, spec=spec_of(value.spec))

        nodes: list[Node] = []
        for node in graph.nodes:
            if self.all_rows and node.op == "take_rows" and node.inputs[0] is not None:
                source = node.inputs[0]
                renamed[node.outputs[0].name] = renamed.get(source.name, source)
                continue
            inputs = tuple(None if v is None else value_of(v) for v in node.inputs)
            nodes.append(replace(node, inputs=inputs, outputs=tuple(value_of(v) for v in node.outputs)))
        used = {v.name for node in nodes for v in node.inputs if v is not None}
        return replace(
            graph,
            inputs=tuple(value_of(v) for v in graph.inputs if v.name in used),
            parameters=tuple(replace(p, value=value_of(p.value)) for p in graph.parameters if p.value.name in used),
            nodes=tuple(nodes),
            outputs=tuple(value_of(v) for v in graph.outputs),
        )
