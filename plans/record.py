"""A plan's content: everything that is fixed before the first token.

Owns `PlanRecord`. What always holds: it is frozen, hashable and self-contained, and what is printed, compared, checked
or saved of a plan is a function of this record alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.specs import TensorSpec
from slotwise.plans.loop import DraftLoop
from slotwise.plans.options import PlanOptions
from slotwise.plans.program import DECODE, PREFILL, Program, RolePlan
from slotwise.slots.step import DRAFT, TARGET, Step

SCHEMA = 5
"""Version of the JSON form; raised when a reader of the old form could misread the new one."""


@dataclass(frozen=True)
class PlanRecord:
    """What a compiled plan holds. `draft` is the drafter's kind: `none`, `ngram` or `model`.

    `buffers` are the arrays through which the engine feeds programs and reads their results, by name, at their largest;
    a program of a smaller bucket uses the first rows. All intermediate values lie in one arena of `arena_bytes`.
    `loops` say which rounds of drafting run as one launch.
    """

    options: PlanOptions
    draft: str
    roles: tuple[RolePlan, ...]
    programs: tuple[Program, ...]
    steps: tuple[Step, ...]
    buffers: tuple[tuple[str, TensorSpec], ...]
    loops: tuple[DraftLoop, ...] = ()

    @property
    def arena_bytes(self) -> int:
        """The arena: the largest need of any program, for one program runs at a time."""
        return max((program.arena_bytes for program in self.programs), default=0)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the engine's input and output arrays."""
        return sum(spec.nbytes() for _, spec in self.buffers)

    @property
    def total_bytes(self) -> int:
        """Weights, caches, arena and buffers."""
        fixed = sum(role.parameter_bytes + role.cache_bytes for role in self.roles)
        return fixed + self.arena_bytes + self.buffer_bytes

    def role(self, name: str) -> RolePlan:
        """The role called `name` (KeyError when the plan has none)."""
        return {role.role: role for role in self.roles}[name]

    @property
    def target(self) -> RolePlan:
        """The role whose tokens are the output."""
        return self.role(TARGET)

    @property
    def has_draft_model(self) -> bool:
        """Whether there is a second model with its own cache."""
        return any(role.role == DRAFT for role in self.roles)

    @property
    def drafts_fewer_ids(self) -> bool:
        """Whether the draft model has fewer token ids than the target: then drafts are drawn from those alone."""
        return self.has_draft_model and self.role(DRAFT).vocab_size < self.target.vocab_size

    def step(self, name: str) -> Step:
        """The step called `name` (KeyError when the plan has none)."""
        return {step.name: step for step in self.steps}[name]

    def buckets(self, role: str, kind: str) -> tuple[int, ...]:
        """The row counts for which there is a program, ascending."""
        return tuple(sorted(p.rows for p in self.programs if p.role == role and p.kind == kind))

    @property
    def prefill_is_invariant(self) -> bool:
        """Whether prefill gives the very bits of decoding row by row; if not, chunks stand on a fixed grid.

        It does when its kernels are row-invariant and the decode side's own.
        """
        prefill = [p for p in self.programs if p.role == TARGET and p.kind == PREFILL]
        decode = [p for p in self.programs if p.role == TARGET and p.kind == DECODE]
        own = {pair for program in decode for pair in program.kernels}
        # Only prefill selects rows, and copying a row cannot change it.
        return all(p.row_invariant and {k for k in p.kernels if k[0] != "take_rows"} <= own for p in prefill)

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that runs at least one call, by name."""
        nodes = (node for program in self.programs for node in program.graph.nodes)
        return tuple(sorted({node.selection.backend for node in nodes if node.selection is not None}))

    @property
    def draft_cost_ratio(self) -> float:
        """Bytes of weights that one draft row reads, over those of a target row (decoding is bound by memory)."""
        by_role = {p.role: p.parameter_bytes for p in self.programs if p.kind == "decode"}
        return by_role.get(DRAFT, 0) / max(1, by_role[TARGET])
