"""Drafters propose and nothing else: widths, catching up, and what each knows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from slotwise.core.errors import PlanError
from slotwise.engine.drafters.ngram import NgramDrafter
from slotwise.engine.drafters.none import NoDrafter
from slotwise.engine.engine import Engine
from slotwise.slots.binding import Binding, bind_decode
from slotwise.slots.step import decode_step

from .tiny import alone, finish, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
PERFECT: dict[str, Any] = {"draft": MODEL, "adaptive": False, "invariant_prefill": True}
"""A draft model with the target's weights, whose prefill gives the target's bits wherever its chunks end."""


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


def bindings(engine: Engine) -> Iterator[Binding]:
    """Every decode step's binding, as it happens."""
    seen = 0
    while not engine.is_idle:
        engine.step()
        if engine.history and engine.history[-1][0].epoch > seen:
            seen = engine.history[-1][0].epoch
            yield engine.history[-1][0]


def test_no_drafter_offers_nothing() -> None:
    assert NoDrafter().offer(ints(0, 3), ints(5, 5)).tolist() == [0, 0]


def test_the_ngram_drafter_proposes_what_followed_last_time() -> None:
    drafter = NgramDrafter()
    drafter.begin(2, [1, 2, 3, 4, 5, 9, 2, 3])
    assert drafter.offer(ints(2), ints(3)).tolist() == [3]
    binding = bind_decode(decode_step("ngram", "coupled"), 1, [0], ints(2), ints(8), ints(2), None)
    assert drafter.draft(binding, ints(0)).tokens == [[4, 5]]
    drafter.extend(2, [7])
    assert drafter.offer(ints(2), ints(3)).tolist() == [0]


def test_the_ngram_drafter_needs_a_match_of_its_minimum() -> None:
    for shortest, offered in ((1, 2), (2, 0)):
        drafter = NgramDrafter(shortest)
        drafter.begin(0, [5, 6, 7, 5])
        assert drafter.offer(ints(0), ints(2)).tolist() == [offered]


def test_the_ngram_drafter_keeps_lanes_apart_and_forgets_those_that_left() -> None:
    drafter = NgramDrafter()
    drafter.begin(0, [1, 2, 3, 1, 2])
    drafter.begin(1, [1, 2, 4, 1, 2])
    assert drafter.offer(ints(0, 1), ints(1, 1)).tolist() == [1, 1]
    binding = bind_decode(decode_step("ngram", "coupled"), 1, [0, 1], ints(0, 1), ints(5, 5), ints(1, 1), None)
    assert drafter.draft(binding, ints(0, 1)).tokens == [[3], [4]]
    drafter.end(0)
    drafter.begin(0, [8, 8])
    assert drafter.offer(ints(0), ints(4)).tolist() == [0]


def test_the_ngram_drafter_saves_steps_where_text_repeats() -> None:
    one = request((3, 4, 5) * 6, 30, logit_bias={3: 2.0, 4: 2.0, 5: 2.0})
    (completion,) = run(tiny_engine(MODEL, "ngram"), [one])
    assert completion.stats.accepted > 0
    assert completion.stats.verifications < 29
    assert outcome(completion) == outcome(alone(MODEL, one))


def test_a_draft_model_is_filled_to_the_known_tokens_before_it_drafts() -> None:
    engine = tiny_engine(MODEL, MODEL, adaptive=False, speculate=4)
    engine.add(request(prompt_of(20), 30))
    drafted = 0
    for binding in bindings(engine):
        span = binding.span("draft")
        if span is not None:
            drafted += 1
            # From its mark to one before the last draft; with every draft kept, two rows behind at most.
            assert span.end[0] == binding.length[0] + binding.width[0] - 1
            assert binding.length[0] - span.begin[0] <= 2
    assert drafted > 4


def test_a_draft_model_with_the_targets_weights_gets_every_draft_accepted() -> None:
    # A row of its cache that were missing, late or another token's would show here.
    for temperature in (0.0, 0.7, 1.5):
        wanted = [request(prompt_of(3 + 2 * n, n), 25, temperature=temperature, seed=n) for n in range(4)]
        for completion in run(tiny_engine(MODEL, **PERFECT, speculate=4), wanted):
            assert completion.stats.accepted == completion.stats.drafted > 15


def test_a_long_prompt_is_drafted_for_only_once_the_draft_model_has_read_it() -> None:
    engine = tiny_engine(MODEL, **PERFECT, prefill_chunk=4, speculate=2)
    sequence = engine.add(request(prompt_of(30), 20))
    widths = [int(binding.width[0]) for binding in bindings(engine)]
    assert widths[0] == 0
    assert 2 in widths
    assert sequence.accepted == sequence.drafted > 0


def test_penalties_count_drafts_so_that_a_perfect_draft_model_stays_perfect() -> None:
    sampling = {"repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.5, "temperature": 0.9}
    (completion,) = run(tiny_engine(MODEL, **PERFECT, speculate=5), [request(prompt_of(5), 30, **sampling)])
    assert completion.stats.accepted == completion.stats.drafted > 15


def test_a_preempted_sequence_drafts_again_after_its_return() -> None:
    engine = tiny_engine(MODEL, **PERFECT, capacity=30, pages=10, page_size=3, max_sequences=2, speculate=3)
    sequences = [engine.add(request(prompt_of(8, n), 20)) for n in range(2)]
    while not sequences[1].preemptions:
        engine.step()
    before = sequences[1].drafted
    finish(engine)
    assert sequences[1].drafted > before
    assert sequences[1].accepted == sequences[1].drafted


def test_widths_are_ragged_and_each_is_within_its_own_limits() -> None:
    engine = tiny_engine(MODEL, MODEL, adaptive=False, speculate=5, decode_rows=24)
    budgets = [3, 9, 20]
    sequences = [engine.add(request(prompt_of(4, n), new)) for n, new in enumerate(budgets)]
    ragged = False
    for binding in bindings(engine):
        for n, length, width in zip(binding.sequences, binding.length.tolist(), binding.width.tolist(), strict=True):
            assert width <= min(5, budgets[n] - (length - 4) - 1)
        ragged = ragged or len(set(binding.width.tolist())) > 1
    assert ragged
    assert [s.new_tokens for s in sequences] == budgets


def test_a_drafter_that_is_always_wrong_is_asked_less_and_less() -> None:
    def drafted(adaptive: bool) -> int:
        engine = tiny_engine(MODEL, MODEL.draft(3.0), adaptive=adaptive, speculate=3)
        (completion,) = run(engine, [request(prompt_of(5), 50, temperature=1.0)])
        return completion.stats.drafted

    assert drafted(adaptive=True) < drafted(adaptive=False) / 2


def test_a_draft_model_with_more_ids_than_the_target_is_refused_with_both_sizes() -> None:
    with pytest.raises(PlanError, match=r"tiny0 has 32 token ids, the target tiny\d has 31"):
        tiny_engine(MODEL, tiny_model(0, vocab=32))


def test_speculate_0_is_no_drafter_at_all() -> None:
    engine = tiny_engine(MODEL, MODEL, speculate=0)
    assert engine.plan.draft == "none"
    (completion,) = run(engine, [request(prompt_of(5), 9)])
    assert completion.stats.drafted == 0
    assert list(completion.stats.slots) == ["target"]


def test_the_draft_models_pages_are_shared_for_the_tokens_they_hold() -> None:
    # A page found for other tokens would not be seen in the output: drafts would only get worse.
    engine = tiny_engine(MODEL, **PERFECT, prefill_chunk=6, speculate=3)
    stem = prompt_of(24, 3)
    for prompt in (stem, stem[::-1], stem):
        sequence = engine.add(request(prompt, 20))
        finish(engine)
        assert sequence.accepted == sequence.drafted > 0
    assert engine.ledger["draft"].pool.find_prefix(stem, 8)


def test_the_ngram_drafter_keeps_nothing_of_sequences_that_are_gone() -> None:
    drafter = NgramDrafter()
    engine = tiny_engine(MODEL, "ngram", drafter=drafter, capacity=30, pages=10, max_sequences=3)
    run(engine, [request(prompt_of(8, n), 20) for n in range(4)])
    assert drafter.offer(ints(), ints()).size == 0
    with pytest.raises(KeyError):
        drafter.offer(ints(0), ints(3))
