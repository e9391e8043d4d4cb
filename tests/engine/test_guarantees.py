"""With `coupled` acceptance, nothing but the request decides its tokens and log-probabilities, to the last bit.

Not the drafter, the width, the page size, the size of the pool, who runs beside it, when it arrived, how often it gave
its pages up, what it shares, or whether steps are started before those before them are read. Counts are exact, and
every slot comes back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.engine.engine import Engine
from slotwise.engine.request import Completion, Request
from slotwise.engine.sequence import Sequence
from slotwise.slots.ledger import Ledger

from .tiny import (
    DraftChoice,
    TinyModel,
    alone,
    assert_all_returned,
    outcome,
    prompt_of,
    request,
    tiny_engine,
    tiny_model,
)

CAPACITY = 40
MODELS = [
    tiny_model(0),
    tiny_model(1, layers=2, vocab=17),
    tiny_model(2, layers=2, vocab=61, window=5),
    tiny_model(3, softcap=3.0),
]


@dataclass(frozen=True)
class World:
    """What must not matter: a model's drafter, the plan's options, when each request arrives, whether steps overlap."""

    model: int
    draft: str
    options: tuple[tuple[str, Any], ...]
    requests: tuple[Request, ...]
    arrivals: tuple[int, ...]
    overlap: bool

    def target(self) -> TinyModel:
        return MODELS[self.model]

    def drafter(self) -> DraftChoice:
        target = self.target()
        return {
            "none": None,
            "ngram": "ngram",
            "good model": target.draft(0.05),
            "bad model": target.draft(1.0),
            "same model": target,
            "short model": target.draft(0.1, max_positions=20),
            "model of fewer ids": target.draft(0.1, ids=target.spec.vocab_size - 3),
        }[self.draft]


@st.composite
def samplings(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    """Every sampler, on or off, greedy or not."""
    found: dict[str, Any] = {"seed": draw(st.integers(0, 2**64 - 1)), "logprobs": draw(st.sampled_from([None, 0, 3]))}
    found["temperature"] = draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, 2.5]))
    tokens = st.integers(0, vocab - 1)
    choices: dict[str, st.SearchStrategy[Any]] = {
        "top_k": st.integers(1, vocab + 1),
        "top_p": st.sampled_from([0.3, 0.8, 0.99]),
        "min_p": st.sampled_from([0.05, 0.3]),
        "repetition_penalty": st.sampled_from([0.7, 1.3]),
        "frequency_penalty": st.sampled_from([-0.5, 1.1]),
        "presence_penalty": st.sampled_from([-1.0, 0.9]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-3.0, 2.5]), min_size=1, max_size=3),
        "banned_tokens": st.lists(tokens, min_size=1, max_size=3),
        "stop_token_ids": st.lists(tokens, min_size=1, max_size=2),
        "min_new_tokens": st.integers(1, 6),
        "min_length": st.integers(1, CAPACITY),
        "max_length": st.integers(1, CAPACITY),
        "no_repeat_ngram_size": st.integers(1, 3),
        "sequence_bias": st.dictionaries(st.tuples(tokens, tokens), st.sampled_from([-4.0, 4.0]), min_size=1),
        "bad_words": st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=9),
        "begin_suppress_tokens": st.lists(tokens, min_size=1, max_size=3),
        "allowed_token_ids": st.lists(tokens, min_size=4, max_size=9, unique=True),
        "exponential_decay_length_penalty": st.sampled_from([(0, 1.5), (3, 1.1), (1, 0.5)]),
        "forced_bos_token_id": tokens,
        "forced_eos_token_ids": st.lists(tokens, min_size=1, max_size=2),
        "prompt_logprobs": st.sampled_from([0, 2]),
    }
    for name in draw(st.sets(st.sampled_from(sorted(choices)), max_size=4)):
        found[name] = draw(choices[name])
    return found


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Several requests, many of which begin alike; small pools; odd chunks, pages and widths."""
    model = draw(st.integers(0, len(MODELS) - 1))
    vocab = MODELS[model].spec.vocab_size
    page_size = draw(st.sampled_from([1, 3, 16]))
    per_sequence = -(-CAPACITY // page_size)
    max_sequences = draw(st.integers(1, 4))
    speculate = draw(st.integers(1, 6))
    options = {
        "capacity": CAPACITY,
        "page_size": page_size,
        "pages": draw(st.integers(per_sequence, per_sequence * max_sequences)),
        "max_sequences": max_sequences,
        "speculate": speculate,
        "decode_rows": draw(st.integers(speculate + 1, 14)),
        "prefill_chunk": draw(st.sampled_from([1, 2, 3, 5, 6, 16, 20])),
        "adaptive": draw(st.booleans()),
        "share_prefixes": draw(st.booleans()),
    }
    stem = prompt_of(CAPACITY, draw(st.integers(0, 3)), vocab)
    requests = []
    for _ in range(draw(st.integers(1, 5))):
        shared = draw(st.integers(0, CAPACITY - 4))
        tail = draw(st.lists(st.integers(0, vocab - 1), min_size=0 if shared else 1, max_size=4))
        max_new = draw(st.sampled_from([1, 2, 5, 9, 17, 100]))
        prompt, sampling = (*stem[:shared], *tail), draw(samplings(vocab))
        if len(prompt) >= min(CAPACITY, sampling.get("max_length", CAPACITY)):
            sampling.pop("prompt_logprobs", None)  # refused where no new token has room
        requests.append(request(prompt, max_new, **sampling))
    drafts = ["none", "ngram", "good model", "bad model", "same model", "short model", "model of fewer ids"]
    return World(
        model,
        draw(st.sampled_from(drafts)),
        tuple(options.items()),
        tuple(requests),
        tuple(draw(st.integers(0, 12)) for _ in requests),
        draw(st.booleans()),
    )


def serve(engine: Engine, world: World) -> list[Sequence]:
    """Add each request at its step, and step until all are done; the books are looked at after every step."""
    sequences: list[Sequence | None] = [None] * len(world.requests)
    for step in range(2000):
        for i, arrival in enumerate(world.arrivals):
            if arrival == step:
                sequences[i] = engine.add(world.requests[i])
        if engine.is_idle and step >= max(world.arrivals):
            return [sequence for sequence in sequences if sequence is not None]
        engine.step()
        assert_balanced(engine.ledger)
    raise AssertionError(f"still busy\n{engine.show_history()}")


def assert_balanced(ledger: Ledger) -> None:
    """Between steps: pages and slots add up, counted here from page tables; nothing stays reserved."""
    for role in ledger.roles.values():
        assert (role.reserved == role.committed).all()
        assert (role.page_count == -(-role.committed // role.page_size)).all()
        listed: dict[int, int] = {}
        for table, count in zip(role.page_table.tolist(), role.page_count.tolist(), strict=True):
            for page in table[:count]:
                listed[page] = listed.get(page, 0) + 1
        assert 0 not in listed
        assert listed == {page: n for page, n in enumerate(role.pool.references.tolist()) if n}
        count = role.pool.count()
        assert count.held == len(listed)
        assert count.free + count.held + count.cached == role.pool.total
        assert role.flow.reserved == role.flow.committed + role.flow.released


def assert_exact_counts(completion: Completion, one: Request) -> None:
    """Token counts are what was asked for, and what each step kept adds up."""
    stats = completion.stats
    assert stats.new_tokens == len(completion.token_ids)
    assert stats.prompt_tokens == len(one.prompt_ids)
    asked = one.sampling.max_new_tokens or CAPACITY
    if one.sampling.max_length is not None:
        asked = min(asked, max(one.sampling.max_length - len(one.prompt_ids), 0))
    assert stats.granted == min(asked, CAPACITY - len(one.prompt_ids))
    assert stats.clamped == (stats.granted < asked)
    if not stats.granted:
        assert (stats.new_tokens, stats.verifications, completion.finish_reason) == (0, 0, "length")
        return
    if completion.error is not None:
        # Bans that grow with the sequence may leave nothing to choose from.
        assert "no token left to choose from" in str(completion.error)
        return
    if completion.finish_reason == "length":
        assert stats.new_tokens == stats.granted
    else:
        assert completion.finish_reason == "stop"
        assert completion.token_ids[-1] in one.sampling.stop_token_ids
        assert not set(completion.token_ids[:-1]) & set(one.sampling.stop_token_ids)
    # The prompt's last row gives one token; each verification gives its accepted drafts and, unless cut, one more.
    given = stats.new_tokens - 1 - stats.accepted
    assert stats.verifications - 1 <= given <= stats.verifications
    assert 0 <= stats.accepted <= stats.drafted
    if one.sampling.logprobs is None:
        assert completion.logprobs is None
    else:
        assert [entry.token_id for entry in completion.logprobs or ()] == list(completion.token_ids)


def check(world: World) -> list[Sequence]:
    """Serve a world; every request must give what it gives alone."""
    options = dict(world.options)
    engine = tiny_engine(world.target(), world.drafter(), overlap=world.overlap, **options)
    sequences = serve(engine, world)
    assert_all_returned(engine)
    for one, sequence in zip(world.requests, sequences, strict=True):
        completion = sequence.completion()
        expected = alone(world.target(), one, capacity=CAPACITY, prefill_chunk=options["prefill_chunk"])
        assert outcome(completion) == outcome(expected)
        assert str(completion.error) == str(expected.error)
        assert_exact_counts(completion, one)
    return sequences


@given(worlds())
@settings(max_examples=100)
def test_the_request_alone_decides_its_tokens_and_log_probabilities(world: World) -> None:
    check(world)


@given(worlds())
@settings(max_examples=15)
def test_where_prefill_keeps_rows_apart_not_even_the_chunks_matter(world: World) -> None:
    # What decoding wrote is then shared too.
    engine = tiny_engine(world.target(), world.drafter(), invariant_prefill=True, **dict(world.options))
    assert engine.plan.prefill_is_invariant
    for one, sequence in zip(world.requests, serve(engine, world), strict=True):
        expected = alone(world.target(), one, capacity=CAPACITY, prefill_chunk=16, invariant_prefill=True)
        assert outcome(sequence.completion()) == outcome(expected)


@pytest.mark.slow
@given(worlds())
@settings(max_examples=3000)
def test_the_request_alone_decides_its_tokens_in_thousands_of_worlds(world: World) -> None:
    check(world)


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.5},
    {"temperature": 1.5, "top_k": 3},
    {"temperature": 1.5, "top_k": 1},
    {"temperature": 1.5, "top_p": 0.4},
    {"temperature": 1.5, "min_p": 0.3},
    {"temperature": 0.3, "seed": 2**64 - 1},
    {"temperature": 1.5, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5},
    {"temperature": 1.5, "logit_bias": {3: 4.0}, "banned_tokens": [5, 6]},
]


@pytest.mark.parametrize("draft", ["none", "ngram", "good model"])
def test_each_row_of_a_batch_is_sampled_by_its_own_settings(draft: str) -> None:
    # One prompt for all: a row that took a neighbour's setting would show.
    for rotation in (0, 4):
        order = SETTINGS[rotation:] + SETTINGS[:rotation]
        requests = tuple(request(prompt_of(6), 16, **setting) for setting in order)
        options = {"max_sequences": len(order), "decode_rows": 64, "adaptive": False, "capacity": CAPACITY}
        world = World(0, draft, tuple({**options, "prefill_chunk": 5}.items()), requests, (0,) * len(order), True)
        found = {sequence.completion().token_ids for sequence in check(world)}
        assert len(found) == len(order) - 1  # a top-k of one is greedy


def test_each_request_reports_the_slots_that_it_held_itself() -> None:
    engine = tiny_engine(MODELS[0], max_sequences=1)
    sequences = [engine.add(request(prompt_of(n), 4)) for n in (20, 3)]
    while not engine.is_idle:
        engine.step()
    # The last token's K and V are never needed.
    assert [s.completion().stats.slots for s in sequences] == [{"target": 23}, {"target": 6}]
