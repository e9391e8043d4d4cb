"""A draft model with fewer token ids than the target: tokens are those without it, and it is never fed what it lacks.

A vocabulary is padded by each maker as hardware likes it, so that two models of one tokenizer may end at other ids.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.engine.drafters import Drafting
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.plans.loop import DraftLoop
from slotwise.plans.sampling import GREEDY_NARROW, SAMPLE_DRAFT, SAMPLE_NARROW
from slotwise.slots.binding import Binding, Ints
from slotwise.slots.step import DRAFT

from . import test_acceptance
from .test_draft_loops import Notes
from .tiny import alone, outcome, prompt_of, request, run, tiny_engine, tiny_model

VOCAB, IDS = 31, 23
MODEL = tiny_model(11, layers=2)
NARROW = MODEL.draft(0.05, layers=2, ids=IDS)
BEYOND = range(IDS, VOCAB)


def fed_to_the_draft(engine: Engine) -> list[int]:
    """Every token id of the rows that the host gives the draft model from now on; filled as the engine runs."""
    found: list[int] = []
    run_program, run_loop = engine.executor.run, engine.executor.run_loop

    def note(role: str, rows: int) -> None:
        if role == DRAFT:
            found.extend(engine.executor.row_inputs(role, rows).token_ids.tolist())

    def run_noted(role: str, kind: str, rows: int) -> None:
        note(role, rows)
        run_program(role, kind, rows)

    def run_loop_noted(loop: DraftLoop, rounds: int) -> None:
        note(DRAFT, loop.first)
        run_loop(loop, rounds)

    engine.executor.run, engine.executor.run_loop = run_noted, run_loop_noted  # type: ignore[method-assign]
    return found


def lengths_drafted_at(engine: Engine) -> list[int]:
    """How many tokens the first sequence of a step has, for each step that drafts from now on."""
    found: list[int] = []
    draft = engine._drafter.draft

    def noted(binding: Binding, at: Ints) -> Drafting:
        found.append(int(binding.length[0]))
        return draft(binding, at)

    engine._drafter.draft = noted  # type: ignore[method-assign]
    return found


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    """Requests of which some hold, ban, or strongly prefer ids that the draft model lacks."""
    found = []
    for seed in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(st.integers(0, draw(st.sampled_from([IDS, VOCAB])) - 1), min_size=1, max_size=20))
        edits = draw(
            st.sampled_from(
                [
                    {},
                    {"logit_bias": dict.fromkeys(BEYOND, 2.0)},
                    {"logit_bias": {VOCAB - 1: -3.0, 2: 1.0}, "repetition_penalty": 1.3},
                    {"banned_tokens": tuple(BEYOND)},
                    {"banned_tokens": tuple(range(IDS))},
                    {"banned_tokens": tuple(range(1, IDS)), "presence_penalty": 0.5},
                ]
            )
        )
        temperature = draw(st.sampled_from([0.0, 1.0]))
        found.append(request(prompt, draw(st.integers(1, 14)), temperature=temperature, seed=seed, **edits))
    return found


@settings(max_examples=60)
@given(
    wanted=requests(),
    adaptive=st.booleans(),
    speculate=st.integers(1, 4),
    pages=st.sampled_from([14, 60]),
    share=st.booleans(),
    at_once=st.booleans(),
)
def test_coupled_tokens_are_those_without_the_draft_model(
    wanted: list[Request], adaptive: bool, speculate: int, pages: int, share: bool, at_once: bool
) -> None:
    options = {"adaptive": adaptive, "speculate": speculate, "pages": pages, "share_prefixes": share, "capacity": 40}
    engine = tiny_engine(MODEL, NARROW, **options)
    notes, fed = Notes(engine, at_once=at_once), fed_to_the_draft(engine)
    completions = run(engine, wanted)
    assert [outcome(c) for c in completions] == [outcome(alone(MODEL, one, capacity=40)) for one in wanted]
    assert all(token < IDS for tokens, _ in notes.drafts for drafts in tokens for token in drafts)
    assert all(token < IDS for token in fed)


@pytest.mark.parametrize("seed", range(3))
def test_greedy_rejection_gives_the_greedy_tokens(seed: int) -> None:
    wanted = [request(prompt_of(9, seed + n, IDS), 30, logit_bias=dict.fromkeys(BEYOND, 1.5 * n)) for n in range(3)]
    for adaptive in (False, True):
        completions = run(tiny_engine(MODEL, NARROW, acceptance="rejection", adaptive=adaptive), wanted)
        assert [c.token_ids for c in completions] == [alone(MODEL, one).token_ids for one in wanted]


@pytest.mark.parametrize("sampling", test_acceptance.SAMPLINGS, ids=str)
def test_rejection_keeps_the_distribution(sampling: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    # One of seven ids is the target's alone: it is never drafted, and comes as often as it would without drafts.
    fewer = test_acceptance.MODEL.draft(0.3, ids=test_acceptance.VOCAB - 1)
    prompt = tuple(min(token, test_acceptance.VOCAB - 2) for token in test_acceptance.PROMPT)
    monkeypatch.setattr(test_acceptance, "PROMPT", prompt)
    monkeypatch.setitem(test_acceptance.DRAFTS, "fewer ids", fewer)
    test_acceptance.assert_kept("fewer ids", sampling, test_acceptance.RUNS)


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_a_draft_model_that_is_the_target_but_for_padding_is_accepted_always(acceptance: str) -> None:
    # Noise is keyed by (seed, position, token): that the target draws among more tokens moves none of it.
    twin = MODEL.draft(0.0, layers=2, ids=IDS)
    engine = tiny_engine(MODEL, twin, acceptance=acceptance, adaptive=False, speculate=3, invariant_prefill=True)
    wanted = [request(prompt_of(4, n, IDS), 21, temperature=1.0, seed=n, banned_tokens=tuple(BEYOND)) for n in range(4)]
    for completion in run(engine, wanted):
        assert completion.stats.accepted == completion.stats.drafted > 0
        assert completion.stats.verifications == 5, "one token from the prompt, then five runs of four"


def test_who_has_a_token_that_the_draft_model_lacks_goes_on_without_drafts_beside_others() -> None:
    engine = tiny_engine(MODEL, NARROW, adaptive=False, speculate=3)
    stranger, usual = request((1, 2, IDS, 3), 12), request((1, 2, 5, 3), 12)
    completions = run(engine, [stranger, usual])
    assert completions[0].stats.drafted == 0
    assert completions[0].stats.slots[DRAFT] == 0, "not even its prompt is given to the draft model"
    assert completions[1].stats.drafted > 0
    assert [outcome(c) for c in completions] == [outcome(alone(MODEL, one)) for one in (stranger, usual)]


def test_drafting_ends_with_the_first_token_that_the_draft_model_lacks() -> None:
    before_it = 0
    for seed in range(6):
        engine = tiny_engine(MODEL, NARROW, adaptive=False, speculate=3)
        notes, one = Notes(engine), request(prompt_of(4, seed, IDS), 30, temperature=1.0, seed=seed)
        lengths = lengths_drafted_at(engine)
        (completion,) = run(engine, [one])
        assert outcome(completion) == outcome(alone(MODEL, one))
        first = next((n for n, token in enumerate(completion.token_ids) if token >= IDS), 30)
        assert all(length <= 4 + first for length in lengths)
        assert len(notes.drafts) == len(lengths)
        before_it += len(lengths) if first < 20 else 0
    assert before_it > 3, "drafting must have begun where it ended"


def test_a_row_that_would_feed_what_the_model_lacks_is_refused_before_it_runs() -> None:
    engine = tiny_engine(MODEL, NARROW, adaptive=False, speculate=3)
    put = engine.lanes.put

    def careless(lane: int, start: int, tokens: list[int]) -> None:
        put(lane, start, tokens)
        engine.lanes.draftable[lane] = True

    engine.lanes.put = careless  # type: ignore[method-assign]
    (completion,) = run(engine, [request((1, 2, IDS, 3), 6)])
    assert completion.finish_reason == "error"
    assert "token ids: draft: lane" in str(completion.error)
    assert f"would feed id {IDS} at position 2, the model has ids below {IDS}" in str(completion.error)


@pytest.mark.parametrize(
    ("acceptance", "samplers"), [("coupled", {GREEDY_NARROW, SAMPLE_NARROW}), ("rejection", {SAMPLE_DRAFT})]
)
def test_the_plan_draws_drafts_from_the_ids_of_the_draft_model_alone(acceptance: str, samplers: set[str]) -> None:
    plan = tiny_engine(MODEL, NARROW, acceptance=acceptance, speculate=3).plan
    assert {loop.sampler for loop in plan.loops} == samplers
    widths = {p.kind: p.graph.inputs[0].spec.shape[-1] for p in plan.programs if p.kind in samplers}
    assert set(widths.values()) == {IDS}
    buffers = dict(plan.buffers)
    assert buffers["draft.logits"].shape[-1] == IDS
    assert buffers["logits"].shape[-1] == VOCAB
    again = type(plan).from_json(plan.to_json())
    assert again == plan
    again.verify()


def test_a_draft_model_of_the_same_ids_shares_the_targets_programs() -> None:
    plan = tiny_engine(MODEL, MODEL.draft(0.1)).plan
    assert not {p.kind for p in plan.programs} & {GREEDY_NARROW, SAMPLE_NARROW}
    assert "draft.logits" not in dict(plan.buffers)
