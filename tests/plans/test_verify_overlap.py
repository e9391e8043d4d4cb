"""Which plans' steps may be started before the step before them is read: those where it is proved that nothing depends
on what that step samples, but the token that a row is fed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from slotwise.core.contract import OpContract
from slotwise.core.graph import Graph
from slotwise.core.model import ModelSpec
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.plans.checks.overlap import why_no_overlap
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.slots.affine import Affine
from slotwise.slots.step import KEPT, LENGTH, WIDTH


@pytest.fixture(scope="module")
def plain(pair: tuple[ModelSpec, ModelSpec]) -> Plan:
    return compile_plan(pair[0], options=PlanOptions(capacity=64, max_sequences=3, speculate=2, decode_rows=4))


def test_a_plan_without_a_drafter_overlaps_and_says_so(plain: Plan) -> None:
    assert why_no_overlap(plain) is None
    assert "overlap: a step without drafts need not be read" in str(plain)


@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_with_a_drafter_the_marks_wait_for_the_verdict(pair: tuple[ModelSpec, ModelSpec], draft: str) -> None:
    plan = compile_plan(pair[0], draft=pair[1] if draft == "model" else draft, options=PlanOptions(capacity=64))
    assert why_no_overlap(plan) == "how many drafts are accepted is known when the step has run"
    assert "overlap: none: how many drafts are accepted" in str(plan)


@pytest.mark.parametrize(
    ("end", "overlaps"),
    [
        (LENGTH + KEPT - 1, True),
        (LENGTH, True),
        (LENGTH + WIDTH, True),
        (LENGTH + KEPT, False),
        (LENGTH - 1, False),
        (LENGTH + KEPT * 2 - 1, False),
    ],
    ids=str,
)
def test_a_mark_must_be_proved_not_to_depend_on_what_is_kept(plain: Plan, end: Affine, overlaps: bool) -> None:
    step = plain.step("decode")
    ops = tuple(dataclasses.replace(op, ends=(end,)) if op.op == "commit" else op for op in step.ops)
    steps = tuple(dataclasses.replace(each, ops=ops) if each.name == "decode" else each for each in plain.steps)
    reason = why_no_overlap(dataclasses.replace(plain, steps=steps))
    assert (reason is None) == overlaps
    assert overlaps or str(end) in str(reason)


def _changed(plan: Plan, kind: str, change: Callable[[Graph], Graph]) -> Plan:
    def changed(program: Program) -> Program:
        if program.kind != kind or program.rows != 1:
            return program
        return dataclasses.replace(program, graph=change(program.graph))

    return dataclasses.replace(plan, programs=tuple(map(changed, plan.programs)))


def _input_as(name: str, dtype: DType) -> Callable[[Graph], Graph]:
    def change(graph: Graph) -> Graph:
        values = [
            dataclasses.replace(v, spec=dataclasses.replace(v.spec, dtype=dtype)) if v.name == name else v
            for v in graph.inputs
        ]
        return dataclasses.replace(graph, inputs=tuple(values))

    return change


def test_a_plan_without_what_is_to_be_proved_proves_nothing(plain: Plan) -> None:
    without_commit = tuple(
        dataclasses.replace(step, ops=tuple(op for op in step.ops if op.op != "commit")) for step in plain.steps
    )
    for changes in (
        {"steps": without_commit},
        {"programs": tuple(p for p in plain.programs if p.role != "sampler")},
        {"programs": tuple(p for p in plain.programs if p.kind != "decode")},
    ):
        assert "no decode step that commits" in str(why_no_overlap(dataclasses.replace(plain, **changes)))


def test_tokens_must_be_of_the_kind_that_the_model_reads(plain: Plan) -> None:
    reason = why_no_overlap(_changed(plain, "decode", _input_as("token_ids", DType.I64)))
    assert "reads token_ids as i64[1]" in str(reason)


def test_a_sampler_of_other_logits_feeds_no_model(plain: Plan) -> None:
    reason = why_no_overlap(_changed(plain, "greedy", _input_as("logits", DType.F16)))
    assert "sampler.greedy.1 reads f16" in str(reason)


def test_a_model_must_have_an_embedding_for_each_token(plain: Plan) -> None:
    def without(graph: Graph) -> Graph:
        return dataclasses.replace(graph, nodes=tuple(node for node in graph.nodes if node.op != "embedding"))

    assert "more than target.decode.1 has embeddings" in str(why_no_overlap(_changed(plain, "decode", without)))


def test_an_op_must_promise_a_token_id_in_every_row(plain: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_promise(op: str) -> OpContract:
        contract = contract_of(op)
        return dataclasses.replace(contract, outputs=tuple(dataclasses.replace(a, below="") for a in contract.outputs))

    monkeypatch.setattr("slotwise.plans.checks.feed.contract_of", without_promise)
    assert "promises that" in str(why_no_overlap(plain))
