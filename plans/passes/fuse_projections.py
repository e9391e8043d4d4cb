"""Fuse projections of one input: Q, K and V into one product, gate and up with their activation into another.

What always holds: the joined weight is its parts' rows in order (q, k, v; gate, up), recorded as the parameter's
sources, so loading joins them with one copy and nothing is multiplied differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from slotwise.core.builder import FreshNames, make_node
from slotwise.core.graph import Graph, Node, Parameter, Value
from slotwise.core.specs import TensorSpec


@dataclass(frozen=True)
class FuseProjections:
    """Three `linear_heads` into `linear_qkv`; two `linear` and a `gated_activation` into `linear_gated`."""

    name: str = "fuse_projections"

    def apply(self, graph: Graph) -> Graph:
        """Fuse wherever the pattern stands; projections with mixed biases or shared weights stay as they are."""
        return _Rewriter(graph).run()


class _Rewriter:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fresh = FreshNames(graph)
        self.parameters = {p.value.name: p for p in graph.parameters}
        self.users = graph.uses()
        self.replaced: dict[int, Node | None] = {}

    def run(self) -> Graph:
        producer = self.graph.producer()
        for node in self.graph.nodes:
            if node.op == "gated_activation":
                self._fuse_gated(node, producer)
        self._fuse_qkv()
        nodes = [self.replaced.get(id(node), node) for node in self.graph.nodes]
        kept = [node for node in nodes if node is not None]
        used = {v.name for node in kept for v in node.inputs if v is not None}
        parameters = tuple(p for p in self.parameters.values() if p.value.name in used)
        return replace(self.graph, parameters=parameters, nodes=tuple(kept))

    def _fuse_gated(self, node: Node, producer: dict[str, Node]) -> None:
        gate, up = (producer.get(v.name) if v is not None else None for v in node.inputs)
        if gate is None or up is None or gate.op != "linear" or up.op != "linear" or gate.inputs[0] != up.inputs[0]:
            return
        if gate.inputs[2] is not None or up.inputs[2] is not None or not self._only_use((gate, up)):
            return
        weight = self._join((gate, up), 1, "gate_up")
        if weight is None:
            return
        fused = make_node(
            "linear_gated", (gate.inputs[0], weight), {"activation": node.attr("activation")}, self.fresh, node.outputs
        )
        self.replaced.update({id(gate): None, id(up): None, id(node): fused})

    def _fuse_qkv(self) -> None:
        """Q, K and V of one input meet again in an `attend`; follow its operands back through norms and rotary."""
        producer = self.graph.producer()
        for attend in (node for node in self.graph.nodes if node.op == "attend"):
            sources = [self._projection(value, producer) for value in attend.inputs]
            if any(source is None for source in sources):
                continue
            q, k, v = (source for source in sources if source is not None)
            if not (q.inputs[0] == k.inputs[0] == v.inputs[0]) or len({id(q), id(k), id(v)}) < 3:
                continue
            if any(id(node) in self.replaced for node in (q, k, v)):
                continue  # layers that share a projection: it was fused for the first of them
            if k.attr_dict != v.attr_dict or q.attr("head_dim") != k.attr("head_dim"):
                continue
            if len({node.inputs[2] is None for node in (q, k, v)}) > 1:
                continue
            weight = self._join((q, k, v), 1, "qkv")
            bias = None if q.inputs[2] is None else self._join((q, k, v), 2, "qkv_bias")
            if weight is None or (bias is None) != (q.inputs[2] is None):
                continue
            heads = {"q_heads": q.attr("heads"), "kv_heads": k.attr("heads"), "head_dim": q.attr("head_dim")}
            outputs = (q.outputs[0], k.outputs[0], v.outputs[0])
            fused = make_node("linear_qkv", (q.inputs[0], weight, bias), heads, self.fresh, outputs)
            first = min((q, k, v), key=lambda node: self.graph.nodes.index(node))
            self.replaced.update({id(node): None for node in (q, k, v)} | {id(first): fused})

    def _projection(self, value: Value | None, producer: dict[str, Node]) -> Node | None:
        while value is not None and value.name in producer:
            node = producer[value.name]
            if node.op == "linear_heads":
                return node
            if node.op == "head_rms_norm":
                value = node.inputs[0]
            elif node.op == "rotary":
                value = node.inputs[node.outputs.index(value)]
            else:
                return None
        return None

    def _only_use(self, nodes: tuple[Node, ...]) -> bool:
        outputs = {value.name for value in self.graph.outputs}
        return all(len(self.users[n.outputs[0].name]) == 1 and n.outputs[0].name not in outputs for n in nodes)

    def _unused(self, name: str) -> str:
        while name in self.parameters:
            name += "'"
        return name

    def _join(self, nodes: tuple[Node, ...], position: int, suffix: str) -> Value | None:
        """A parameter that holds the rows of the nodes' parameters at input `position`, or None if it cannot be."""
        values = [node.inputs[position] for node in nodes]
        parts = [self.parameters[v.name] for v in values if v is not None and v.name in self.parameters]
        if len(parts) != len(nodes) or any(len(self.users[p.value.name]) != 1 for p in parts):
            return None
        first = parts[0].value
        rows = 0
        for part in parts:
            size = part.value.spec.shape[0]
            if not isinstance(size, int) or part.value.spec.shape[1:] != first.spec.shape[1:]:
                return None
            rows += size
        spec = TensorSpec(first.spec.dtype, (rows, *first.spec.shape[1:]))
        value = Value(self._unused(f"{first.name.rpartition('.')[0]}.{suffix}".lstrip(".")), spec, "parameter")
        self.parameters[value.name] = Parameter(value, tuple(s for part in parts for s in part.sources))
        return value
