"""Requests that begin alike share the pages that hold the beginning: full, committed, never written again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slotwise.engine.engine import Engine
from slotwise.slots.ledger import RoleLedger

from .tiny import (
    DraftChoice,
    alone,
    assert_all_returned,
    finish,
    outcome,
    prompt_of,
    request,
    run,
    tiny_engine,
    tiny_model,
)

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}
STEM = prompt_of(40, 9)


def engine_for(draft: str = "none", **options: Any) -> Engine:
    return tiny_engine(MODEL, DRAFTS[draft], **{"page_size": 4, "prefill_chunk": 8, "adaptive": False, **options})


def shared_slots(role: RoleLedger) -> torch.Tensor:
    """The slots of every page that others may find."""
    pages = [page for page in range(1, role.pool.total + 1) if page in role.pool._node_of_page]
    return torch.tensor([page * role.page_size + n for page in pages for n in range(role.page_size)], dtype=torch.long)


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_second_request_with_the_same_long_prompt_shares_and_gives_the_same_bits(draft: str) -> None:
    one, engine = request(STEM, 12, temperature=0.8), engine_for(draft)
    first, second = run(engine, [one])[0], run(engine, [one])[0]
    # The last row of the prompt is computed for its logits, so of 40 tokens the whole chunks before it are shared.
    assert (first.stats.shared_tokens, second.stats.shared_tokens) == (0, 32)
    assert outcome(first) == outcome(second) == outcome(alone(MODEL, one, prefill_chunk=8))


@pytest.mark.parametrize(
    ("page_size", "chunk", "shared"), [(4, 8, 16), (16, 4, 16), (3, 5, 15), (1, 7, 21), (8, 32, 0)]
)
def test_what_is_shared_ends_where_a_page_and_a_chunk_end(page_size: int, chunk: int, shared: int) -> None:
    engine = engine_for(page_size=page_size, prefill_chunk=chunk)
    left, right = request((*STEM[:23], 1, 2), 6), request((*STEM[:23], 3, 4), 6)
    run(engine, [left])
    (completion,) = run(engine, [right])
    assert completion.stats.shared_tokens == shared
    assert outcome(completion) == outcome(alone(MODEL, right, prefill_chunk=chunk))


def test_a_running_sequence_is_shared_from_before_it_ends() -> None:
    engine = engine_for()
    first = engine.add(request(STEM[:20], 20))
    while first.state != "decode":
        engine.step()
    second = engine.add(request(STEM[:20], 20))
    engine.step()
    assert first.state == "decode"
    assert second.shared_tokens == 16
    ledger = engine.ledger["target"]
    assert (ledger.page_table[first.lane, :4] == ledger.page_table[second.lane, :4]).all()
    assert (ledger.pool.references[ledger.page_table[first.lane, :4]] == 2).all()
    finish(engine)
    assert first.tokens == second.tokens
    assert_all_returned(engine)


@pytest.mark.parametrize("draft", DRAFTS)
def test_shared_pages_are_never_written(draft: str) -> None:
    engine = engine_for(draft, max_sequences=3)
    run(engine, [request(STEM[:24], 10)])
    kept: dict[str, tuple[torch.Tensor, list[torch.Tensor]]] = {}
    for role, ledger in engine.ledger.roles.items():
        slots = shared_slots(ledger)
        assert slots.numel() >= 24 if role == "target" else True
        kept[role] = slots, [cache[slots].clone() for cache in engine.executor.caches[role].values()]
    run(engine, [request((*STEM[:n], 5), 8, temperature=1.0, seed=n) for n in (23, 24, 16, 9)])
    for role, (slots, before) in kept.items():
        for cache, content in zip(engine.executor.caches[role].values(), before, strict=True):
            assert torch.equal(cache[slots], content)


def test_what_decoding_wrote_is_not_shared_where_prefill_would_compute_other_bits() -> None:
    engine = engine_for()
    assert not engine.plan.prefill_is_invariant
    (first,) = run(engine, [request(STEM[:10], 20)])
    again = request((*STEM[:10], *first.token_ids), 5)
    (second,) = run(engine, [again])
    assert second.stats.shared_tokens == 8
    assert outcome(second) == outcome(alone(MODEL, again, prefill_chunk=8))


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_decoding_wrote_is_shared_where_prefill_computes_the_same_bits(draft: str) -> None:
    engine = engine_for(draft, invariant_prefill=True)
    (first,) = run(engine, [request(STEM[:10], 20)])
    again = request((*STEM[:10], *first.token_ids), 5)
    (second,) = run(engine, [again])
    assert second.stats.shared_tokens == 28
    assert outcome(second) == outcome(alone(MODEL, again, prefill_chunk=5, invariant_prefill=True))


def test_pages_of_a_prompts_last_part_of_a_chunk_are_not_shared() -> None:
    # A longer prompt computes those positions within a whole chunk, with other bits.
    engine = engine_for()
    for length in (21, 31, 35):
        one = request(STEM[:length], 6)
        (completion,) = run(engine, [one])
        assert outcome(completion) == outcome(alone(MODEL, one, prefill_chunk=8))
        assert engine.ledger["target"].pool.count().cached == length // 8 * 2


def test_nothing_is_shared_when_sharing_is_off() -> None:
    engine = engine_for("model", share_prefixes=False)
    one = request(STEM, 5)
    assert [run(engine, [one])[0].stats.shared_tokens for _ in range(2)] == [0, 0]
    assert all(role.pool.count().cached == 0 for role in engine.ledger.roles.values())


@pytest.mark.parametrize("draft", DRAFTS)
def test_cached_pages_are_evicted_under_pressure_and_computed_anew(draft: str) -> None:
    engine = engine_for(draft, capacity=48, pages=14, max_sequences=2)
    prompts = [prompt_of(32, seed) for seed in (1, 2, 3)]
    for round_ in range(3):
        for prompt in prompts:
            one = request(prompt, 6, temperature=0.6, seed=round_)
            (completion,) = run(engine, [one])
            assert outcome(completion) == outcome(alone(MODEL, one, capacity=48, prefill_chunk=8))
    assert engine.ledger["target"].pool.count().cached > 0


def test_a_prompt_that_is_partly_evicted_is_shared_up_to_there() -> None:
    engine = engine_for(capacity=48, pages=14, max_sequences=1)
    one = request(STEM[:32], 6)
    run(engine, [one])
    run(engine, [request(prompt_of(20, 3), 10)])
    (completion,) = run(engine, [one])
    assert 0 < completion.stats.shared_tokens < 24
    assert outcome(completion) == outcome(alone(MODEL, one, capacity=48, prefill_chunk=8))


def test_a_shared_prompt_spares_its_rows() -> None:
    engine, rows = engine_for(), []
    original = engine.executor.set_logit_row

    def count(row: int) -> None:
        rows.append(row + 1)
        original(row)

    engine.executor.set_logit_row = count  # type: ignore[method-assign]
    run(engine, [request(STEM, 2)])
    assert rows == [8] * 5
    rows.clear()
    run(engine, [request(STEM, 2)])
    assert rows == [8]
