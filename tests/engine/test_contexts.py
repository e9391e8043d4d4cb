"""What looks at the order of tokens, against its definition in words."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.adjust import LogitAdjuster
from slotwise.engine.sampling.logprobs import logprobs_of

IDS = st.integers(0, 3)
TOKENS = st.lists(IDS, min_size=1, max_size=9)


def edits(sampling: Sampling, prompt: list[int], output: list[int]) -> LogitAdjuster:
    found = LogitAdjuster(sampling, prompt)
    found.commit(output)
    return found


@given(TOKENS, st.lists(IDS, max_size=5), st.integers(1, 4))
def test_a_token_that_would_repeat_a_run_is_banned_and_no_other(
    prompt: list[int], output: list[int], size: int
) -> None:
    known = prompt + output
    runs = {tuple(known[i : i + size]) for i in range(len(known) - size + 1)}
    ending = known[len(known) - size + 1 :]
    banned = {token for token in range(4) if len(ending) == size - 1 and (*ending, token) in runs}
    found = edits(Sampling(no_repeat_ngram_size=size), prompt, output).edits()
    assert set(found.tokens[found.banned].tolist()) == banned


@given(TOKENS, st.lists(IDS, max_size=5), st.lists(st.lists(IDS, min_size=1, max_size=4), min_size=1, max_size=5))
def test_the_last_token_of_a_bad_word_is_banned_where_its_others_stand(
    prompt: list[int], output: list[int], words: list[list[int]]
) -> None:
    text = prompt + output
    banned = {
        word[-1] for word in words if text[len(text) - len(word) + 1 :] == word[:-1] and len(word) <= len(text) + 1
    }
    found = edits(Sampling(bad_words=words), prompt, output).edits()
    assert set(found.tokens[found.banned].tolist()) == banned


@given(
    TOKENS,
    st.lists(IDS, max_size=5),
    st.dictionaries(st.lists(IDS, min_size=1, max_size=3).map(tuple), st.integers(-4, 4).map(float), min_size=1),
)
def test_biases_of_sequences_that_end_alike_add_up(
    prompt: list[int], output: list[int], biases: dict[tuple[int, ...], float]
) -> None:
    text = prompt + output
    expected = dict.fromkeys(range(4), 0.0)
    for ids, bias in biases.items():
        if len(ids) <= len(text) + 1 and tuple(text[len(text) - len(ids) + 1 :]) == ids[:-1]:
            expected[ids[-1]] += bias
    found = edits(Sampling(sequence_bias=biases, logit_bias={1: 0.5}), prompt, output).edits()
    added = dict.fromkeys(range(4), 0.0) | dict(zip(found.tokens.tolist(), found.changes[:, 0].tolist(), strict=True))
    assert added == {**expected, 1: expected[1] + 0.5}


@pytest.mark.parametrize(
    "options",
    [
        {"allowed_token_ids": [1, 9]},
        {"forced_bos_token_id": 9},
        {"banned_tokens": [1, 9]},
        {"repetition_penalty": 1.5, "logit_bias": {9: 2.0}},
    ],
)
def test_a_draft_model_that_lacks_an_id_has_its_other_ids_edited_alike(options: dict[str, Any]) -> None:
    found = LogitAdjuster(Sampling(**options), [2]).edits()
    wide = np.arange(10, dtype=np.float32) - 4
    narrow = wide[:9].copy()
    found.apply(wide)
    found.apply(narrow)
    np.testing.assert_array_equal(narrow, wide[:9])


def test_a_logit_that_a_model_leaves_infinite_is_not_edited_into_a_sound_one() -> None:
    row = np.array([math.inf, -math.inf, 1], np.float32)
    LogitAdjuster(Sampling(logit_bias={0: -3.0, 1: 3.0}, frequency_penalty=1.0), [2]).edits().apply(row)
    assert row.tolist() == [math.inf, -math.inf, 1]


def test_single_sequences_and_biases_of_one_token_add_up() -> None:
    assert Sampling(logit_bias={3: 1.0}, sequence_bias={(3,): 0.5, (4,): 2.0}).logit_bias == {3: 1.5, 4: 2.0}


def test_what_is_banned_stays_banned_whatever_else_is_said_of_it() -> None:
    sampling = Sampling(
        banned_tokens=[3, 4], sequence_bias={(2, 3): 5.0}, exponential_decay_length_penalty=(0, 2.0), stop_token_ids=[4]
    )
    found = edits(sampling, [1], [2]).edits()
    assert set(found.tokens[found.banned].tolist()) == {3, 4}


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9), st.integers(-1, 12))
def test_the_likeliest_come_first_and_of_equals_the_lower_id(logits: list[int], top: int) -> None:
    row = np.array([logits], np.float32)
    (found,) = logprobs_of(row, [0], top, None)
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    assert list(found.top) == order[: len(logits) if top < 0 else top]
    assert found.rank == 1 + sum(each > logits[0] for each in logits)
    assert math.fsum(map(math.exp, found.top.values())) <= 1 + 1e-9
