"""The graph IR: frozen nodes over SSA values.

Owns `Value`, `Node` and `Graph`. What always holds: a value is defined once (as an input, a parameter,
a cache or a node's output) and before its uses; nodes stand in an order that respects data and cache effects; nothing
is changed in place, a pass makes a new graph. `core/builder.py` makes graphs, `core/check.py` enforces all of it,
`core/printer.py` prints it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from slotwise.core.errors import GraphError
from slotwise.core.specs import TensorSpec
from slotwise.core.state import StateSpec

Attr = int | float | str | bool
ValueKind = Literal["input", "parameter", "cache", "value"]


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
class Effect:
    """What a node does to a state: reads or writes `span` of the state called `state` (`span` is text, for people)."""

    kind: Literal["reads", "writes"]
    state: str
    span: str

    def __str__(self) -> str:
        return f"{self.kind} {self.state}[{self.span}]"


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
    """A function from inputs, parameters and states to outputs, as an ordered list of nodes."""

    name: str
    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    states: tuple[StateSpec, ...]
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
