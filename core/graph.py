"""The graph IR: frozen nodes over SSA values.

Owns `Value`, `Node`, `Graph` and `GraphBuilder`. What always holds: a value is defined once (as an input, a parameter,
a cache or a node's output) and before its uses; nodes stand in an order that respects data and cache effects; nothing
is changed in place, a pass makes a new graph. `core/check.py` enforces all of it, `core/printer.py` prints it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from slotwise.core.errors import GraphError
from slotwise.core.specs import TensorSpec

Attr = int | float | str | bool
ValueKind = Literal["input", "parameter", "cache", "value"]
Rollback = Literal["truncate", "checkpoint", "none"]


@dataclass(frozen=True, slots=True)
class Value:
    """One SSA value: a unique name, what it looks like, and where it comes from."""

    name: str
    spec: TensorSpec
    kind: ValueKind = "value"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight or table: a value and the checkpoint tensors that make it, joined along dimension 0.

    A source name that starts with `rope.` is computed by the model (rotary tables), all others are read. `derive` says
    what is made of the joined sources: empty for the tensor itself, else a scheme of `core/quantise.py` and one of its
    parts, as in `int8.codes`; `layout` is the one of `core/layouts.py` in which the result stands, `word` its word.
    """

    value: Value
    sources: tuple[str, ...]
    derive: str = ""
    layout: str = "rows"
    word: int = 0


@dataclass(frozen=True, slots=True)
class Cache:
    """The K/V state of one layer: `kv_heads` heads of `head_dim`, one slot a token.

    `rollback` says how speculation can undo writes: `truncate` (forget the last slots), `checkpoint`, or `none`.
    """

    layer: int
    kv_heads: int
    head_dim: int
    rollback: Rollback = "truncate"


@dataclass(frozen=True, slots=True)
class Effect:
    """What a node does to a cache: reads or writes `span` of layer `layer` (`span` is text, for people)."""

    kind: Literal["reads", "writes"]
    layer: int
    span: str

    def __str__(self) -> str:
        return f"{self.kind} kv{self.layer}[{self.span}]"


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a backend's kernel was not chosen for a node."""

    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The kernel that runs a node (`backend:name`), why it, and why not the others.

    `row_invariant` says whether the kernel keeps row invariance for the rows of this call.
    """

    kernel: str
    reason: str
    row_invariant: bool = True
    rejected: tuple[Rejection, ...] = ()

    @property
    def backend(self) -> str:
        """The backend's name."""
        return self.kernel.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Node:
    """One op applied to values. `None` among the inputs is an optional argument left out."""

    op: str
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    effects: tuple[Effect, ...] = ()
    selection: Selection | None = None

    def attr(self, name: str) -> Attr:
        """The value of attribute `name`; raises GraphError when the node has none of that name."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise GraphError(f"node {self.op} has no attribute {name!r}; it has {[key for key, _ in self.attrs]}")

    @property
    def attr_dict(self) -> dict[str, Attr]:
        """The attributes as a dictionary."""
        return dict(self.attrs)


@dataclass(frozen=True, slots=True)
class Graph:
    """A function from inputs, parameters and caches to outputs, as an ordered list of nodes."""

    name: str
    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    caches: tuple[Cache, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Value, ...]

    def with_nodes(self, nodes: Sequence[Node]) -> Graph:
        """The same graph with other nodes."""
        return replace(self, nodes=tuple(nodes))

    def producer(self) -> dict[str, Node]:
        """Value name -> the node that makes it."""
        return {out.name: node for node in self.nodes for out in node.outputs}

    def uses(self) -> dict[str, list[Node]]:
        """Value name -> the nodes that read it, in order; graph outputs are not counted."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                if value is not None:
                    found.setdefault(value.name, []).append(node)
        return found

    def __str__(self) -> str:
        from slotwise.core.printer import format_graph

        return format_graph(self)


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
    _caches: list[Cache] = field(default_factory=list)
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

    def cache(self, layer: int, kv_heads: int, head_dim: int, rollback: Rollback = "truncate") -> Cache:
        """Declare the K/V cache of `layer`."""
        cache = Cache(layer, kv_heads, head_dim, rollback)
        self._caches.append(cache)
        return cache

    def op(self, name: str, *inputs: Value | None, **attrs: Attr) -> tuple[Value, ...]:
        """Append a node; returns its outputs. Raises GraphError when the inputs break the op's contract."""
        node = make_node(name, inputs, attrs, self._fresh)
        self._nodes.append(node)
        return node.outputs

    def finish(self, *outputs: Value) -> Graph:
        """The checked graph."""
        from slotwise.core.check import check_graph

        graph = Graph(
            self.name, tuple(self._inputs), tuple(self._parameters), tuple(self._caches), tuple(self._nodes), outputs
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
    from slotwise.core.ops import contract_of

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
