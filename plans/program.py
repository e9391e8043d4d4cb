"""Programs: the kernel calls of one role for one row bucket.

Owns `Program` and `RolePlan`. What always holds: a program's graph is bound (no names in its specs), every node has a
kernel, every intermediate value has a place in the arena; the first rows of a bucket are real, the rest are padding
that reads nothing and writes the scratch slot.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.graph import Graph, Parameter
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.core.state import StateGroup, StateSpec, grouped
from slotwise.plans.passes.plan_buffers import Placement, arena_bytes, call_spec

SAMPLER = "sampler"
DECODE, PREFILL = "decode", "prefill"


@dataclass(frozen=True, slots=True)
class Program:
    """The calls that run `rows` rows of `role`; `kind` is `decode`, `prefill`, or what a sampler program does."""

    role: str
    kind: str
    rows: int
    graph: Graph
    placements: tuple[Placement, ...]

    @property
    def name(self) -> str:
        """`role.kind.rows`."""
        return f"{self.role}.{self.kind}.{self.rows}"

    @property
    def arena_bytes(self) -> int:
        """Bytes of activations and workspaces alive at the peak."""
        return arena_bytes(self.placements)

    @property
    def kernels(self) -> frozenset[tuple[str, str]]:
        """Every (op, kernel) that the program runs."""
        return frozenset((n.op, n.selection.kernel) for n in self.graph.nodes if n.selection is not None)

    @property
    def row_invariant(self) -> bool:
        """Whether every kernel was chosen as row-invariant."""
        return all(node.selection is not None and node.selection.row_invariant for node in self.graph.nodes)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weights and tables that one run reads; of a table that is only looked up in, next to nothing."""
        read = {v.name for node in self.graph.nodes if node.op != "embedding" for v in node.inputs if v is not None}
        return sum(p.value.spec.nbytes() for p in self.graph.parameters if p.value.name in read)

    def bytes_moved(self) -> int:
        """Bytes that the calls of one run must at least move, attention left out (it depends on lengths)."""
        return sum(
            contract_of(node.op).call_cost(call_spec(node).inputs, node.attr_dict).bytes
            for node in self.graph.nodes
            if node.op != "attention"
        )

    def flops(self) -> int:
        """Floating-point operations of one run, attention left out (it depends on lengths)."""
        return sum(
            contract_of(node.op).call_cost(call_spec(node).inputs, node.attr_dict).flops
            for node in self.graph.nodes
            if node.op != "attention"
        )


@dataclass(frozen=True, slots=True)
class RolePlan:
    """What a plan fixes for one model: its states, its weights, and how far its positions reach.

    `capacity` is the most tokens of one sequence; `positions` the rows of its rotary table; `pages` the pages of its
    pool, the scratch page not counted; `fingerprint` identifies the checkpoint.
    """

    role: str
    model: str
    fingerprint: str
    dtype: DType
    vocab_size: int
    capacity: int
    positions: int
    page_size: int
    pages: int
    states: tuple[StateSpec, ...]
    parameters: tuple[Parameter, ...]

    @property
    def slots(self) -> int:
        """Slots of each state of unit `token`, the scratch page's included."""
        return (self.pages + 1) * self.page_size

    @property
    def cache_bytes(self) -> int:
        """Bytes of all states of all layers."""
        return sum(self.group_bytes(group) for group in self.groups)

    def group_bytes(self, group: StateGroup) -> int:
        """Bytes of all entries of one of `groups`."""
        return self.slots * group.nbytes

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, all layers together."""
        return sum(state.nbytes for state in self.states)

    @property
    def groups(self) -> tuple[StateGroup, ...]:
        """States that live and die together."""
        return grouped(self.states)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weights and tables as they are held; a tensor used twice counts once."""
        unique = {(p.sources, p.derive, p.layout, p.value.spec): p.value.spec.nbytes() for p in self.parameters}
        return sum(unique.values())
