"""What the width policy promises: the best width for the acceptance seen, and a way back from none."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import OptionError
from slotwise.engine.width import RATE_STEPS, WidthPolicy


def speed(p: Fraction, k: int, cost_ratio: float, row_cost: float) -> Fraction:
    expected = Fraction(k + 1) if p == 1 else (1 - p ** (k + 1)) / (1 - p)
    return expected / (1 + Fraction(cost_ratio) * k + Fraction(row_cost) * k)


@given(st.integers(0, 8), st.floats(0, 2), st.sampled_from([0.0, 0.02, 0.3]))
def test_the_table_is_the_best_by_brute_force(max_width: int, cost_ratio: float, row_cost: float) -> None:
    policy = WidthPolicy(max_width=max_width, cost_ratio=cost_ratio, row_cost=row_cost)
    assert policy.table.shape == (RATE_STEPS + 1,)
    for step, width in enumerate(policy.table.tolist()):
        speeds = [speed(Fraction(step, RATE_STEPS), k, cost_ratio, row_cost) for k in range(max_width + 1)]
        # Equal up to rounding: near-ties may fall either way.
        assert speeds[width] >= max(speeds) * (1 - Fraction(1, 10**12))


def test_of_equals_the_smallest_width_is_taken() -> None:
    assert WidthPolicy(max_width=5, cost_ratio=0.0).table[0] == 0
    assert WidthPolicy(max_width=5, cost_ratio=1.0).table[RATE_STEPS] == 0


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(0, 100))
def test_widths_are_within_bounds_and_alike_alone_and_in_a_batch(rates: list[float], step: int) -> None:
    policy = WidthPolicy(max_width=6, cost_ratio=0.2)
    widths = policy.widths(np.array(rates), step)
    assert widths.dtype == np.int64
    assert np.all((widths >= 0) & (widths <= 6))
    assert widths.tolist() == [int(policy.widths(np.array([rate]), step)[0]) for rate in rates]


@given(st.floats(0, 1), st.integers(1, 8), st.data())
def test_an_update_is_the_definition(rate: float, drafted: int, data: st.DataObject) -> None:
    accepted = data.draw(st.integers(0, drafted))
    policy = WidthPolicy(max_width=8, cost_ratio=0.1)
    outcomes = [1] * accepted + [0] * (accepted < drafted)
    kept = policy.memory ** len(outcomes)
    expected = kept * rate + (1 - kept) * sum(outcomes) / len(outcomes)
    (updated,) = policy.update(np.array([rate]), np.array([drafted]), np.array([accepted]))
    assert updated == pytest.approx(expected, abs=1e-12)
    assert 0 <= updated <= 1 + 1e-12


def test_an_update_treats_each_sequence_by_itself_and_a_step_without_drafts_shows_nothing() -> None:
    policy = WidthPolicy(max_width=4, cost_ratio=0.1)
    before = np.array([0.5, 0.5, 0.5, 0.5])
    after = policy.update(before, np.array([0, 4, 4, 4]), np.array([0, 4, 0, 3]))
    assert after[0] == 0.5
    assert after[2] < 0.5 < after[3] < after[1]
    assert before.tolist() == [0.5] * 4


def test_a_sequence_at_width_0_probes_and_recovers() -> None:
    policy = WidthPolicy(max_width=4, cost_ratio=0.2)
    rate = np.array([0.0])
    widths = []
    for step in range(1000):
        drafted = policy.widths(rate, step)
        rate = policy.update(rate, drafted, drafted)
        widths.append(int(drafted[0]))
    assert widths[:17] == [1] + [0] * 15 + [1]
    assert widths[-1] == 4


def test_a_sequence_that_drafts_anyway_does_not_probe() -> None:
    policy = WidthPolicy(max_width=4, cost_ratio=0.2)
    assert policy.widths(np.array([0.0, 1.0]), 0).tolist() == [1, 4]


def test_each_sequence_probes_by_its_own_count_of_steps() -> None:
    policy = WidthPolicy(max_width=4, cost_ratio=0.2, probe_every=3)
    assert policy.widths(np.zeros(5), np.array([0, 1, 2, 3, 4])).tolist() == [1, 0, 0, 1, 0]


def test_where_drafting_can_never_pay_nothing_is_probed() -> None:
    for policy in (WidthPolicy(max_width=4, cost_ratio=1.5), WidthPolicy(max_width=0, cost_ratio=0.1)):
        assert policy.widths(np.array([0.0, 1.0]), 0).tolist() == [0, 0]


@pytest.mark.parametrize("acceptance", [0.05, 0.3, 0.6, 0.8, 0.9, 0.97])
def test_it_converges_to_within_one_of_the_optimum(acceptance: float) -> None:
    policy = WidthPolicy(max_width=6, cost_ratio=0.15)
    rng = np.random.default_rng(7)
    sequences, steps = 64, 600
    rate = np.full(sequences, policy.start_rate)
    chosen = []
    for step in range(steps):
        drafted = policy.widths(rate, step)
        wins = rng.random((sequences, policy.max_width)) < acceptance
        accepted = np.minimum(np.cumprod(wins, axis=1).sum(axis=1), drafted)
        rate = policy.update(rate, drafted, accepted)
        chosen.append(drafted)
    settled = np.median(np.array(chosen[steps // 2 :]))
    best = policy.table[round(acceptance * RATE_STEPS)]
    assert abs(settled - best) <= 1
    # An average of what is seen tells the rate itself.
    assert rate.mean() == pytest.approx(acceptance, abs=0.06)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_width", -1),
        ("cost_ratio", -0.1),
        ("cost_ratio", math.nan),
        ("row_cost", math.inf),
        ("memory", 1.0),
        ("memory", -0.1),
        ("start_rate", 1.1),
        ("start_rate", math.nan),
        ("probe_every", 0),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name}: expected .*found"):
        WidthPolicy(**{"max_width": 4, "cost_ratio": 0.1, name: value})
