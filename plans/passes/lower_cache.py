"""Lower `attend` to explicit slot writes and paged reads.

What always holds: after it every access to a cache names its layer and the slots it touches, through the inputs
`slots`, `row_start`, `kv_len` and `page_table`, and a layer's slots are written before they are read. A layer that
cannot be rolled back is refused when the plan speculates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slotwise.core.builder import FreshNames, make_node
from slotwise.core.errors import GraphError
from slotwise.core.graph import Graph, Node, Value
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import StateSpec

PAGING_INPUTS = (
    Value("slots", TensorSpec(DType.I32, ("T",)), "input"),
    Value("row_start", TensorSpec(DType.I32, ("B+1",)), "input"),
    Value("kv_len", TensorSpec(DType.I32, ("B",)), "input"),
    Value("page_table", TensorSpec(DType.I32, ("B", "P")), "input"),
)


def state_values(state: StateSpec) -> tuple[Value, ...]:
    """The arrays of a state's parts as values, [S, ...] each."""
    return tuple(
        Value(state.value_name(part.name), TensorSpec(part.dtype, ("S", *part.shape)), "cache") for part in state.parts
    )


@dataclass(frozen=True)
class LowerCache:
    """`attend(q, k, v)` becomes `write_slots(k, v, ...)` and `attention(q, ...)`."""

    page_size: int
    speculates: bool
    name: str = "lower_cache"

    def apply(self, graph: Graph) -> Graph:
        """Raises GraphError for a layer whose state cannot be rolled back when the plan speculates."""
        states = {state.name: state for state in graph.states}
        for state in graph.states:
            if self.speculates and state.on_rejection != "truncate":
                raise GraphError(
                    f"graph {graph.name}: {state.name} cannot be cut back ({state.on_rejection!r}), so rejected drafts "
                    "could not be undone; compile with speculate=0"
                )
        fresh = FreshNames(graph)
        slots, row_start, kv_len, page_table = PAGING_INPUTS
        nodes: list[Node] = []
        for node in graph.nodes:
            if node.op != "attend":
                nodes.append(node)
                continue
            q, k, v = node.inputs
            layer = int(node.attr("layer"))
            k_cache, v_cache = state_values(states[f"kv{layer}"])
            nodes.append(make_node("write_slots", (k, v, k_cache, v_cache, slots), {"layer": layer}, fresh))
            attrs = {**node.attr_dict, "page_size": self.page_size}
            inputs = (q, k_cache, v_cache, row_start, kv_len, page_table)
            nodes.append(make_node("attention", inputs, attrs, fresh, node.outputs))
        return replace(graph, inputs=(*graph.inputs, *PAGING_INPUTS), nodes=tuple(nodes))
