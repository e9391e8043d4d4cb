"""Draft loops: what a plan says of them is verified before it runs, and the rows of all rounds before each launch.

Mutants change one thing: of a plan, or of one number in the arrays that a loop reads. What may differ unseen, because
nothing depends on it: the positions of whoever does not draft in a round, and the positions that key noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.contract import OpContract
from slotwise.core.errors import VerificationError
from slotwise.core.graph import Graph
from slotwise.core.model import ModelSpec
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.checks.loops import verify_loops
from slotwise.plans.compile import compile_plan
from slotwise.plans.loop import DraftLoop
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.rounds import FilledRounds, RoundInputs, fill_rounds
from slotwise.slots.rows import RowInputs
from slotwise.slots.step import Step
from slotwise.slots.verify_rounds import verify_rounds

from ..slots.test_verify_binding import CAPACITY, LANES, _bound

Change = Callable[[Plan], Plan]
SEQUENCES, FIRST, LATER, APART = 4, 8, 6, 7


# What a plan says


def _loop(**changes: Any) -> Change:
    """Change the last loop: the most sequences, drawn with noise."""
    return lambda plan: dataclasses.replace(
        plan, loops=(*plan.loops[:-1], dataclasses.replace(plan.loops[-1], **changes))
    )


def _array(name: str, change: Callable[[TensorSpec], TensorSpec] | None) -> Change:
    def mutate(plan: Plan) -> Plan:
        assert name in dict(plan.buffers)
        kept = [(n, change(s) if n == name and change else s) for n, s in plan.buffers if change or n != name]
        return dataclasses.replace(plan, buffers=tuple(kept))

    return mutate


def _rows(by: int) -> Callable[[TensorSpec], TensorSpec]:
    return lambda spec: TensorSpec(spec.dtype, (int(spec.shape[0]) + by, *spec.shape[1:]))


def _without(name: str) -> Change:
    return lambda plan: dataclasses.replace(plan, programs=tuple(p for p in plan.programs if p.name != name))


def _shifted(step: Step) -> Step:
    """Every op on the draft's slots, one slot later at its end: proved as before, but not for the rows of rounds."""
    span = step.span("draft", "draft")
    assert span is not None
    moved = dataclasses.replace(span, begin=span.begin + 1)
    ops = [
        dataclasses.replace(op, spans=tuple(moved if other == span else other for other in op.spans)) for op in step.ops
    ]
    return dataclasses.replace(step, ops=tuple(ops))


MUTANTS: dict[str, tuple[Change, str]] = {
    "a loop of more rounds than drafts": (_loop(rounds=9), "1 to 5 rounds, found 9"),
    "a loop of no rounds": (_loop(rounds=0), "1 to 5 rounds, found 0"),
    "fewer first rows than sequences": (_loop(first=1), "at least as many first rows"),
    "first rows without a program": (_loop(first=5), "no program draft.decode.5"),
    "sequences without a program": (_loop(sequences=3, first=7), "no program draft.decode.7"),
    "a sampler that is not there": (_loop(sampler="filter"), "by greedy or sample, not by filter"),
    "the other rule's sampler": (_loop(sampler="sample_draft"), "by greedy or sample"),
    "a loop twice": (lambda plan: dataclasses.replace(plan, loops=(*plan.loops, plan.loops[0])), "twice"),
    "a sampler's program dropped": (_without("sampler.sample.2"), "no program sampler.sample.2"),
    "an array dropped": (_array("rounds.slots", None), "needs rounds.slots"),
    "an array of results dropped": (_array("rounds.sampled", None), "needs rounds.sampled"),
    "an array of another type": (
        _array("rounds.ok", lambda s: TensorSpec(DType.I32, s.shape)), "needs rounds.ok",
    ),
    "an array that rounds do not share evenly": (_array("rounds.kv_len", _rows(1)), "do not fit it evenly"),
    "an array too small for its rounds": (
        _array("rounds.row_start", lambda s: TensorSpec(s.dtype, (8,))), "do not fit it evenly",
    ),
}  # fmt: skip


def test_a_plan_with_a_draft_model_has_loops_and_no_other_plan_has(
    pair_plan: Plan, pair: tuple[ModelSpec, ModelSpec]
) -> None:
    pair_plan.verify()
    shapes = {(loop.sequences, loop.first) for loop in pair_plan.loops}
    assert shapes == {(1, 1), (1, 2), (2, 2), (2, 4)}
    assert {loop.sampler for loop in pair_plan.loops} == {"greedy", "sample"}
    assert {loop.rounds for loop in pair_plan.loops} == {5}
    plain = compile_plan(pair[0], draft="ngram", options=PlanOptions(capacity=64, decode_rows=8))
    assert plain.loops == ()
    assert not any(name.startswith("rounds.") for name, _ in plain.buffers)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_a_plans_loops_is_caught(pair_plan: Plan, name: str) -> None:
    mutate, words = MUTANTS[name]
    mutant = mutate(pair_plan)
    assert mutant != pair_plan
    with pytest.raises(VerificationError, match=words) as caught:
        mutant.verify()
    assert caught.value.rule == "loops"


def test_loops_without_a_draft_model_are_refused(tiny_model: Callable[..., ModelSpec]) -> None:
    plan = compile_plan(tiny_model(), draft="ngram", options=PlanOptions(capacity=40, decode_rows=8))
    with pytest.raises(VerificationError, match="no draft model"):
        dataclasses.replace(plan, loops=(DraftLoop(1, 1, 5, "greedy"),)).verify()


def test_rows_of_rounds_that_leave_the_drafts_span_are_not_proved(pair_plan: Plan) -> None:
    steps = tuple(_shifted(step) if step.name == "decode" else step for step in pair_plan.steps)
    with pytest.raises(VerificationError, match=r"not proved that every round's row lies in draft\[filled \+ 1"):
        verify_loops(dataclasses.replace(pair_plan, steps=steps))


def _draft_program(plan: Plan, change: Callable[[Graph], Graph]) -> Plan:
    """The plan with another graph in `draft.decode.2`."""
    programs = tuple(
        dataclasses.replace(p, graph=change(p.graph)) if p.name == "draft.decode.2" else p for p in plan.programs
    )
    assert programs != plan.programs
    return dataclasses.replace(plan, programs=programs)


def test_what_a_round_samples_must_fit_what_the_next_one_reads(pair_plan: Plan) -> None:
    def wider(graph: Graph) -> Graph:
        spec = TensorSpec(DType.I64, (2,))
        inputs = (dataclasses.replace(v, spec=spec) if v.name == "token_ids" else v for v in graph.inputs)
        return dataclasses.replace(graph, inputs=tuple(inputs))

    def fewer_embeddings(graph: Graph) -> Graph:
        first = graph.nodes[0]
        assert first.op == "embedding"
        ids, table = first.inputs
        assert table is not None
        cut = dataclasses.replace(table, spec=TensorSpec(table.spec.dtype, (2047, table.spec.shape[1])))
        return graph.with_nodes([dataclasses.replace(first, inputs=(ids, cut)), *graph.nodes[1:]])

    for change, words in ((wider, r"reads token_ids as i64\[2\]"), (fewer_embeddings, "can sample 2048 tokens, more")):
        with pytest.raises(VerificationError, match=words):
            verify_loops(_draft_program(pair_plan, change))


def test_a_sampler_that_promises_no_token_id_cannot_feed_a_round(
    pair_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_promise(op: str) -> OpContract:
        contract = contract_of(op)
        return dataclasses.replace(contract, outputs=tuple(dataclasses.replace(a, below="") for a in contract.outputs))

    monkeypatch.setattr("slotwise.plans.checks.feed.contract_of", without_promise)
    with pytest.raises(VerificationError, match=r"no op of sampler\.greedy\.1 promises"):
        verify_loops(pair_plan)


def test_the_scores_of_every_round_have_room_where_acceptance_wants_them(pair: tuple[ModelSpec, ModelSpec]) -> None:
    options = PlanOptions(capacity=64, max_sequences=3, speculate=4, acceptance="rejection", decode_rows=12)
    plan = compile_plan(pair[0], draft=pair[1], options=options)
    assert dict(plan.buffers)["rounds.scores"] == TensorSpec(DType.F32, (3 * 3, 2048))
    with pytest.raises(VerificationError, match=r"rounds\.scores"):
        _array("rounds.scores", None)(plan).verify()


# What a launch is given


@dataclasses.dataclass
class Filled:
    """A ragged step's draft span as the rows of a loop: widths 5, 3, 1; two sequences have to catch up."""

    ledger: RoleLedger
    first: RowInputs
    later: RoundInputs
    rounds: FilledRounds

    def verify(self) -> None:
        verify_rounds(self.first, self.later, self.rounds, self.ledger)


def _filled(page_size: int, lag: tuple[int, ...] = (1, 0, 2, 0)) -> Filled:
    bound = _bound(page_size, lag=lag)
    ledger, columns = bound.ledger["draft"], -(-CAPACITY // page_size)

    def rows(count: int) -> npt.NDArray[np.int32]:
        return np.full(count, 7, np.int32)

    first = RowInputs(
        FIRST, rows(FIRST), rows(FIRST), rows(FIRST), rows(FIRST + 1), rows(FIRST), np.zeros((FIRST, columns), np.int32)
    )
    later = RoundInputs(*(rows(LATER * APART).reshape(LATER, APART) for _ in range(5)))
    at = np.argsort(-bound.binding.width, kind="stable")[:3]
    tokens = np.arange(LANES * CAPACITY, dtype=np.int32).reshape(LANES, CAPACITY)
    span = bound.binding.reserved("draft").at(np.searchsorted(np.flatnonzero(bound.binding.width), at))
    filled = fill_rounds(first, later, SEQUENCES, ledger, tokens, span, bound.binding.width[at])
    return Filled(ledger, first, later, filled)


def _put(name: str, at: tuple[int, int], value: int) -> Callable[[Filled], None]:
    return lambda f: getattr(f.later, name).__setitem__(at, value)


def _add(name: str, at: tuple[int, int], by: int) -> Callable[[Filled], None]:
    return lambda f: getattr(f.later, name).__setitem__(at, getattr(f.later, name)[at] + by)


def _same_slot(filled: Filled) -> None:
    filled.later.slots[1, 0] = filled.later.slots[0, 0]


def _other_page(filled: Filled) -> None:
    filled.first.page_table[0, 0] = filled.ledger.page_table[5, 0]


def _wider(filled: Filled) -> None:
    more, span = np.array([0, 1, 0]), filled.rounds.span
    longer = dataclasses.replace(span, end=span.end + more)
    filled.rounds = dataclasses.replace(filled.rounds, span=longer, width=filled.rounds.width + more)


def _sooner(filled: Filled) -> None:
    filled.rounds = dataclasses.replace(filled.rounds, width=filled.rounds.width + np.array([0, 1, 0]))


def _unsorted(filled: Filled) -> None:
    filled.rounds = dataclasses.replace(filled.rounds, width=filled.rounds.width[::-1])


def _forgotten(filled: Filled) -> None:
    """A token less to catch up with than there is."""
    filled.ledger.committed[int(filled.rounds.span.lanes[0])] -= 1


def _lost_page(filled: Filled) -> None:
    filled.ledger.page_count[int(filled.rounds.span.lanes[0])] -= 1


ROW_MUTANTS: dict[str, tuple[str, Callable[[Filled], None]]] = {
    "a position one further": ("row order", _add("positions", (2, 0), 1)),
    "a slot one further": ("slots", _add("slots", (0, 0), 1)),
    "a slot one back": ("slots", _add("slots", (3, 0), -1)),
    "two rounds in one slot": ("slots", _same_slot),
    "a slot of nobody": ("slots", _put("slots", (0, 1), 10_000)),
    "a slot below zero": ("slots", _put("slots", (0, 1), -1)),
    "the scratch slot for one who drafts": ("slots", _put("slots", (1, 1), 0)),
    "a length one further": ("kv length", _add("kv_len", (0, 1), 1)),
    "a length one back": ("kv length", _add("kv_len", (0, 1), -1)),
    "a length for one who is done": ("kv length", _put("kv_len", (0, 2), 9)),
    "a length for padding": ("kv length", _put("kv_len", (1, 3), 4)),
    "a row for one who is done": ("row order", _add("row_start", (0, 3), 1)),
    "a row for padding": ("row order", _add("row_start", (3, 4), 1)),
    "a row too few": ("row order", _add("row_start", (0, 1), -1)),
    "a slot for one who is done": ("padding", _put("slots", (2, 1), 50)),
    "a slot for padding": ("padding", _put("slots", (0, 3), 50)),
    "another sequence's page": ("page table", _other_page),
    "a page fewer than later rounds read": ("page table", _lost_page),
    "a width beyond what is reserved": ("kv length", _wider),
    "a round more in the same slots": ("row order", _sooner),
    "widths that rise": ("row order", _unsorted),
    "a token that nobody caught up with": ("row order", _forgotten),
    "a token to catch up with at another position": ("row order", lambda f: f.first.positions.__setitem__(3, 0)),
    "a slot to catch up with elsewhere": ("slots", lambda f: f.first.slots.__setitem__(4, f.first.slots[3])),
    "a padded first row in a real slot": ("padding", lambda f: f.first.slots.__setitem__(7, 60)),
}


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_the_rows_of_a_loop_pass_and_count_as_written(page_size: int) -> None:
    filled = _filled(page_size)
    filled.verify()
    rounds = filled.rounds
    assert rounds.rounds == 5
    assert rounds.span.lanes.tolist() == [2, 4, 1]
    assert filled.first.positions[:6].tolist() == [3, 16, 8, 1, 2, 15]
    assert filled.later.positions[:4, :3].tolist() == [[4, 17, 8], [5, 18, 8], [6, 18, 8], [7, 18, 8]]
    assert filled.ledger.written[rounds.span.lanes].tolist() == [8, 19, 9]


@pytest.mark.parametrize("page_size", [3, 16])
@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_a_mutant_of_a_loops_rows_is_caught_and_named(name: str, page_size: int) -> None:
    filled = _filled(page_size)
    rule, mutate = ROW_MUTANTS[name]
    mutate(filled)
    with pytest.raises(VerificationError) as caught:
        filled.verify()
    assert caught.value.rule == rule, str(caught.value)
    assert (
        filled.ledger.written[filled.rounds.span.lanes] == filled.ledger.committed[filled.rounds.span.lanes]
    ).all() or (name == "a token that nobody caught up with")


@given(
    st.sampled_from(["positions", "slots", "row_start", "kv_len"]),
    st.integers(0, 3),
    st.integers(0, SEQUENCES),
    st.integers(-40, 120),
)
def test_no_number_that_a_later_round_depends_on_can_change_unseen(name: str, round: int, at: int, value: int) -> None:
    filled = _filled(3)
    array = getattr(filled.later, name)
    drafting = at < 3 and filled.rounds.width[at] > round + 1
    if name != "row_start" and at == SEQUENCES:
        return  # beyond the bucket: no program reads it
    if name == "positions" and not drafting:
        return  # padding stands anywhere
    before, array[round, at] = int(array[round, at]), value
    scratch = name == "slots" and not drafting and value // 3 == 0
    if value == before or scratch:
        filled.verify()
        return
    with pytest.raises(VerificationError):
        filled.verify()
