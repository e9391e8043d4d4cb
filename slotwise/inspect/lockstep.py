"""Lockstep: one run, and every op of it run again by other backends on the same inputs.

Owns `Lockstep`, the conductor that does it, and its tallies. What always holds: the leader generates as it always
does, and nothing that a follower computes reaches it; calls are compared with those that mean the same, and every call
that has none is counted with the reason; with the same inputs, two kernels that keep their contract's tolerance cannot
be further apart than twice it; the oracle, asked where they are further apart than one, says which of them left it.
With `free_run` a follower keeps its own activations and caches instead, and errors accumulate as they would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from slotwise.core.contract import OpContract, Tolerance
from slotwise.core.errors import PlanError
from slotwise.core.model import WeightSource
from slotwise.core.ops import contract_of
from slotwise.engine.calls import BoundCall
from slotwise.engine.engine import Engine
from slotwise.engine.executor import Executor
from slotwise.inspect.finding import Finding, dtype_of, judge
from slotwise.inspect.matching import Matching, WeightsCompared, compare_weights, match_calls
from slotwise.plans.arrays import OVER_IDS, input_array
from slotwise.plans.plan import Plan
from slotwise.plans.program import SAMPLER, Program
from slotwise.proving.measures import cosine

Key = tuple[str, str, int]
OTHER_ORDER = "it runs its calls in another order"


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a follower's output is from the leader's: `error` is |difference| over |leader|, both as vectors."""

    step: int
    program: str
    call: int
    op: str
    error: float
    cosine: float


@dataclass
class Tally:
    """What was compared with one follower, and what was not.

    `compared` counts calls; `alone` counts calls by (op, why it could not be compared); `worst` holds, by op, the
    greatest distance as a share of what is allowed; `drifts`, of a free run, every model op of every call.
    """

    weights: WeightsCompared
    compared: int = 0
    alone: Counter[tuple[str, str]] = field(default_factory=Counter)
    worst: dict[str, float] = field(default_factory=dict)
    drifts: list[Drift] = field(default_factory=list)


@dataclass
class _Follower:
    """A backend that follows: its executor, the partners of the leader's calls, and what it did so far."""

    executor: Executor
    matchings: Mapping[Key, Matching]
    tally: Tally


class Lockstep:
    """Attach to an engine that is idle; `followers` are plans of the same model for other backends, by name.

    `weights` are the leader's. `finding` is the first op out of tolerance, once there is one: then nothing more is
    compared. `tallies` say by follower what was. Raises PlanError for a free run whose follower has other programs or
    arrays than the leader.
    """

    def __init__(
        self,
        engine: Engine,
        followers: Mapping[str, Plan],
        weights: Mapping[str, WeightSource],
        *,
        free_run: bool = False,
    ) -> None:
        self._engine, self._free_run = engine, free_run
        if free_run:
            for name, plan in followers.items():
                check_same_arrays(engine.plan, plan, name)
        self._followers = {name: self._follower(Executor(plan, weights)) for name, plan in followers.items()}
        self.finding: Finding | None = None
        engine.executor.conductor = self._conduct

    @property
    def tallies(self) -> dict[str, Tally]:
        """What was compared with each follower so far."""
        return {name: follower.tally for name, follower in self._followers.items()}

    def detach(self) -> None:
        """Let the engine run alone again."""
        self._engine.executor.conductor = None

    def _follower(self, executor: Executor) -> _Follower:
        for role, caches in self._engine.executor.caches.items():
            _follow_caches(caches, executor.caches.get(role, {}))
        theirs = {(p.role, p.kind, p.rows): p for p in executor.plan.programs}
        matchings = {}
        for program in self._engine.plan.programs:
            key = program.role, program.kind, program.rows
            matchings[key] = match_calls(program, theirs.get(key))
        return _Follower(executor, matchings, Tally(compare_weights(self._engine.executor, executor)))

    def _conduct(self, program: Program, calls: tuple[BoundCall, ...]) -> None:
        if self._free_run:
            self._run_freely(program, calls)
            return
        key = (program.role, program.kind, program.rows)
        for index, call in enumerate(calls):
            if self.finding is not None:
                call.launch()
                continue
            before = _Before(call)
            call.launch()
            for follower in self._followers.values():
                matching = follower.matchings[key]
                partner = matching.partners[index]
                if partner is None or index in matching.reasons:
                    follower.tally.alone[call.node.op, matching.reasons[index]] += 1
                else:
                    self._compare(follower, program, index, call, follower.executor.calls[key][partner], before)
                    follower.tally.compared += 1
                _follow_writes(call, follower.executor.caches.get(program.role, {}))

    def _run_freely(self, program: Program, calls: tuple[BoundCall, ...]) -> None:
        """Each side runs its own calls, in its own order; outputs are measured while they stand."""
        key = (program.role, program.kind, program.rows)
        # In a draft loop each round has arrays of its own: what a program is fed, its calls know.
        fed = {v.name: t for c in calls for v, t in zip(c.node.inputs, c.inputs, strict=True) if v and t is not None}
        begun = dict.fromkeys(self._followers, 0)
        for follower in self._followers.values():
            self._hand_over_inputs(program, fed, follower.executor)
        for index, call in enumerate(calls):
            call.launch()
            for name, follower in self._followers.items():
                theirs, matching = follower.executor.calls[key], follower.matchings[key]
                partner = matching.partners[index]
                if partner is None or partner < begun[name]:
                    reason = matching.reasons.get(index, OTHER_ORDER)
                    follower.tally.alone[call.node.op, reason] += 1
                    continue
                for its in theirs[begun[name] : partner + 1]:
                    its.launch()
                begun[name] = partner + 1
                follower.tally.compared += index not in matching.reasons
                if program.role != SAMPLER:
                    self._measure(follower, program, index, call, theirs[partner], int(fed["row_start"][-1]))
        for name, follower in self._followers.items():
            for its in follower.executor.calls[key][begun[name] :]:
                its.launch()

    def _hand_over_inputs(self, program: Program, fed: Mapping[str, torch.Tensor], executor: Executor) -> None:
        """What the engine decided (tokens, positions, slots, controls); what kernels computed each side keeps."""
        for value in program.graph.inputs:
            name = input_array(program, value, executor.plan.target.vocab_size)
            if value.name not in (*OVER_IDS, "draft_scores"):
                executor.buffers[name][: len(fed[value.name])].copy_(fed[value.name])

    def _compare(
        self, follower: _Follower, program: Program, index: int, call: BoundCall, its: BoundCall, before: _Before
    ) -> None:
        contract = contract_of(call.node.op)
        before.restore_into(its)
        its.launch()
        tolerance, worst = contract.tolerance[dtype_of(call.node)], follower.tally.worst
        for name, got, want in _results(contract, its, call):
            allowed = allowed_apart(want, tolerance)
            apart = (got.double() - want.double()).abs()
            apart = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, apart)
            apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
            _ignore_meaningless(contract, name, its, call, apart)
            if not apart.numel():
                continue
            # Where nothing is allowed, any difference is one allowance and more.
            share = torch.where(apart == 0, 0.0, apart / allowed.clamp(min=1e-300)).clamp(max=1e6)
            most = float(share.max())
            worst[call.node.op] = max(most, worst.get(call.node.op, 0.0))
            if most > 0.5 and self.finding is None:
                # Further apart than one tolerance: one of the two may have left it. The oracle knows.
                self.finding = judge(self._engine.epoch, program, index, its.node, before.inputs, name, (want, got))

    def _measure(
        self, follower: _Follower, program: Program, index: int, call: BoundCall, its: BoundCall, total: int
    ) -> None:
        rows = min(len(call.outputs[0]), total) if call.outputs else 0  # the rest is padding
        for mine, other in zip(call.outputs[:1], its.outputs[:1], strict=True):
            left, right = mine[:rows].cpu().double(), other[:rows].cpu().double()
            size = float(left.norm())
            error = float((left - right).norm()) / size if size else float((left - right).norm())
            drift = Drift(self._engine.epoch, program.name, index, call.node.op, error, cosine(right, left))
            follower.tally.drifts.append(drift)


class _Before:
    """The inputs of a call before it ran: copies of activations and of the caches that it writes."""

    def __init__(self, call: BoundCall) -> None:
        contract = contract_of(call.node.op)
        self.inputs = tuple(
            value if value is None or _stays(node_value, argument.cache) else value.clone()
            for argument, node_value, value in zip(contract.inputs, call.node.inputs, call.inputs, strict=True)
        )

    def restore_into(self, its: BoundCall) -> None:
        """Give a follower's call these inputs; weights it has, and its caches are kept in step after each write."""
        for value, node_value, target in zip(self.inputs, its.node.inputs, its.inputs, strict=True):
            if value is None or target is None or node_value is None:
                continue
            if node_value.kind not in ("parameter", "cache"):
                target.copy_(value)


def _stays(node_value: object, cache: str) -> bool:
    """Whether a call leaves this input alone for good: weights, and caches that it only reads."""
    kind = getattr(node_value, "kind", "")
    return kind == "parameter" or (kind == "cache" and cache != "writes")


def _follow_caches(leaders: Mapping[str, torch.Tensor], followers: Mapping[str, torch.Tensor]) -> None:
    """Copy the leader's caches into the follower's of the same name and shape; calls on others have no partner."""
    for name, cache in leaders.items():
        if name in followers and followers[name].shape == cache.shape:
            followers[name].copy_(cache)


def _follow_writes(call: BoundCall, followers: Mapping[str, torch.Tensor]) -> None:
    """Give a follower what a call of the leader's wrote to caches, whatever its own call made of it."""
    contract = contract_of(call.node.op)
    triples = zip(contract.inputs, call.node.inputs, call.inputs, strict=True)
    written = {v.name: t for a, v, t in triples if a.cache == "writes" and v is not None and t is not None}
    _follow_caches(written, followers)


def check_same_arrays(left: Plan, right: Plan, name: str) -> None:
    """Raise PlanError unless the two plans have the same programs, arrays and caches: what a free run hands over."""

    def borders(plan: Plan) -> tuple[object, ...]:
        names = [program.name for program in plan.programs]
        sizes = [(role.role, role.page_size, role.pages, role.capacity, role.states) for role in plan.roles]
        return names, sizes, plan.buffers

    if borders(left) != borders(right):
        raise PlanError(
            f"{name} cannot run freely beside the leader: its plan has other programs, pages or arrays; capacity, "
            "page_size, max_sequences, speculate and dtype must be the same (`slotwise plan diff` compares two plans)"
        )


def allowed_apart(want: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """How far apart two right kernels may be: each may be a tolerance away from the oracle, in opposite directions."""
    if not want.is_floating_point():
        return torch.zeros(want.shape, dtype=torch.float64)
    return 2 * tolerance.around(want.double())


def _results(contract: OpContract, its: BoundCall, call: BoundCall) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, follower's, leader's) of every output and written cache."""
    found = [
        (argument.name, got.cpu(), want.cpu())
        for argument, got, want in zip(contract.outputs, its.outputs, call.outputs, strict=True)
    ]
    for argument, got_in, want_in in zip(contract.inputs, its.inputs, call.inputs, strict=True):
        if argument.cache == "writes" and got_in is not None and want_in is not None:
            found.append((argument.name, got_in.cpu(), want_in.cpu()))
    return found


def _ignore_meaningless(contract: OpContract, name: str, its: BoundCall, call: BoundCall, apart: torch.Tensor) -> None:
    """Rows that are not `ok` have no token."""
    names = [argument.name for argument in contract.outputs]
    if "ok" in names and name != "ok" and name in names:
        apart[~call.outputs[names.index("ok")].cpu().bool()] = 0
