"""Lockstep: one run, and every op of it run again by other backends on the same inputs.

Owns `Lockstep`, the conductor that does it, and its findings. What always holds: the leader generates as it always
does, and nothing that a follower computes reaches it; with the same inputs, two kernels that keep their contract's
tolerance cannot be further apart than twice it; the oracle, asked where they are further apart than one, says which of
them left it.
With `free_run` a follower keeps its own activations and caches instead, and errors accumulate as they would.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from slotwise.core.backend import Tensors
from slotwise.core.contract import EXACT, OpContract, Tolerance
from slotwise.core.errors import PlanError
from slotwise.core.graph import Node
from slotwise.core.model import WeightSource
from slotwise.core.ops import contract_of
from slotwise.core.printer import format_around
from slotwise.core.specs import DType
from slotwise.engine.calls import BoundCall
from slotwise.engine.engine import Engine
from slotwise.engine.executor import Executor
from slotwise.plans.arrays import OVER_IDS, input_array
from slotwise.plans.plan import Plan
from slotwise.plans.program import SAMPLER, Program
from slotwise.proving.measures import cosine
from slotwise.proving.validate import oracle

SHOWN = 16
"""Integers of an input that are shown as they are; of longer inputs, the range."""

REACH = 2
"""Elements of the last dimension that are shown on either side of the worst one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The first op at which two backends part on the same inputs.

    `leader` and `follower` are their values of output `output` at `index`, `want` the float64 oracle's; `at_fault`
    names the kernels that are out of the contract's tolerance from the oracle.
    """

    step: int
    program: str
    call: int
    op: str
    kernels: tuple[str, str]
    output: str
    index: tuple[int, ...]
    leader: float
    follower: float
    want: float
    allowed: float
    at_fault: tuple[str, ...]
    about: tuple[str, ...]
    neighbourhood: str
    around: str

    def __str__(self) -> str:
        one, other = self.kernels
        names = ", ".join(self.at_fault) or "neither alone; together they are further apart than both may be"
        return "\n".join(
            [
                f"step {self.step}, program {self.program}, call {self.call}: op {self.op} is out of tolerance",
                f"  kernels {one} and {other}; at fault: {names}",
                *(f"  {line}" for line in self.about),
                f"  worst element {self.output}{list(self.index)}: {self.leader:.9g} and {self.follower:.9g}",
                f"  the oracle has {self.want:.9g} there; {self.allowed:.3g} is allowed",
                *(f"  {line}" for line in self.neighbourhood.splitlines()),
                self.around,
            ]
        )


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
class _Follower:
    """A backend that follows: its executor, and what it did so far."""

    name: str
    executor: Executor
    worst: dict[str, float] = field(default_factory=dict)


class Lockstep:
    """Attach to an engine that is idle; `followers` are plans of the same model for other backends, by name.

    `weights` are the leader's. `finding` is the first op out of tolerance, once there is one: then nothing more is
    compared. `compared` counts calls; `worst` holds, by follower and op, the greatest distance as a share of what is
    allowed; `drifts`, with `free_run`, every model op of every call. Raises PlanError when a plan runs other calls.
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
        for name, plan in followers.items():
            check_same_graphs(engine.plan, plan, name)
        self._followers = [_Follower(name, Executor(plan, weights)) for name, plan in followers.items()]
        for follower in self._followers:
            for role, caches in engine.executor.caches.items():
                for name, cache in caches.items():
                    follower.executor.caches[role][name].copy_(cache)
        self.compared = 0
        self.drifts: dict[str, list[Drift]] = {name: [] for name in followers}
        self.finding: Finding | None = None
        engine.executor.conductor = self._conduct

    @property
    def worst(self) -> dict[str, dict[str, float]]:
        """By follower and op: the greatest distance, as a share of twice the tolerance."""
        return {follower.name: dict(follower.worst) for follower in self._followers}

    def detach(self) -> None:
        """Let the engine run alone again."""
        self._engine.executor.conductor = None

    def _conduct(self, program: Program, calls: tuple[BoundCall, ...]) -> None:
        key = (program.role, program.kind, program.rows)
        theirs = [follower.executor.calls[key] for follower in self._followers]
        # In a draft loop each round has arrays of its own: what a program is fed, its calls know.
        fed = {v.name: t for c in calls for v, t in zip(c.node.inputs, c.inputs, strict=True) if v and t is not None}
        if self._free_run:
            for follower in self._followers:
                self._hand_over_inputs(program, fed, follower.executor)
        for index, call in enumerate(calls):
            if self.finding is not None:
                call.launch()
                continue
            before = None if self._free_run else _Before(call)
            call.launch()
            for follower, its in zip(self._followers, theirs, strict=True):
                if self._free_run:
                    its[index].launch()
                    if program.role != SAMPLER:
                        self._measure(follower, program, index, call, its[index], int(fed["row_start"][-1]))
                elif before is not None:
                    self._compare(follower, program, index, call, its[index], before)
            self.compared += len(theirs)

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
        dtype = _dtype_of(call.node)
        tolerance = contract.tolerance[dtype]
        for name, got, want in _results(contract, its, call):
            allowed = allowed_apart(contract, name, want, tolerance)
            apart = (got.double() - want.double()).abs()
            apart = torch.where((got == want) | (got.isnan() & want.isnan()), 0.0, apart)
            apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
            _ignore_meaningless(contract, name, its, call, apart)
            if apart.numel():
                # Where nothing is allowed, any difference is one allowance and more.
                share = torch.where(apart == 0, 0.0, apart / allowed.clamp(min=1e-300)).clamp(max=1e6)
                most = float(share.max())
                follower.worst[call.node.op] = max(most, follower.worst.get(call.node.op, 0.0))
                if most > 0.5 and self.finding is None:
                    # Further apart than one tolerance: one of the two may have left it. The oracle knows.
                    at = int(share.argmax())
                    finding = self._describe(program, index, call, its, before, name, got, want, at)
                    self.finding = finding if finding.at_fault or most > 1 else None
        for mine, other in zip(call.outputs, its.outputs, strict=True):
            other.copy_(mine)
        for argument, mine_in, other_in in zip(contract.inputs, call.inputs, its.inputs, strict=True):
            if argument.cache == "writes" and mine_in is not None and other_in is not None:
                other_in.copy_(mine_in)

    def _describe(
        self,
        program: Program,
        index: int,
        call: BoundCall,
        its: BoundCall,
        before: _Before,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        at: int,
    ) -> Finding:
        contract = contract_of(call.node.op)
        place = tuple(int(i) for i in torch.unravel_index(torch.tensor(at), got.shape))
        truth = oracle(contract, before.inputs, call.node.attr_dict)[name].cpu()
        tolerance = contract.tolerance[_dtype_of(call.node)]
        exact = tolerance == EXACT or not truth.is_floating_point()
        truth_at = float(truth.to(got.dtype)[place]) if exact else float(truth[place])
        allowed = 0.0 if exact else tolerance.absolute + tolerance.relative * abs(truth_at)
        kernels = (_kernel(call.node), _kernel(its.node))
        values = (float(want[place]), float(got[place]))
        blamed = tuple(
            kernel
            for kernel, value in zip(kernels, values, strict=True)
            if not (value == truth_at or abs(value - truth_at) <= allowed)
        )
        return Finding(
            step=self._engine.epoch,
            program=program.name,
            call=index,
            op=call.node.op,
            kernels=kernels,
            output=name,
            index=place,
            leader=values[0],
            follower=values[1],
            want=truth_at,
            allowed=allowed,
            at_fault=blamed,
            about=_about_call(contract, call.node, before.inputs),
            neighbourhood=_neighbourhood(name, place, want, got, truth),
            around=format_around(program.graph, index),
        )

    def _measure(
        self, follower: _Follower, program: Program, index: int, call: BoundCall, its: BoundCall, total: int
    ) -> None:
        rows = min(len(call.outputs[0]), total) if call.outputs else 0  # the rest is padding
        for mine, other in zip(call.outputs[:1], its.outputs[:1], strict=True):
            left, right = mine[:rows].cpu().double(), other[:rows].cpu().double()
            size = float(left.norm())
            error = float((left - right).norm()) / size if size else float((left - right).norm())
            drift = Drift(self._engine.epoch, program.name, index, call.node.op, error, cosine(right, left))
            self.drifts[follower.name].append(drift)


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


def check_same_graphs(left: Plan, right: Plan, name: str) -> None:
    """Raise PlanError unless the two plans run the same calls in the same order, kernels aside."""

    def calls(plan: Plan) -> list[tuple[str, list[tuple[object, ...]]]]:
        return [(p.name, [(n.op, n.inputs, n.outputs, n.attrs) for n in p.graph.nodes]) for p in plan.programs]

    for one, other in itertools.zip_longest(calls(left), calls(right)):
        if one != other:
            where = (one or other or ("", []))[0]
            raise PlanError(
                f"{name} cannot follow: its program {where} runs other calls than the leader's; lockstep compares one "
                "plan on several backends, so options and dtype must be the same (`slotwise plan diff` compares them)"
            )


def allowed_apart(contract: OpContract, name: str, want: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """How far apart two right kernels may be: each may be a tolerance away from the oracle, in opposite directions."""
    if not want.is_floating_point():
        return torch.zeros(want.shape, dtype=torch.float64)
    size = want.double().abs()
    return 2 * (tolerance.absolute + tolerance.relative * torch.where(size.isfinite(), size, 0.0))


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


def _dtype_of(node: Node) -> DType:
    contract = contract_of(node.op)
    for argument, value in zip(contract.inputs, node.inputs, strict=True):
        if value is not None and isinstance(argument.dtype, str) and value.spec.dtype.is_float:
            return value.spec.dtype
    return DType.F32


def _kernel(node: Node) -> str:
    return node.op if node.selection is None else node.selection.kernel


def _about_call(contract: OpContract, node: Node, inputs: Tensors) -> tuple[str, ...]:
    """A line for each input, with what is in it; then outputs and attributes."""
    lines = [
        f"input {argument.name} = {value.name}: {value.spec}  {_summary(tensor)}"
        for argument, value, tensor in zip(contract.inputs, node.inputs, inputs, strict=True)
        if value is not None and tensor is not None
    ]
    lines += [f"output {a.name} = {v.name}: {v.spec}" for a, v in zip(contract.outputs, node.outputs, strict=True)]
    if node.attrs:
        lines.append(f"attributes {', '.join(f'{name}={value}' for name, value in node.attrs)}")
    return tuple(lines)


def _summary(tensor: torch.Tensor) -> str:
    """Few integers as they are; else the range of what is finite, and how much is not."""
    if not tensor.is_floating_point() and tensor.numel() <= SHOWN:
        return str(tensor.tolist())
    finite = tensor[tensor.isfinite()]
    if not finite.numel():
        return "nothing finite"
    rest = tensor.numel() - finite.numel()
    return f"{float(finite.min()):.4g} .. {float(finite.max()):.4g}" + (f", {rest} not finite" if rest else "")


def _neighbourhood(
    name: str, place: tuple[int, ...], leader: torch.Tensor, follower: torch.Tensor, truth: torch.Tensor
) -> str:
    """The elements beside the worst one, along the last dimension: leader, follower, oracle."""
    *head, last = place
    low, high = max(0, last - REACH), min(leader.shape[-1], last + REACH + 1)
    lines = [f"{name}{[*head, f'{low}..{high - 1}']}:".replace("'", "")]
    for word, values in (("leader", leader), ("follower", follower), ("oracle", truth)):
        row = values[tuple(head)][low:high]
        lines.append(f"  {word:<9}" + " ".join(f"{float(v):>14.7g}" for v in row))
    return "\n".join(lines)
