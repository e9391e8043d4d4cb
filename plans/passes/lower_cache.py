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

PAGING_INPUTS = (
    Value("slots", TensorSpec(DType.I32, ("T",)), "input"),
    Value("row_start", TensorSpec(DType.I32, ("B+1",)), "input"),
    Value("kv_len", TensorSpec(DType.I32, ("B",)), "input"),
    Value("page_table", TensorSpec(DType.I32, ("B", "P")), "input"),
)


def cache_values(layer: int, kv_heads: int, head_dim: int, dtype: DType) -> tuple[Value, Value]:
    """The K and V cache of a layer as values, [S, Hkv, D] each."""
    spec = TensorSpec(dtype, ("S", kv_heads, head_dim))
    return Value(f"kv{layer}.k", spec, "cache"), Value(f"kv{layer}.v", spec, "cache")


@dataclass(frozen=True)
class LowerCache:
    """`attend(q, k, v)` becomes `write_slots(k, v, ...)` and `attention(q, ...)`."""

    page_size: int
    speculates: bool
    name: str = "lower_cache"

    def apply(self, graph: Graph) -> Graph:
        """Raises GraphError for a layer whose state cannot be rolled back when the plan speculates."""
        caches = {cache.layer: cache for cache in graph.caches}
        for cache in graph.caches:
            if self.speculates and cache.rollback != "truncate":
                raise GraphError(
                    f"graph {graph.name}: layer {cache.layer} declares rollback {cache.rollback!r}, so rejected drafts "
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
            if k is None:
                raise GraphError(f"graph {graph.name}: attend of layer {layer} has no keys")
            cache = caches[layer]
            k_cache, v_cache = cache_values(layer, cache.kv_heads, cache.head_dim, k.spec.dtype)
            nodes.append(make_node("write_slots", (k, v, k_cache, v_cache, slots), {"layer": layer}, fresh))
            attrs = {**node.attr_dict, "page_size": self.page_size}
            inputs = (q, k_cache, v_cache, row_start, kv_len, page_table)
            nodes.append(make_node("attention", inputs, attrs, fresh, node.outputs))
        return replace(graph, inputs=(*graph.inputs, *PAGING_INPUTS), nodes=tuple(nodes))
