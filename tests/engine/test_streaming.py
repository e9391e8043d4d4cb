"""Stops inside accepted runs: text, tokens, counts, cache and stream agree on one length, that without speculation.

The draft model is the target itself, so that every draft is accepted and each stop falls inside a run somewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from slotwise.engine.detokenize import TokenPieces
from slotwise.engine.engine import Engine
from slotwise.engine.request import Chunk, Request
from slotwise.engine.sequence import Sequence

from .tiny import DraftChoice, alone, assert_all_returned, outcome, prompt_of, request, stream, tiny_engine, tiny_model

# Byte-level tokens: whole letters, pairs, and the two bytes of "é" and of "ü" apart.
TOKENS = ["a", "b", "c", "d", "ab", "bc", "cd", "da", "abc", "Ġ", "Ġa", "Ã", "©", "¼", ".", "e", "f", "ef", "fe"]
WORDS = Tokenizer(models.BPE({token: n for n, token in enumerate(TOKENS)}, []))
WORDS.decoder = decoders.ByteLevel()
PIECES = TokenPieces(WORDS)
MODEL = tiny_model(11, layers=2, vocab=len(TOKENS))
DRAFTS: dict[str, DraftChoice] = {"ngram": "ngram", "model": MODEL.draft(0.1, layers=2), "same": MODEL}
NEW = 30


def engine_for(draft: str, **options: Any) -> Engine:
    return tiny_engine(
        MODEL, DRAFTS[draft], pieces=PIECES, eos_ids=options.pop("eos_ids", ()), adaptive=False, **options
    )


def plain(one: Request, **options: Any) -> Any:
    return alone(MODEL, one, pieces=PIECES, **options)


def base_request(seed: int, **sampling: Any) -> Request:
    return request(prompt_of(7, seed, len(TOKENS)), NEW, temperature=1.5, seed=seed, **sampling)


def follow(engine: Engine, sequence: Sequence) -> list[Chunk]:
    """Step to the end and take every chunk; throughout, the cache is one short of the tokens known or kept."""
    ledger = engine.ledger["target"]
    lengths: list[int] = []
    chunks: list[Chunk] = []
    close = ledger.close

    def close_and_note(lane: int) -> None:
        lengths.append(int(ledger.committed[lane]))
        close(lane)

    ledger.close = close_and_note  # type: ignore[method-assign]
    while not engine.is_idle:
        engine.step()
        if sequence.state == "decode":
            assert int(ledger.committed[sequence.lane]) == len(sequence.tokens) - 1
        chunk = sequence.take_chunk()
        chunks += [] if chunk is None else [chunk]
    assert lengths == [len(sequence.tokens) - 1]
    return chunks


def check(one: Request, draft: str, speculate: int, **options: Any) -> Sequence:
    engine = engine_for(draft, speculate=speculate, **options)
    sequence = engine.add(one)
    chunks = follow(engine, sequence)
    assert_all_returned(engine)
    completion, expected = sequence.completion(), plain(one, **options)
    assert outcome(completion) == outcome(expected)
    assert completion.stats.new_tokens == len(completion.token_ids) == len(completion.logprobs or ())
    assert tuple(token for chunk in chunks for token in chunk.token_ids) == completion.token_ids
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert [chunk.completion is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].finish_reason == completion.finish_reason
    return sequence


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("seed", range(3))
def test_a_stop_token_inside_a_run_is_the_last_token(draft: str, seed: int) -> None:
    tokens = plain(base_request(seed)).token_ids
    for place in (1, 2, 4, 7, 11):
        sequence = check(base_request(seed, stop_token_ids=[tokens[place]]), draft, 6)
        first = tokens.index(tokens[place])
        assert sequence.completion().token_ids == tokens[: first + 1]
        assert sequence.finish_reason == "stop"


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_models_own_end_token_stops_unless_it_is_to_be_ignored(draft: str) -> None:
    tokens = plain(base_request(1)).token_ids
    eos = (tokens[8],)
    assert check(base_request(1), draft, 5, eos_ids=eos).completion().token_ids == tokens[: tokens.index(tokens[8]) + 1]
    assert check(base_request(1, ignore_eos=True), draft, 5, eos_ids=eos).completion().token_ids == tokens


@given(st.sampled_from(sorted(DRAFTS)), st.integers(0, 20), st.integers(0, 25), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=25)
def test_a_stop_string_inside_a_run_cuts_there_wherever_tokens_end(
    draft: str, seed: int, start: int, length: int, speculate: int
) -> None:
    # A piece of the text itself: it spans tokens, begins and ends inside them.
    text = plain(base_request(seed)).text
    stop = text[start : start + length]
    assume(stop)
    completion = check(base_request(seed, stop=[stop]), draft, speculate).completion()
    assert completion.finish_reason == "stop"
    assert completion.text == text[: text.index(stop)]
    assert completion.token_ids == plain(base_request(seed)).token_ids[: len(completion.token_ids)]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("speculate", [1, 4, 7])
def test_the_budget_ends_inside_a_run(draft: str, speculate: int) -> None:
    for new in (1, 2, 5, 8, 9, 12):
        one = request(prompt_of(5, 2, len(TOKENS)), new)
        completion = check(one, draft, speculate).completion()
        assert (len(completion.token_ids), completion.finish_reason) == (new, "length")


def test_drafts_kept_before_a_stop_are_counted_as_accepted() -> None:
    # One token from the prompt, then runs of seven: a stop at the fifth new token keeps four drafts of the first run.
    tokens = plain(base_request(3)).token_ids
    place = next(n for n in (4, 5, 6) if tokens[n] not in tokens[:n])
    stats = check(base_request(3, stop_token_ids=[tokens[place]]), "same", 6).completion().stats
    assert (stats.verifications, stats.drafted, stats.accepted) == (1, 6, place)


def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_none() -> None:
    one = base_request(4)
    text = plain(one).text
    never = text[-3:] + "#"
    chunks_of = engine_for("same", speculate=3)
    sequence = chunks_of.add(base_request(4, stop=[never]))
    shown = ""
    while sequence.state != "done":
        chunks_of.step()
        chunk = sequence.take_chunk()
        shown += "" if chunk is None else chunk.text
        assert text.startswith(shown)
    assert shown == text == sequence.completion().text


def test_streamed_text_is_whole_characters_even_where_a_run_ends_inside_one() -> None:
    first, second = TOKENS.index("Ã"), TOKENS.index("©")
    found = False
    for seed in range(8):
        one = request((first,), 20, temperature=2.0, seed=seed, logit_bias={first: 6.0, second: 6.0})
        engine = engine_for("same", speculate=2)
        chunks = stream(engine, engine.add(one))
        text = "".join(chunk.text for chunk in chunks)
        assert text == plain(one).text
        found = found or any("é" in chunk.text for chunk in chunks)
    assert found


def test_a_cancelled_stream_ends_with_what_was_held_back() -> None:
    text = plain(base_request(4)).text
    engine = engine_for("same", speculate=3)
    sequence = engine.add(base_request(4, stop=[text[2:] + "#"]))
    while sequence.new_tokens < 8:
        engine.step()
    sequence.take_chunk()
    engine.cancel(sequence)
    chunk = sequence.take_chunk()
    assert chunk is not None
    assert chunk.finish_reason == "cancelled"
    assert chunk.text
    assert text.startswith(sequence.completion().text)
    assert sequence.completion().text.endswith(chunk.text)
    assert_all_returned(engine)
