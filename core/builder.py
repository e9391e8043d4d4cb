"""Making graphs: a node whose outputs follow from its op's contract, and a graph built node by node.

Owns `make_node`, `FreshNames` and `GraphBuilder`. What always holds: whatever is made here meets its op's contract, or
a GraphError was raised; a finished graph has passed the checker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from slotwise.core.check import check_graph
from slotwise.core.errors import GraphError
from slotwise.core.graph import Attr, Graph, Node, Parameter, Value
from slotwise.core.ops import contract_of
from slotwise.core.specs import TensorSpec
from slotwise.core.state import StateSpec


@dataclass
class GraphBuilder:
    """Builds a graph node by node; each op's contract infers its output specs and refuses wrong inputs at once.

    >>> g = GraphBuilder("tiny")
    >>> ids = g.input("token_ids", TensorSpec(DType.I32, ("T",)))
    >>> table = g.parameter("embed", TensorSpec(DType.F32, (101, 24)), "model.embed_tokens.weight")
    >>> (x,) = g.op("embedding", ids, table, scale=1.0)
    """

    name: str
    _inputs: list[Value] = field(default_factory=list)
    _parameters: list[Parameter] = field(default_factory=list)
    _states: list[StateSpec] = field(default_factory=list)
    _nodes: list[Node] = field(default_factory=list)
    _names: set[str] = field(default_factory=set)
    _count: int = 0

    def input(self, name: str, spec: TensorSpec) -> Value:
        """A value that each call gives."""
        value = Value(self._claim(name), spec, "input")
        self._inputs.append(value)
        return value

    def parameter(self, name: str, spec: TensorSpec, *sources: str) -> Value:
        """A weight called `name`, made of the checkpoint tensors `sources` joined along dimension 0."""
        value = Value(self._claim(name), spec, "parameter")
        self._parameters.append(Parameter(value, sources))
        return value

    def state(self, state: StateSpec) -> None:
        """Declare what a layer remembers."""
        self._states.append(state)

    def op(self, name: str, *inputs: Value | None, **attrs: Attr) -> tuple[Value, ...]:
        """Append a node; returns its outputs. Raises GraphError when the inputs break the op's contract."""
        node = make_node(name, inputs, attrs, self._fresh)
        self._nodes.append(node)
        return node.outputs

    def finish(self, *outputs: Value) -> Graph:
        """The checked graph."""
        graph = Graph(
            self.name, tuple(self._inputs), tuple(self._parameters), tuple(self._states), tuple(self._nodes), outputs
        )
        check_graph(graph)
        return graph

    def _claim(self, name: str) -> str:
        if name in self._names:
            raise GraphError(f"graph {self.name}: the name {name!r} is taken; give each value its own")
        self._names.add(name)
        return name

    def _fresh(self) -> str:
        self._count += 1
        return f"%{self._count - 1}"


class FreshNames:
    """Names `%0`, `%1`, ... that `graph` does not use yet; call it for the next one."""

    def __init__(self, graph: Graph) -> None:
        used = [v.name for node in graph.nodes for v in node.outputs if v.name[1:].isdigit()]
        self._next = max((int(name[1:]) for name in used), default=-1) + 1

    def __call__(self) -> str:
        """The next unused name."""
        name = f"%{self._next}"
        self._next += 1
        return name


def make_node(
    op: str,
    inputs: Sequence[Value | None],
    attrs: Mapping[str, Attr],
    fresh: Callable[[], str] | None,
    outputs: Sequence[Value] | None = None,
) -> Node:
    """A node whose output specs and effects follow from the op's contract.

    `fresh` is called for each new output's name; pass `outputs` to keep existing values (their specs are compared).
    Raises GraphError when inputs, attributes or outputs break the contract.
    """
    contract = contract_of(op)
    full = contract.complete_attrs(attrs)
    specs = contract.infer(tuple(None if v is None else v.spec for v in inputs), full)
    if outputs is None:
        if fresh is None:
            raise GraphError(f"node {op}: a source of fresh names is needed when outputs are not given")
        made = tuple(Value(fresh(), spec) for spec in specs)
    else:
        made = tuple(outputs)
        if tuple(v.spec for v in made) != specs:
            found = ", ".join(str(v.spec) for v in made)
            raise GraphError(f"node {op}: outputs are {found}, its contract says {', '.join(map(str, specs))}")
    return Node(op, tuple(inputs), made, tuple(sorted(full.items())), contract.effects_of(full))
