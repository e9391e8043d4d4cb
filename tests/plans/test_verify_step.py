"""A step that was tampered with is caught, and the rule it breaks is named.

Each mutant is a compiled plan of the bundled pair with one thing changed in a step: a limit of the draft width, a span,
an op or its place. The rules: balance, written once, watermark, rows, width, budget, capacity, rotary, pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from slotwise.plans.plan import Plan
from slotwise.slots.affine import Affine
from slotwise.slots.step import BEGIN, Limit, Span, Step, StepOp

from .mutants import Mutants, Mutation, assert_caught, assert_listed, rules_of


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

MUTANTS: Mutants = {
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


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught_and_named(pair_plan: Plan, name: str) -> None:
    assert_caught(pair_plan, *MUTANTS[name])


@pytest.mark.parametrize("rule", rules_of(MUTANTS))
def test_the_rules_are_those_that_are_listed(rule: str) -> None:
    assert_listed(rule, __doc__)
