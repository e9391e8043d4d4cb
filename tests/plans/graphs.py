"""Building small graphs for the tests of passes."""

from __future__ import annotations

from typing import Any

from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Graph, Value
from slotwise.core.specs import DType, TensorSpec

H, D = 16, 8


class Builder(GraphBuilder):
    """A graph builder that names weights by itself."""

    def rows(self, name: str = "x") -> Value:
        return self.input(name, TensorSpec(DType.F64, ("T", H)))

    def weight(self, name: str, *shape: int) -> Value:
        return self.parameter(name, TensorSpec(DType.F64, shape), f"{name}.weight")

    def one(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.op(op, *inputs, **attrs)[0]


def ops_of(graph: Graph) -> list[str]:
    """The ops of its nodes, in order."""
    return [node.op for node in graph.nodes]
