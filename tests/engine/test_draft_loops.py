"""All rounds of drafting as one launch: the tokens, scores and caches of the rounds one by one, to the bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.engine import executor as executor_module
from slotwise.engine.calls import BoundCall
from slotwise.engine.drafters import Drafting
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.plans.loop import DraftLoop
from slotwise.plans.program import SAMPLER, Program
from slotwise.slots.binding import Binding, Ints
from slotwise.slots.step import DRAFT

from .test_arrays import Apart, Copies
from .tiny import alone, assert_all_returned, finish, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFT_MODEL = MODEL.draft(0.05, layers=2)


class Notes:
    """What an engine's drafter gave in each step, and the loops that it ran; `at_once=False` forbids them."""

    def __init__(self, engine: Engine, *, at_once: bool = True) -> None:
        self.drafts: list[tuple[list[list[int]], object]] = []
        self.loops: list[tuple[DraftLoop, int]] = []
        self._draft, self._run_loop = engine._drafter.draft, engine.executor.run_loop
        engine._drafter.draft = self._note  # type: ignore[method-assign]
        engine.executor.run_loop = self._note_loop  # type: ignore[method-assign]
        if not at_once:
            engine.executor.loops.find = lambda *_: None  # type: ignore[method-assign]

    def _note(self, binding: Binding, at: Ints) -> Drafting:
        drafting = self._draft(binding, at)
        scores = None if drafting.scores is None else drafting.scores.tobytes()
        self.drafts.append((copy.deepcopy(drafting.tokens), scores))
        return drafting

    def _note_loop(self, loop: DraftLoop, rounds: int) -> None:
        self.loops.append((loop, rounds))
        self._run_loop(loop, rounds)


def caches(engine: Engine) -> list[torch.Tensor]:
    """The draft model's caches, without the scratch page."""
    return [cache[engine.plan.target.page_size :] for cache in engine.executor.caches[DRAFT].values()]


def both_ways(wanted: Sequence[Request], **options: Any) -> tuple[Notes, list[tuple[object, ...]]]:
    """Serve `wanted` with loops and round by round; all that was drafted, written and given is the same."""
    engines = [tiny_engine(MODEL, DRAFT_MODEL, **options) for _ in range(2)]
    with_loops, round_by_round = Notes(engines[0]), Notes(engines[1], at_once=False)
    outcomes = [[outcome(completion) for completion in run(engine, wanted)] for engine in engines]
    assert round_by_round.loops == []
    assert with_loops.drafts == round_by_round.drafts
    for mine, other in zip(*map(caches, engines), strict=True):
        assert torch.equal(mine, other)
    assert outcomes[0] == outcomes[1]
    return with_loops, outcomes[0]


@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=4),
    budgets=st.lists(st.integers(1, 14), min_size=4, max_size=4),
    temperature=st.sampled_from([0.0, 0.9]),
    acceptance=st.sampled_from(["coupled", "rejection"]),
    adaptive=st.booleans(),
    speculate=st.integers(1, 4),
    capacity=st.sampled_from([25, 30, 64]),
)
@settings(max_examples=12)
def test_a_loop_drafts_the_tokens_and_scores_of_its_rounds_one_by_one(
    lengths: list[int],
    budgets: list[int],
    temperature: float,
    acceptance: str,
    adaptive: bool,
    speculate: int,
    capacity: int,
) -> None:
    # Ragged prompts, budgets that end some drafts early, and a capacity that others run into.
    wanted = [
        request(prompt_of(length, n), budgets[n], temperature=temperature * (n != 1), seed=n)
        for n, length in enumerate(lengths)
    ]
    options = {"acceptance": acceptance, "adaptive": adaptive, "speculate": speculate, "capacity": capacity}
    notes, given_out = both_ways(wanted, **options)
    assert len(notes.loops) == len(notes.drafts)
    if acceptance == "coupled":
        assert given_out == [outcome(alone(MODEL, one, capacity=capacity)) for one in wanted]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_ragged_widths_and_sequences_that_catch_up_share_a_loop(acceptance: str, temperature: float) -> None:
    wanted = [request(prompt_of(3, n), 9 + 6 * n, temperature=temperature, seed=n) for n in range(4)]
    notes, _ = both_ways(wanted, acceptance=acceptance, adaptive=False, speculate=3, decode_rows=12, prefill_chunk=12)
    loops = {loop for loop, _ in notes.loops}
    assert {loop.sequences for loop in loops} >= {1, 4}
    assert any(loop.first > loop.sequences for loop in loops), "nobody ever had to catch up"
    assert any(len({len(tokens) for tokens in drafts} - {0}) > 1 for drafts, _ in notes.drafts), "no ragged widths"
    # Greedy rows need no noise: a loop for them alone draws with the cheaper program.
    expected = {"sample_draft"} if acceptance == "rejection" else {"sample"} if temperature else {"greedy"}
    assert {loop.sampler for loop in loops} == expected


@pytest.mark.parametrize(("sampling", "at_once"), [({}, True), ({"repetition_penalty": 1.4}, False)])
def test_penalties_keep_to_rounds_one_by_one_and_the_tokens_stay(sampling: dict[str, float], at_once: bool) -> None:
    wanted = [request(prompt_of(6), 9), request(prompt_of(7, 1), 9, **sampling)]
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=2)
    notes = Notes(engine)
    assert [outcome(c) for c in run(engine, wanted)] == [outcome(alone(MODEL, one)) for one in wanted]
    # Alone, the first sequence drafts in loops all the same.
    assert any(loop.sequences == 2 for loop, _ in notes.loops) == at_once
    assert max(sum(map(bool, tokens)) for tokens, _ in notes.drafts) == 2


def test_a_lane_far_behind_is_drafted_for_round_by_round() -> None:
    # Nobody drafts for some steps, so the draft model falls behind by more rows than any loop has room for.
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=3, max_sequences=1, decode_rows=5)
    notes = Notes(engine)
    offer = engine._drafter.offer
    (sequence,) = [engine.add(request(prompt_of(5), 20))]
    while len(sequence.tokens) < 9:
        engine._drafter.offer = lambda lanes, widths: np.zeros_like(widths)  # type: ignore[method-assign]
        engine.step()
    engine._drafter.offer = offer  # type: ignore[method-assign]
    engine.step()
    assert len(notes.drafts) == 1
    assert notes.loops == []
    finish(engine)
    assert len(notes.loops) == len(notes.drafts) - 1 > 0
    assert outcome(sequence.completion()) == outcome(alone(MODEL, request(prompt_of(5), 20)))
    assert_all_returned(engine)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_draft_that_is_not_finite_ends_its_sequence_and_no_other_whatever_the_round(number: int) -> None:
    wanted = [request(prompt_of(5, n), 25) for n in range(3)]
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=3)
    sequences = [engine.add(one) for one in wanted]
    while any(s.state != "decode" for s in sequences):
        engine.step()
    models: list[str] = []

    def spoil(program: Program, calls: tuple[BoundCall, ...]) -> None:
        for call in calls:
            call.launch()
        if program.role == DRAFT:
            if len(models) == number:
                engine.executor.buffers["logits"][1] = float("nan")
            models.append(program.name)

    engine.executor.conductor = spoil
    engine.step()
    engine.executor.conductor = None
    assert len(models) == 3
    finish(engine)
    assert sequences[1].completion().finish_reason == "error"
    assert "draft model's logits are not finite" in str(sequences[1].completion().error)
    for n in (0, 2):
        assert outcome(sequences[n].completion()) == outcome(alone(MODEL, wanted[n]))
    assert_all_returned(engine)


@pytest.mark.parametrize("watch", ["conductor", "probe"])
def test_who_watches_sees_each_program_of_each_round_and_changes_nothing(watch: str) -> None:
    one, seen = request(prompt_of(5), 8, temperature=0.7), []
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=3)

    def conduct(program: Program, calls: tuple[BoundCall, ...]) -> None:
        seen.append(program.name)
        for call in calls:
            call.launch()

    def probe(program: str, kernel: str, seconds: float, is_inside: bool) -> None:
        if not seen or seen[-1] != program or kernel.endswith("embedding"):
            seen.append(program)

    sequence = engine.add(one)
    while sequence.state != "decode":
        engine.step()
    setattr(engine.executor, watch, {"conductor": conduct, "probe": probe}[watch])
    engine.step()
    of_drafting = seen[: len(seen) - 3]
    assert of_drafting == ["draft.decode.1", "sampler.sample.1"] * 3
    assert [name.split(".")[0] for name in seen[-3:]] == ["target", SAMPLER, SAMPLER]
    finish(engine)
    assert outcome(sequence.completion()) == outcome(alone(MODEL, one))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafting_copies_once_each_way_between_two_memories(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    monkeypatch.setattr(executor_module, "Arrays", Apart)
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=3)
    sequences = [engine.add(request(prompt_of(4, n), 19, logprobs=None, temperature=temperature)) for n in range(3)]
    while any(s.state != "decode" for s in sequences):
        engine.step()
    counts: list[int] = []
    draft = engine._drafter.draft

    def counted(binding: Binding, at: Ints) -> Drafting:
        with Copies() as copies:
            found = draft(binding, at)
        counts.append(copies.count)
        return found

    engine._drafter.draft = counted  # type: ignore[method-assign]
    engine.executor._launch = lambda launches: None  # type: ignore[method-assign]  # kernels of the reference copy too
    engine.executor.buffers["ok"].fill_(True)
    engine.executor.buffers["rounds.ok"].fill_(True)
    engine.step()
    # All rounds' rows and the page table go; all tokens with their `ok` come back together.
    assert counts == [3]


def test_a_kernel_that_gives_no_token_id_is_not_believed() -> None:
    engine = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False, speculate=3)
    sequence = engine.add(request(prompt_of(5), 8))
    while sequence.state != "decode":
        engine.step()
    run_loop = engine.executor.run_loop

    def spoil(loop: DraftLoop, rounds: int) -> None:
        run_loop(loop, rounds)
        engine.executor.buffers["rounds.sampled"].view(engine.executor.loops._slices, -1)[1, 0] = MODEL.spec.vocab_size

    engine.executor.run_loop = spoil  # type: ignore[method-assign]
    finish(engine)
    assert sequence.completion().finish_reason == "error"
    assert_all_returned(engine)


def test_a_plan_without_loops_drafts_the_same() -> None:
    one = request(prompt_of(5), 12, temperature=0.6)
    plan = tiny_engine(MODEL, DRAFT_MODEL, adaptive=False).plan
    weights = {"target": MODEL.weights, "draft": DRAFT_MODEL.weights}
    bare = dataclasses.replace(plan, loops=())
    bare.verify()
    engine, other = Engine(plan, weights), Engine(bare, weights)
    notes = Notes(other)
    assert [outcome(c) for c in run(other, [one])] == [outcome(c) for c in run(engine, [one])]
    assert notes.drafts
    assert notes.loops == []
