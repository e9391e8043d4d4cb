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
from slotwise.engine.sampling.adjust import Edits, LogitAdjuster

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


def applied(edits: Edits, logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    adjusted = logits.copy()
    for token, divide, add in zip(edits.tokens, edits.divide, edits.add, strict=True):
        z = adjusted[token]
        adjusted[token] = (z / divide if z > 0 else z * divide) + add
    return adjusted


def by_definition(
    sampling: Sampling, prompt: Sequence[int], output: Sequence[int], logits: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    adjusted = logits.copy()
    for token in range(len(logits)):
        if token in prompt or token in output:
            penalty = sampling.repetition_penalty
            adjusted[token] = adjusted[token] / penalty if adjusted[token] > 0 else adjusted[token] * penalty
        adjusted[token] -= sampling.frequency_penalty * list(output).count(token)
        adjusted[token] -= sampling.presence_penalty * (token in output)
        adjusted[token] += sampling.logit_bias.get(token, 0.0)
        if token in sampling.banned_tokens:
            adjusted[token] = -math.inf
    return adjusted


def same(left: Edits, right: Edits) -> bool:
    return all(
        np.array_equal(a, b) and a.dtype == b.dtype
        for a, b in ((left.tokens, right.tokens), (left.divide, right.divide), (left.add, right.add))
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
    assert (edits.tokens.dtype, edits.divide.dtype, edits.add.dtype) == (np.int64, np.float32, np.float32)
    assert len(edits.tokens) == len(edits.divide) == len(edits.add) == len(edits)
    assert np.all(np.diff(edits.tokens) > 0)
    assert not any(array.flags.writeable for array in (edits.tokens, edits.divide, edits.add))


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
        ({"repetition_penalty": 2.0}, [(1, 2.0, 0.0), (2, 2.0, 0.0)]),
        ({"frequency_penalty": 0.5}, [(2, 1.0, -1.0)]),
        ({"presence_penalty": 0.5}, [(2, 1.0, -0.5)]),
        ({"logit_bias": {3: 4.0}}, [(3, 1.0, 4.0)]),
        ({"banned_tokens": [2]}, [(2, 1.0, -math.inf)]),
        ({"banned_tokens": [3], "logit_bias": {3: 4.0}}, [(3, 1.0, -math.inf)]),
        ({}, []),
    ],
)
def test_each_step_by_hand(options: dict[str, Any], expected: list[tuple[int, float, float]]) -> None:
    # The prompt is 1, the output 2 2.
    adjuster = LogitAdjuster(Sampling(**options), [1])
    adjuster.commit([2])
    edits = adjuster.edits([2])
    assert list(zip(edits.tokens.tolist(), edits.divide.tolist(), edits.add.tolist(), strict=True)) == expected
