"""A plan that was tampered with is caught, and the rule it breaks is named.

Each mutant is a compiled plan of the bundled pair with one thing changed. The rules of the static verifier: roles,
steps, programs, graph, kernels, row invariance, arena, caches, weights, buffers, capacity, rotary, pages, and for steps
balance, written once, watermark, rows, width, budget, known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from slotwise.core.affine import Affine
from slotwise.core.errors import VerificationError
from slotwise.core.graph import Node, Parameter
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.passes.plan_buffers import ALIGNMENT, Placement
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.plans.sampling import sampler_graphs
from slotwise.plans.step import BEGIN, Limit, Span, Step, StepOp

Mutation = Callable[[Plan], Plan]
NAME = "target.decode.6"


def _program(name: str, change: Callable[[Program], Program]) -> Mutation:
    """Change one program."""

    def mutate(plan: Plan) -> Plan:
        assert name in [program.name for program in plan.programs]
        return dataclasses.replace(plan, programs=tuple(change(p) if p.name == name else p for p in plan.programs))

    return mutate


def _placements(change: Callable[[list[Placement]], Sequence[Placement]]) -> Mutation:
    return _program(NAME, lambda p: dataclasses.replace(p, placements=tuple(change(list(p.placements)))))


def _nodes(change: Callable[[list[Node]], Sequence[Node]], name: str = NAME) -> Mutation:
    return _program(name, lambda p: dataclasses.replace(p, graph=p.graph.with_nodes(change(list(p.graph.nodes)))))


def _first(nodes: list[Node], op: str) -> int:
    return next(index for index, node in enumerate(nodes) if node.op == op)


def _select(op: str, name: str = NAME, **changes: Any) -> Mutation:
    """Change the selection of the first node of `op`."""

    def change(nodes: list[Node]) -> list[Node]:
        index = _first(nodes, op)
        chosen = nodes[index].selection
        assert chosen is not None
        nodes[index] = dataclasses.replace(nodes[index], selection=dataclasses.replace(chosen, **changes))
        return nodes

    return _nodes(change, name)


def _unselected(nodes: list[Node]) -> list[Node]:
    return [dataclasses.replace(nodes[0], selection=None), *nodes[1:]]


def _attr(op: str, **attrs: Any) -> Mutation:
    def change(nodes: list[Node]) -> list[Node]:
        index = _first(nodes, op)
        found = tuple(sorted({**nodes[index].attr_dict, **attrs}.items()))
        nodes[index] = dataclasses.replace(nodes[index], attrs=found)
        return nodes

    return _nodes(change)


def _swapped(nodes: list[Node]) -> list[Node]:
    write, read = _first(nodes, "rotary_write"), _first(nodes, "attention")
    nodes[write], nodes[read] = nodes[read], nodes[write]
    return nodes


def _collide(placements: list[Placement]) -> list[Placement]:
    """Swap the offsets of two values, so that one of them lands on a value that is alive."""
    for i, one in enumerate(placements):
        for j, other in enumerate(placements):
            swapped = list(placements)
            swapped[i] = dataclasses.replace(one, offset=other.offset)
            swapped[j] = dataclasses.replace(other, offset=one.offset)
            if any(a.overlaps(b) for a in swapped for b in swapped if a is not b):
                return swapped
    raise AssertionError("no two offsets can be swapped to collide")


def _onto_a_live_one(placements: list[Placement]) -> list[Placement]:
    first = placements[0]
    index = next(
        i for i, p in enumerate(placements) if p.offset >= ALIGNMENT and p.first <= first.last and first.first <= p.last
    )
    placements[index] = dataclasses.replace(placements[index], offset=first.offset)
    return placements


def _parameter(change: Callable[[Parameter], Parameter], name: str, program: str = NAME) -> Mutation:
    """Change a parameter in one program, wherever the program mentions it."""

    def mutate(program: Program) -> Program:
        old = next(p for p in program.graph.parameters if p.value.name == name)
        new = change(old)
        nodes = [
            dataclasses.replace(node, inputs=tuple(new.value if v == old.value else v for v in node.inputs))
            for node in program.graph.nodes
        ]
        graph = dataclasses.replace(
            program.graph, parameters=tuple(new if p is old else p for p in program.graph.parameters)
        )
        return dataclasses.replace(program, graph=graph.with_nodes(nodes))

    return _program(program, mutate)


def _rows(parameter: Parameter, rows: int) -> Parameter:
    spec = TensorSpec(parameter.value.spec.dtype, (rows, *parameter.value.spec.shape[1:]))
    return dataclasses.replace(parameter, value=dataclasses.replace(parameter.value, spec=spec))


def _narrow_table(program: Program) -> Program:
    """The program reads page tables one column short."""
    old = next(v for v in program.graph.inputs if v.name == "page_table")
    new = dataclasses.replace(old, spec=_shorter(old.spec, 1))
    nodes = [
        dataclasses.replace(node, inputs=tuple(new if v == old else v for v in node.inputs))
        for node in program.graph.nodes
    ]
    inputs = tuple(new if v == old else v for v in program.graph.inputs)
    return dataclasses.replace(program, graph=dataclasses.replace(program.graph, inputs=inputs, nodes=tuple(nodes)))


def _everywhere_shorter(plan: Plan) -> Plan:
    """Rotary tables one row short in the role and in every program that reads them."""
    role = plan.target
    parameters = tuple(_rows(p, role.positions - 1) if p.sources[0].startswith("rope.") else p for p in role.parameters)
    plan = dataclasses.replace(plan, roles=(dataclasses.replace(role, parameters=parameters), *plan.roles[1:]))
    for program in [program.name for program in plan.programs if program.role == role.role]:
        for name in ("rope.cos", "rope.sin"):
            plan = _parameter(lambda p: _rows(p, role.positions - 1), name, program)(plan)
    return plan


def _role(name: str, **changes: Any) -> Mutation:
    """Change fields of a role; a value that is a function gets the old value."""

    def mutate(plan: Plan) -> Plan:
        roles = []
        for role in plan.roles:
            new = (
                {k: v(getattr(role, k)) if callable(v) else v for k, v in changes.items()} if role.role == name else {}
            )
            roles.append(dataclasses.replace(role, **new))
        return dataclasses.replace(plan, roles=tuple(roles))

    return mutate


def _options(**changes: Any) -> Mutation:
    return lambda plan: dataclasses.replace(plan, options=dataclasses.replace(plan.options, **changes))


def _buffer(name: str, change: Callable[[TensorSpec], TensorSpec] | None) -> Mutation:
    def mutate(plan: Plan) -> Plan:
        assert name in dict(plan.buffers)
        kept = [(n, change(s) if n == name and change else s) for n, s in plan.buffers if change or n != name]
        return dataclasses.replace(plan, buffers=tuple(kept))

    return mutate


def _shorter(spec: TensorSpec, axis: int = 0) -> TensorSpec:
    shape = list(spec.sizes())
    shape[axis] -= 1
    return TensorSpec(spec.dtype, tuple(shape))


def _fields(**changes: Any) -> Mutation:
    return lambda plan: dataclasses.replace(plan, **{k: v(plan) if callable(v) else v for k, v in changes.items()})


def _without_programs(role: str, kind: str, at_least: int = 0) -> Mutation:
    return lambda plan: dataclasses.replace(
        plan, programs=tuple(p for p in plan.programs if (p.role, p.kind) != (role, kind) or p.rows < at_least)
    )


PROGRAM_MUTANTS: dict[str, tuple[str, Mutation]] = {
    "a placement shifted off its alignment": (
        "arena", _placements(lambda ps: [dataclasses.replace(ps[0], offset=ps[0].offset + 1), *ps[1:]])),
    "a placement before the arena": (
        "arena", _placements(lambda ps: [dataclasses.replace(ps[0], offset=-ALIGNMENT), *ps[1:]])),
    "a placement shifted onto a live value": ("arena", _placements(_onto_a_live_one)),
    "a placement shrunk": (
        "arena", _placements(lambda ps: [dataclasses.replace(ps[0], nbytes=ps[0].nbytes - 1), *ps[1:]])),
    "a placement dropped": ("arena", _placements(lambda ps: ps[1:])),
    "a placement twice": ("arena", _placements(lambda ps: [*ps, ps[0]])),
    "a placement of nothing": ("arena", _placements(lambda ps: [*ps, Placement("ghost", 10**6 * 256, 1, 0, 0)])),
    "two offsets swapped": ("arena", _placements(_collide)),
    "a lifetime that ends early": (
        "arena", _placements(lambda ps: [dataclasses.replace(p, last=p.last - 1) for p in ps])),
    "a lifetime that begins late": (
        "arena", _placements(lambda ps: [dataclasses.replace(p, first=p.first + 1) for p in ps])),
    "a cache write dropped": ("graph", _nodes(lambda ns: [n for n in ns if n.op != "rotary_write"])),
    "a cache read before its write": ("graph", _nodes(_swapped)),
    "a node dropped": ("graph", _nodes(lambda ns: ns[1:])),
    "a wrong spec": (
        "graph", _nodes(lambda ns: [dataclasses.replace(
            ns[0], outputs=(dataclasses.replace(ns[0].outputs[0], spec=_shorter(ns[0].outputs[0].spec)),)), *ns[1:]])),
    "a node without effects": (
        "graph", _nodes(lambda ns: [dataclasses.replace(n, effects=()) for n in ns])),
    "a kernel that is not row-invariant": (
        "row invariance", _select("linear", kernel="reference:linear.whole", row_invariant=False)),
    "a kernel that pretends to be row-invariant": (
        "row invariance", _select("linear", kernel="reference:linear.whole")),
    "a prefill kernel that pretends to be row-invariant": (
        "row invariance", _select("linear", "target.prefill.32", row_invariant=True)),
    "another kernel in one bucket": ("row invariance", _select("rms_norm", kernel="reference:rms_norm.by_row")),
    "a kernel that does not exist": ("kernels", _select("linear", kernel="reference:linear.by_raw")),
    "a backend that does not exist": ("kernels", _select("linear", kernel="refrence:linear.by_row")),
    "a kernel of another op": ("kernels", _select("linear", kernel="reference:add.whole")),
    "a node without a kernel": ("kernels", _nodes(_unselected)),
    "a kernel that refuses the call": ("kernels", _attr("linear_gated", activation="tanh")),
    "a window below zero": ("graph", _attr("attention", window=-5)),
    "a soft cap that is no number": ("graph", _attr("attention", softcap=float("nan"))),
    "an eps that is a word": ("graph", _attr("rms_norm", eps="len")),
    "an activation that is a number": ("graph", _attr("linear_gated", activation=3)),
    "pages of another size": ("pages", _attr("attention", page_size=8)),
    "a layer's cache under another name": (
        "caches", _nodes(lambda ns: [dataclasses.replace(n, inputs=tuple(
            dataclasses.replace(v, name=v.name.replace("kv1", "kv0x")) if v is not None and v.kind == "cache" else v
            for v in n.inputs)) for n in ns])),
    "a bucket that promises more rows": ("programs", _program(NAME, lambda p: dataclasses.replace(p, rows=7))),
    "a program twice": ("programs", _fields(programs=lambda plan: (plan.programs[0], *plan.programs))),
    "a program of an unknown role": ("roles", _program(NAME, lambda p: dataclasses.replace(p, role="judge"))),
    "an output more than its kind has": (
        "buffers", _program("sampler.greedy.6", lambda p: dataclasses.replace(
            p, graph=dataclasses.replace(p.graph, outputs=(*p.graph.outputs, p.graph.outputs[0]))))),
    "a page table too narrow for the capacity": ("pages", _program(NAME, _narrow_table)),
    "a program with names left in it": (
        "programs", _program("sampler.greedy.6", lambda p: dataclasses.replace(
            p, graph=sampler_graphs(2048, "coupled", True)["greedy"]))),
    "no decode program": ("programs", _without_programs("target", "decode")),
    "no draft prefill program": ("programs", _without_programs("draft", "prefill")),
    "no decode program wide enough": ("programs", _without_programs("target", "decode", at_least=6)),
    "a weight the role does not have": (
        "weights", _parameter(lambda p: dataclasses.replace(p, sources=("other",)), "final_norm")),
    "cosines shorter than sines": ("graph", _parameter(lambda p: _rows(p, 63), "rope.cos")),
    "rotary tables shorter in one program": (
        "weights", lambda plan: _parameter(lambda p: _rows(p, 63), "rope.sin")(
            _parameter(lambda p: _rows(p, 63), "rope.cos")(plan))),
}  # fmt: skip

PLAN_MUTANTS: dict[str, tuple[str, Mutation]] = {
    "a vocabulary unlike the logits": ("roles", _role("target", vocab_size=7)),
    "a capacity that is no number": ("roles", _role("target", capacity="x")),
    "no pages": ("roles", _role("draft", pages=0)),
    "rotary tables shorter": ("rotary", _role("target", positions=lambda n: n - 1)),
    "rotary tables shorter than the positions": ("rotary", _everywhere_shorter),
    "a draft's rotary table shorter": ("rotary", _role("draft", positions=lambda n: n - 1)),
    "capacity raised": ("capacity", _role("target", capacity=lambda n: n + 1)),
    "capacity raised with the options": (
        "capacity", lambda plan: _options(capacity=4096)(_role("target", capacity=4096)(plan))),
    "capacity raised by one with the options": (
        "rotary", lambda plan: _options(capacity=65)(_role("target", capacity=65)(plan))),
    "capacity and positions raised": ("rotary", _role("draft", capacity=65, positions=65)),
    "the options' capacity raised": ("capacity", _options(capacity=65)),
    "the draft's capacity raised": ("rotary", _role("draft", capacity=lambda n: n + 1)),
    "too few pages for one sequence": ("capacity", _role("target", pages=3)),
    "a page too few": ("caches", _role("target", pages=lambda n: n - 1)),
    "a page too many": ("caches", _role("draft", pages=lambda n: n + 1)),
    "pages of another size": ("pages", _role("target", page_size=8)),
    "the options' pages of another size": ("pages", _options(page_size=8)),
    "a layer more": ("caches", _role("draft", caches=lambda cs: (*cs, dataclasses.replace(cs[0], layer=9)))),
    "a buffer shrunk": ("buffers", _buffer("token_ids", _shorter)),
    "a page table too narrow": ("buffers", _buffer("target.page_table", lambda s: _shorter(s, 1))),
    "logits too narrow": ("buffers", _buffer("logits", lambda s: _shorter(s, 1))),
    "a buffer of another type": ("buffers", _buffer("ok", lambda s: TensorSpec(DType.I32, s.shape))),
    "a buffer dropped": ("buffers", _buffer("accepted", None)),
    "no target": ("roles", _fields(roles=lambda plan: plan.roles[1:])),
    "no draft role": ("roles", _fields(roles=lambda plan: plan.roles[:1])),
    "a drafter without its model": ("roles", _fields(draft="ngram")),
    "no decode step": ("steps", _fields(steps=lambda plan: plan.steps[1:])),
    "no prefill step for the draft": ("steps", _fields(steps=lambda plan: plan.steps[:2])),
    "a step twice": ("steps", _fields(steps=lambda plan: (*plan.steps, plan.steps[0]))),
    "speculating wider than any program": ("programs", _options(speculate=60)),
}  # fmt: skip


def _step(name: str, change: Callable[[Step], Step]) -> Mutation:
    return lambda plan: dataclasses.replace(
        plan, steps=tuple(change(step) if step.name == name else step for step in plan.steps)
    )


def _span(role: str, begin: int = 0, end: int = 0, ops: Sequence[str] | None = None, name: str = "decode") -> Mutation:
    """Shift the role's span in `ops`, or wherever it stands."""

    def moved(span: Span) -> Span:
        return Span(role, span.begin + begin, span.end + end) if span.role == role else span

    def change(step: Step) -> Step:
        return dataclasses.replace(
            step,
            ops=tuple(
                dataclasses.replace(op, spans=tuple(map(moved, op.spans))) if ops is None or op.op in ops else op
                for op in step.ops
            ),
        )

    return _step(name, change)


def _ops(change: Callable[[list[StepOp]], Sequence[StepOp]], name: str = "decode") -> Mutation:
    return _step(name, lambda step: dataclasses.replace(step, ops=tuple(change(list(step.ops)))))


def _drop(op: str, which: int = 0, name: str = "decode") -> Mutation:
    def change(ops: list[StepOp]) -> list[StepOp]:
        del ops[[i for i, o in enumerate(ops) if o.op == op][which]]
        return ops

    return _ops(change, name)


def _swap(one: str, other: str, name: str = "decode") -> Mutation:
    def change(ops: list[StepOp]) -> list[StepOp]:
        names = [op.op for op in ops]
        i, j = names.index(one), names.index(other)
        ops[i], ops[j] = ops[j], ops[i]
        return ops

    return _ops(change, name)


def _commit(role: str, change: Callable[[tuple[Affine, ...]], tuple[Affine, ...]], name: str = "decode") -> Mutation:
    return _ops(
        lambda ops: [
            dataclasses.replace(op, ends=change(op.ends)) if op.op == "commit" and op.spans[0].role == role else op
            for op in ops
        ],
        name,
    )


def _limit(prefix: str, change: Callable[[Limit], list[Limit]]) -> Mutation:
    def mutate(step: Step) -> Step:
        assert sum(str(limit.bound).startswith(prefix) for limit in step.limits) == 1
        found = [new for old in step.limits for new in (change(old) if str(old.bound).startswith(prefix) else [old])]
        return dataclasses.replace(step, limits=tuple(found))

    return _step("decode", mutate)


def _looser(limit: Limit) -> list[Limit]:
    return [Limit(limit.bound + 1, limit.reason)]


LIMITS = {
    "speculate": "width",
    "capacity": "capacity",
    "rotary": "rotary",
    "room": "pages",
    "budget": "budget",
    "draft_capacity": "capacity",
}

STEP_MUTANTS: dict[str, tuple[str, Mutation]] = {
    **{f"no limit by {name}": (rule, _limit(name, lambda old: [])) for name, rule in LIMITS.items()},
    **{f"the limit by {name} looser": (rule, _limit(name, _looser)) for name, rule in LIMITS.items()},
    "the target begins one early": ("watermark", _span("target", begin=-1)),
    "the target begins one late": ("watermark", _span("target", begin=1)),
    "the target ends one early": ("rows", _span("target", end=-1)),
    "the target ends one late": ("pages", _span("target", end=1)),
    "the target reserves less than it verifies": ("written once", _span("target", end=1, ops=["verify"])),
    "the target reserves more than it verifies": ("balance", _span("target", end=1, ops=["reserve"])),
    "the draft begins one early": ("watermark", _span("draft", begin=-1)),
    "the draft begins one late": ("watermark", _span("draft", begin=1)),
    "the draft ends one early": ("rows", _span("draft", end=-1)),
    "the draft widened": ("capacity", _span("draft", end=1)),
    "the draft writes more than is reserved": ("written once", _span("draft", end=1, ops=["draft"])),
    "the target's commit dropped": ("balance", _drop("commit", 0)),
    "the draft's commit dropped": ("balance", _drop("commit", 1)),
    "the release dropped": ("balance", _drop("release")),
    "the reserve dropped": ("balance", _drop("reserve")),
    "the verify dropped": ("balance", _drop("verify")),
    "the draft dropped": ("balance", _drop("draft")),
    "verify before draft": ("balance", _swap("draft", "verify")),
    "draft before reserve": ("balance", _swap("reserve", "draft")),
    "commit before accept": ("balance", _swap("accept", "commit")),
    "release before commit": ("balance", _swap("commit", "release")),
    "a second reservation": ("balance", _ops(lambda ops: [ops[0], *ops])),
    "a commit twice": ("balance", _ops(lambda ops: [*ops[:-1], ops[-2], ops[-1]])),
    "slots of a third role": (
        "balance",
        _ops(
            lambda ops: [
                dataclasses.replace(op, spans=(*op.spans, Span("judge", BEGIN, BEGIN + 1)))
                if op.op == "reserve" or (op.op == "commit" and op.spans[0].role == "draft")
                else op
                for op in ops
            ]
        ),
    ),
    "an op that nobody knows": ("balance", _ops(lambda ops: [*ops, StepOp("flush")])),
    "the target commits one more": ("balance", _commit("target", lambda ends: (ends[0] + 1,))),
    "the target commits one less": ("watermark", _commit("target", lambda ends: (ends[0] - 1,))),
    "the target commits all": ("balance", _commit("target", lambda ends: (ends[0].of(0) + 1,))),
    "the target commits nothing": ("balance", _commit("target", lambda ends: ())),
    "the draft commits one more": ("balance", _commit("draft", lambda ends: tuple(end + 1 for end in ends))),
    "the draft commits what it reserved": ("balance", _commit("draft", lambda ends: ends[1:])),
    "the draft commits what was kept": ("balance", _commit("draft", lambda ends: ends[:1])),
    **{
        f"{what} in a {role} prefill": (rule, mutate)
        for role in ("target", "draft")
        for what, rule, mutate in (
            ("a chunk that begins one early", "watermark", _span(role, -1, 0, name=f"prefill {role}")),
            ("a chunk that begins one late", "watermark", _span(role, 1, 0, name=f"prefill {role}")),
            ("a chunk that ends one late", "balance", _span(role, 0, 1, name=f"prefill {role}")),
            ("a chunk longer than is reserved", "written once", _span(role, 0, 1, ["prefill"], f"prefill {role}")),
            ("a commit dropped", "balance", _drop("commit", name=f"prefill {role}")),
            ("a chunk written before it is reserved", "balance", _swap("reserve", "prefill", f"prefill {role}")),
            ("one more committed", "balance", _commit(role, lambda e: (e[0] + 1,), f"prefill {role}")),
        )
    },
    "a prefill of one more, consistently": (
        "capacity",
        lambda plan: _commit("target", lambda e: (e[0] + 1,), "prefill target")(
            _span("target", 0, 1, name="prefill target")(plan)
        ),
    ),
}

MUTANTS = {
    f"{kind}: {name}": mutant
    for kind, mutants in (("program", PROGRAM_MUTANTS), ("plan", PLAN_MUTANTS), ("step", STEP_MUTANTS))
    for name, mutant in mutants.items()
}


def test_the_plan_itself_passes(pair_plan: Plan) -> None:
    pair_plan.verify()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_and_named(pair_plan: Plan, name: str) -> None:
    rule, mutate = MUTANTS[name]
    mutant = mutate(pair_plan)
    assert mutant != pair_plan
    with pytest.raises(VerificationError) as caught:
        mutant.verify()
    assert caught.value.rule == rule, str(caught.value)
    assert str(caught.value).startswith(f"{rule}: ")


@pytest.mark.parametrize("rule", sorted({rule for rule, _ in MUTANTS.values()}))
def test_the_rules_are_those_that_are_listed(rule: str) -> None:
    listed = (__doc__ or "").partition("static verifier: ")[2].replace("\n", " ").replace(" and for steps", "")
    assert rule in [name.strip(" .") for name in listed.split(",")]
