"""A plan that was tampered with is caught, and the rule it breaks is named.

Each mutant is a compiled plan of the bundled pair with one thing changed in a program or in the plan around it.
The rules: roles, steps, programs, graph, kernels, row invariance, arena, states, weights, buffers, capacity, rotary,
pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from slotwise.core.graph import Node, Parameter
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.passes.plan_buffers import ALIGNMENT, Placement
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.plans.sampling import sampler_graphs

from .mutants import Mutants, Mutation, assert_caught, assert_listed, rules_of

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


PROGRAM_MUTANTS: Mutants = {
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
        "graph", _nodes(lambda ns: [dataclasses.replace(n, inputs=tuple(
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

PLAN_MUTANTS: Mutants = {
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
    "a page too few": ("states", _role("target", pages=lambda n: n - 1)),
    "a page too many": ("states", _role("draft", pages=lambda n: n + 1)),
    "pages of another size": ("pages", _role("target", page_size=8)),
    "the options' pages of another size": ("pages", _options(page_size=8)),
    "a layer more": ("states", _role("draft", states=lambda cs: (*cs, dataclasses.replace(cs[0], layer=9)))),
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


MUTANTS: Mutants = {
    f"{kind}: {name}": mutant
    for kind, mutants in (("program", PROGRAM_MUTANTS), ("plan", PLAN_MUTANTS))
    for name, mutant in mutants.items()
}


def test_the_plan_itself_passes(pair_plan: Plan) -> None:
    pair_plan.verify()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_and_named(pair_plan: Plan, name: str) -> None:
    assert_caught(pair_plan, *MUTANTS[name])


@pytest.mark.parametrize("rule", rules_of(MUTANTS))
def test_the_rules_are_those_that_are_listed(rule: str) -> None:
    assert_listed(rule, __doc__)
