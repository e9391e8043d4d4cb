"""What the history-dependent samplers promise: the textbook's numbers, and rollback by construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.adjust import LogitAdjuster
from slotwise.engine.sampling.edits import BAN, Edit, Edits

VOCABULARY = 12
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
SAMPLINGS = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    presence_penalty=st.sampled_from([0.0, -0.5, 1.0]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.sampled_from([-2.0, 0.5, 0.0, 100.0]), max_size=4),
    banned_tokens=st.lists(st.integers(0, VOCABULARY - 1), max_size=3),
)
IDS = st.integers(0, 4)  # few, so that what looks at the order of tokens finds some
WITH_ORDER = st.builds(
    Sampling,
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.dictionaries(IDS, st.sampled_from([-2.0, 0.5]), max_size=2),
    sequence_bias=st.dictionaries(st.lists(IDS, min_size=2, max_size=3).map(tuple), st.sampled_from([-1.5, 2.5])),
    bad_words=st.lists(st.lists(IDS, min_size=2, max_size=3), max_size=3),
    no_repeat_ngram_size=st.integers(0, 3),
    min_new_tokens=st.integers(0, 4),
    begin_suppress_tokens=st.lists(IDS, max_size=1),
    exponential_decay_length_penalty=st.none() | st.just((2, 1.5)),
    forced_eos_token_ids=st.lists(IDS, max_size=1),
    forced_bos_token_id=st.none() | IDS,
)


def applied(edits: Edits, logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    adjusted = logits.astype(np.float32)
    edits.apply(adjusted)
    return adjusted


def by_definition(
    sampling: Sampling, prompt: Sequence[int], output: Sequence[int], logits: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    adjusted = logits.copy()
    for token in range(len(logits)):
        adjusted[token] += sampling.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            penalty = sampling.repetition_penalty
            adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
        adjusted[token] -= sampling.frequency_penalty * list(output).count(token)
        adjusted[token] -= sampling.presence_penalty * (token in output)
        if token in sampling.banned_tokens:
            adjusted[token] = -math.inf
    return adjusted


def same(left: Edits, right: Edits) -> bool:
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in ((left.tokens, right.tokens), (left.changes, right.changes), (left.banned, right.banned))
    )


@given(SAMPLINGS, TOKENS, TOKENS, TOKENS, st.lists(st.floats(-9, 9), min_size=VOCABULARY, max_size=VOCABULARY))
def test_edits_are_the_dense_definition(
    sampling: Sampling, prompt: list[int], output: list[int], draft: list[int], values: list[float]
) -> None:
    logits = np.array(values)
    adjuster = LogitAdjuster(sampling, prompt)
    adjuster.commit(output)
    expected = by_definition(sampling, prompt, output + draft, logits)
    np.testing.assert_allclose(applied(adjuster.edits(draft), logits), expected, rtol=1e-5, atol=1e-5)


@given(SAMPLINGS, TOKENS, TOKENS, TOKENS, st.integers(1, 5))
def test_a_drafted_row_has_the_edits_of_a_history_that_was_committed(
    sampling: Sampling, prompt: list[int], output: list[int], draft: list[int], piece: int
) -> None:
    adjuster = LogitAdjuster(sampling, prompt)
    for start in range(0, len(output), piece):
        adjuster.commit(output[start : start + piece])
    fresh = LogitAdjuster(sampling, prompt)
    fresh.commit(output + draft)
    assert same(adjuster.edits(draft), fresh.edits())


@given(WITH_ORDER, st.lists(IDS, max_size=6), st.lists(IDS, max_size=6), st.lists(IDS, max_size=4), st.integers(1, 5))
def test_so_it_is_for_what_looks_at_the_order_of_tokens(
    sampling: Sampling, prompt: list[int], output: list[int], draft: list[int], piece: int
) -> None:
    adjuster, fresh = (LogitAdjuster(sampling, prompt, [4], budget=9) for _ in range(2))
    for start in range(0, len(output), piece):
        adjuster.edits(draft)
        adjuster.commit(output[start : start + piece])
    fresh.commit(output + draft)
    one, other = adjuster.edits(draft), fresh.edits()
    assert same(one, other)
    assert one.forced == other.forced


@given(SAMPLINGS, TOKENS, TOKENS, TOKENS)
def test_asking_changes_nothing(sampling: Sampling, prompt: list[int], output: list[int], draft: list[int]) -> None:
    adjuster, untouched = LogitAdjuster(sampling, prompt), LogitAdjuster(sampling, prompt)
    adjuster.edits(draft)
    adjuster.commit(output)
    untouched.commit(output)
    adjuster.edits(draft)
    assert same(adjuster.edits(), untouched.edits())


@given(SAMPLINGS, TOKENS, TOKENS)
def test_edits_are_sorted_one_a_token_and_read_only(sampling: Sampling, prompt: list[int], draft: list[int]) -> None:
    edits = LogitAdjuster(sampling, prompt).edits(draft)
    assert (edits.tokens.dtype, edits.changes.dtype, edits.banned.dtype) == (np.int64, np.float32, np.bool_)
    assert len(edits.tokens) == len(edits.changes) == len(edits.banned) == len(edits)
    assert np.all(np.diff(edits.tokens) > 0)
    assert not any(array.flags.writeable for array in (edits.tokens, edits.changes, edits.banned))


@given(TOKENS.filter(bool), TOKENS, st.sampled_from([0.5, 1.2, 3.0]))
def test_the_repetition_penalty_is_that_of_transformers(prompt: list[int], output: list[int], penalty: float) -> None:
    logits = np.linspace(-3, 3, VOCABULARY)
    adjuster = LogitAdjuster(Sampling(repetition_penalty=penalty), prompt)
    adjuster.commit(output)
    oracle = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + output]), torch.from_numpy(logits)[None].clone()
    )
    np.testing.assert_allclose(applied(adjuster.edits(), logits), oracle[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repetition_penalty": 2.0}, {1: Edit(divide=2), 2: Edit(divide=2)}),
        ({"frequency_penalty": 0.5}, {2: Edit(add=-1)}),
        ({"presence_penalty": 0.5}, {2: Edit(add=-0.5)}),
        ({"logit_bias": {3: 4.0}}, {3: Edit(bias=4)}),
        ({"logit_bias": {3: -math.inf}}, {3: BAN}),
        ({"banned_tokens": [2]}, {2: BAN}),
        ({"banned_tokens": [3], "logit_bias": {3: 4.0}}, {3: Edit(bias=4, banned=True)}),
        ({"bad_words": [[4]]}, {4: BAN}),
        ({"bad_words": [[1, 2, 2, 5], [2, 6], [1, 2, 7]]}, {5: BAN, 6: BAN}),
        ({"sequence_bias": [([2, 2, 3], 1.5), ([2, 3], 1.0), ([3], 0.25)]}, {3: Edit(bias=2.75)}),
        ({"no_repeat_ngram_size": 1}, {1: BAN, 2: BAN}),
        ({"no_repeat_ngram_size": 2}, {2: BAN}),
        ({"no_repeat_ngram_size": 9}, {}),
        ({"min_new_tokens": 3}, {8: BAN, 9: BAN}),
        ({"min_new_tokens": 2}, {}),
        ({"min_length": 4}, {8: BAN, 9: BAN}),
        ({"min_length": 3}, {}),
        ({"begin_suppress_tokens": [5]}, {}),
        ({"exponential_decay_length_penalty": (1, 3.0)}, {8: Edit(grow=2), 9: Edit(grow=2)}),
        ({"exponential_decay_length_penalty": (2, 3.0)}, {}),
        ({"ignore_eos": True, "min_new_tokens": 3}, {9: BAN}),
        ({}, {}),
    ],
)
def test_each_step_by_hand(options: dict[str, Any], expected: dict[int, Edit]) -> None:
    # The prompt is 1, the output 2 2; the model ends with 8, and the request also with 9.
    adjuster = LogitAdjuster(Sampling(stop_token_ids=[9], **options), [1], [8])
    adjuster.commit([2])
    assert same(adjuster.edits([2]), Edits.of(expected))


def test_what_begins_a_text_is_suppressed_at_its_first_token_alone() -> None:
    adjuster = LogitAdjuster(Sampling(begin_suppress_tokens=[5]), [1])
    assert same(adjuster.edits(), Edits.of({5: BAN}))
    assert same(adjuster.edits([2]), Edits.of({}))


def test_an_allowed_set_leaves_nothing_else_and_a_forced_token_stands_alone() -> None:
    sampling = Sampling(allowed_token_ids=[3, 1], banned_tokens=[1], forced_eos_token_ids=[7], forced_bos_token_id=5)
    adjuster = LogitAdjuster(sampling, [1], budget=3)
    logits = np.arange(VOCABULARY, dtype=np.float64)
    assert np.flatnonzero(np.isfinite(applied(adjuster.edits([2]), logits))).tolist() == [3]
    assert np.flatnonzero(np.isfinite(applied(adjuster.edits(), logits))).tolist() == [5]
    assert np.flatnonzero(np.isfinite(applied(adjuster.edits([2, 2]), logits))).tolist() == [7]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{"allowed_token_ids": [3]}, {"banned_tokens": [2]}, {"forced_bos_token_id": 4}])
def test_a_row_that_a_model_broke_stays_broken(options: dict[str, Any], broken: float) -> None:
    logits = np.zeros(VOCABULARY)
    logits[2] = broken
    assert not np.isfinite(applied(LogitAdjuster(Sampling(**options), [1]).edits(), logits).max())


@given(st.floats(-9, 9), st.sampled_from([1e-30, 1.0, 1e30]), st.sampled_from([-3e38, 0.0, 3e38]))
def test_no_edit_makes_a_finite_logit_infinite(value: float, penalty: float, bias: float) -> None:
    sampling = Sampling(repetition_penalty=penalty, logit_bias={1: bias}, presence_penalty=-bias)
    adjuster = LogitAdjuster(sampling, [1])
    assert np.isfinite(applied(adjuster.edits([1]), np.full(VOCABULARY, value))).all()
