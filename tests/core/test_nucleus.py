"""Where top-p ends, in whole numbers: how near they are to real ones, and that they fit in 64 bits."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.ops.nucleus import FRACTION, REACH, SHARE, SLACK, STEPS, UNIT, nucleus, wanted_mass, weights

FINITE = st.floats(-1e4, 1e4, width=32)
SHARES = st.floats(0, 1, width=32, exclude_max=True)


@given(distance=st.floats(0, 100, width=32))
def test_a_weight_is_the_exponential_to_a_few_millionths(distance: float) -> None:
    weight = int(weights(torch.tensor([0.0, -distance]))[1])
    real = math.exp(-distance) * 2**UNIT
    assert abs(weight - real) <= real * 2**-22.9 + 1
    assert (weight == 0) == (distance >= REACH or real < 1)


def test_products_fit_in_63_bits() -> None:
    longest = (int(REACH * STEPS) * math.ceil(math.log2(math.e) * 2**30)).bit_length()
    assert max(longest, 2 * FRACTION, UNIT + 22) <= 63
    assert (2 ** (UNIT + 22) >> SHARE) * 2**SHARE < 2**63


@given(total=st.integers(0, 2**62), p=SHARES)
def test_the_wanted_mass_is_p_of_the_whole_less_the_slack(total: int, p: float) -> None:
    share = Fraction(math.floor(Fraction(p) * 2**SHARE) - SLACK, 2**SHARE)
    assert wanted_mass(total, p) == max(1, math.floor(total * share))


@given(scores=st.lists(FINITE | st.just(-math.inf), min_size=1, max_size=20), p=SHARES, data=st.data())
def test_which_scores_are_kept_does_not_depend_on_where_they_stand(
    scores: list[float], p: float, data: st.DataObject
) -> None:
    row = torch.tensor(scores)
    moved = row[data.draw(st.permutations(range(len(scores))))]
    assert row[nucleus(row, p)].sort().values.tolist() == moved[nucleus(moved, p)].sort().values.tolist()


@given(scores=st.lists(FINITE, min_size=1, max_size=20), p=SHARES, q=SHARES)
def test_a_greater_p_keeps_all_that_a_smaller_one_keeps(scores: list[float], p: float, q: float) -> None:
    row = torch.tensor(scores)
    less, more = nucleus(row, min(p, q)), nucleus(row, max(p, q))
    assert bool(less[row.argmax()])
    assert not bool((less & ~more).any())
