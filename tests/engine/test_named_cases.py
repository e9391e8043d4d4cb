"""Cases at the edges of capacity, budget and pages that engines are known to get wrong, each by name."""

from __future__ import annotations

import pytest

from slotwise.core.errors import RequestError, SequenceFault
from slotwise.engine.engine import Engine
from slotwise.engine.request import Completion, Request

from .tiny import DraftChoice, TinyModel, alone, outcome, prompt_of, request, run, tiny_engine, tiny_model

CAPACITY = 4096
LONG = tiny_model(5, max_positions=CAPACITY)
MODEL = tiny_model(0)
DRAFTS = {"none": None, "ngram": "ngram", "model": MODEL.draft()}


def long_engine(draft: DraftChoice = None, speculate: int = 5, capacity: int = CAPACITY) -> Engine:
    """One sequence of 4096 tokens, with always the full width."""
    return tiny_engine(
        LONG,
        draft,
        capacity=capacity,
        page_size=16,
        max_sequences=1,
        speculate=speculate,
        prefill_chunk=4096,
        adaptive=False,
    )


def long_run(engine: Engine, prompt_length: int, max_new: int) -> Completion:
    (completion,) = run(engine, [request(prompt_of(prompt_length), max_new)])
    return completion


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_4092_tokens_of_4096_and_5_drafts_fill_to_4096_exactly(temperature: float) -> None:
    one = request(prompt_of(4092), 100, temperature=temperature)
    engine = long_engine(LONG.draft(0.02))
    (drafted,) = run(engine, [one])
    (plain,) = run(long_engine(), [one])
    assert len(one.prompt_ids) + len(drafted.token_ids) == CAPACITY
    assert drafted.finish_reason == "length"
    assert outcome(drafted) == outcome(plain)
    # The first token comes from the prompt's last row; 3 are left, so at most 2 may be drafted beside the target's own.
    assert max(int(binding.width.max()) for binding, _ in engine.history) == 2


@pytest.mark.parametrize("draft", DRAFTS)
def test_50_tokens_are_50_tokens_with_and_without_4_drafts(draft: str) -> None:
    one = request(prompt_of(6), 50)
    (completion,) = run(tiny_engine(MODEL, DRAFTS[draft], speculate=4, adaptive=False), [one])
    assert len(completion.token_ids) == completion.stats.new_tokens == 50
    assert outcome(completion) == outcome(alone(MODEL, one))


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("max_new", [1, 2, 5])
def test_a_budget_of_1_2_and_5_gives_1_2_and_5_tokens_with_4_drafts(max_new: int, draft: str) -> None:
    (completion,) = run(
        tiny_engine(MODEL, DRAFTS[draft], speculate=4, adaptive=False), [request(prompt_of(6), max_new)]
    )
    assert len(completion.token_ids) == max_new
    assert completion.finish_reason == "length"
    assert not completion.stats.clamped


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_a_prompt_that_ends_one_before_a_page_edge_gives_its_one_token(page_size: int, draft: str) -> None:
    engine = tiny_engine(MODEL, DRAFTS[draft], page_size=page_size, speculate=4, adaptive=False)
    prompts = [prompt_of(2 * page_size + offset) for offset in (-1, 0, 1) if 2 * page_size + offset > 0]
    for completion in run(engine, [request(prompt, 1) for prompt in prompts]):
        assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


def test_a_prompt_of_4000_with_200_more_wanted_gives_96_and_reports_the_clamp() -> None:
    completion = long_run(long_engine("ngram"), 4000, 200)
    assert len(completion.token_ids) == completion.stats.new_tokens == 96
    assert completion.finish_reason == "length"
    assert (completion.stats.requested, completion.stats.granted, completion.stats.clamped) == (200, 96, True)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_draft_model_with_a_shorter_context_stops_drafting_there_and_changes_nothing(noise: float) -> None:
    one = request(prompt_of(6), 50)
    short = MODEL.draft(noise, max_positions=20)
    engine = tiny_engine(MODEL, short, speculate=4, adaptive=False)
    (completion,) = run(engine, [one])
    assert outcome(completion) == outcome(alone(MODEL, one))
    assert completion.stats.drafted > 0
    assert completion.stats.slots["draft"] <= 20
    for binding, _ in engine.history:
        # The K and V of the last draft are not written, so the sequence may reach 21 tokens.
        assert (binding.width == 0).all() or (binding.length + binding.width <= 21).all()


def test_a_prompt_longer_than_the_draft_models_context_is_served_without_drafts() -> None:
    one = request(prompt_of(30), 10)
    (completion,) = run(tiny_engine(MODEL, MODEL.draft(max_positions=20), adaptive=False), [one])
    assert outcome(completion) == outcome(alone(MODEL, one))
    assert completion.stats.drafted == 0


def test_one_failing_job_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(MODEL, MODEL.draft(), max_sequences=3, adaptive=False)
    wanted = [request(prompt_of(5, seed), 20, temperature=0.7) for seed in range(3)]
    sequences = [engine.add(one) for one in wanted]
    original = engine.executor.run

    def run_but_fail_for_one(role: str, kind: str, rows: int) -> None:
        lane = sequences[1].lane
        if role == "target" and kind == "decode" and lane is not None and len(sequences[1].tokens) > 12:
            inputs = engine.executor.row_inputs(role, rows)
            if int(engine.ledger[role].page_table[lane, 0]) in inputs.page_table[:, 0]:
                raise RuntimeError("this job's kernel fails")
        original(role, kind, rows)

    monkeypatch.setattr(engine.executor, "run", run_but_fail_for_one)
    while not engine.is_idle:
        engine.step()
    first, failed, last = (sequence.completion() for sequence in sequences)
    assert failed.finish_reason == "error"
    assert isinstance(failed.error, SequenceFault)
    assert failed.token_ids == alone(MODEL, wanted[1]).token_ids[: len(failed.token_ids)]
    assert [outcome(first), outcome(last)] == [outcome(alone(MODEL, wanted[0])), outcome(alone(MODEL, wanted[2]))]


def capacity_engine(capacity: int = 20, model: TinyModel = MODEL) -> Engine:
    return tiny_engine(model, model.draft(), capacity=capacity, adaptive=False)


def test_a_prompt_of_exactly_capacity_gives_no_token_and_length() -> None:
    (completion,) = run(capacity_engine(), [request(prompt_of(20), 5)])
    assert (completion.token_ids, completion.text, completion.finish_reason) == ((), "", "length")
    assert (completion.stats.granted, completion.stats.clamped) == (0, True)


def test_a_prompt_one_below_capacity_gives_one_token() -> None:
    (completion,) = run(capacity_engine(), [request(prompt_of(19), 5)])
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (prompt_of(21), ["21", "20"]),
        ((), ["no tokens"]),
        ((1, 31), ["31", "0 to 30"]),
        ((-1, 3), ["-1", "0 to 30"]),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_with_the_numbers_and_changes_nothing(
    prompt: tuple[int, ...], says: list[str]
) -> None:
    engine = capacity_engine()
    with pytest.raises(RequestError) as refused:
        engine.add(Request(prompt, request((1,)).sampling))
    assert all(part in str(refused.value) for part in says)
    assert engine.is_idle


def test_ids_outside_the_vocabulary_are_refused_in_sampling_too() -> None:
    engine = capacity_engine()
    for wrong in ({"logit_bias": {31: 1.0}}, {"banned_tokens": [99]}, {"stop_token_ids": [31]}):
        with pytest.raises(ValueError, match="vocabulary"):
            engine.add(request((1,), **wrong))
    with pytest.raises(ValueError, match="banned"):
        engine.add(request((1,), banned_tokens=range(31)))
    assert engine.is_idle
