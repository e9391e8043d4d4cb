"""What ULPs and the cosine say of two tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.proving.measures import cosine, ulps_between

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS)
@given(value=st.floats(-1000, 1000), steps=st.integers(0, 40))
def test_ulps_count_the_representable_numbers_between(dtype: torch.dtype, value: float, steps: int) -> None:
    start = torch.tensor([value], dtype=torch.float64).to(dtype)
    word = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    other = start.clone()
    for _ in range(steps):  # one representable number up, by its bits
        bits = other.view(word)
        other = torch.where(other == 0, torch.ones_like(bits), torch.where(other > 0, bits + 1, bits - 1)).view(dtype)
    assert int(ulps_between(other, start)) == steps
    assert int(ulps_between(start, other)) == steps


def test_the_oracle_is_rounded_before_ulps_are_counted() -> None:
    want = torch.tensor([1.0 + 2**-30], dtype=torch.float64)
    assert int(ulps_between(torch.tensor([1.0]), want)) == 0
    assert int(ulps_between(torch.tensor([1.0 + 2**-23]), want)) == 1


def test_signed_zeros_infinities_and_nan_are_as_documented() -> None:
    got = torch.tensor([0.0, math.inf, math.nan, math.nan, 1.0])
    want = torch.tensor([-0.0, math.inf, math.nan, 1.0, math.nan])
    assert ulps_between(got, want).tolist() == [0, 0, 0, 2**62, 2**62]


def test_integers_count_by_ones() -> None:
    assert ulps_between(torch.tensor([3, -2]), torch.tensor([5, -2])).tolist() == [2, 0]


def test_the_cosine_sees_direction_alone() -> None:
    vector = torch.tensor([3.0, -4.0, 0.5])
    assert cosine(vector * 7, vector) == pytest.approx(1)
    assert cosine(-vector, vector) == pytest.approx(-1)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0
    assert cosine(torch.tensor([1.0, math.inf]), torch.tensor([2.0, math.inf])) == 1
    assert (cosine(torch.zeros(2), torch.zeros(2)), cosine(torch.zeros(2), torch.ones(2))) == (1, 0)
