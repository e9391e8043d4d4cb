"""What rounds come to: medians, ratios within a round, and whether results may be believed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sidebyside.guard import EXACT_LIMIT, REFERENCE, judge, logits_error
from sidebyside.rounds import Samples, Spread, rotated
from sidebyside.work import BATCH, BATCH_PROMPT, DECODE, DECODE_BATCH, PROMPT, WORKS, Pace

RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(5, 40)).astype(np.float32)


@given(st.lists(st.integers(), unique=True, min_size=1), st.integers(0, 100))
def test_every_engine_has_a_turn_in_every_round_and_the_first_changes(items, by):
    order = rotated(items, by)
    assert sorted(order) == sorted(items)
    assert order[0] == items[by % len(items)]


@given(st.lists(st.floats(0.1, 1e6), min_size=1))
def test_a_spread_lies_within_its_values(values):
    spread = Spread.of(values)
    assert spread.least == min(values) <= spread.median <= max(values) == spread.most
    assert spread.count == len(values)


def test_a_ratio_compares_what_was_measured_in_the_same_round():
    samples = Samples()
    for turn, speed in enumerate((100.0, 10.0, 50.0)):  # a machine that slows down tenfold for a round
        samples.add("a", "decode", turn, 2 * speed)
        samples.add("b", "decode", turn, speed)
    samples.add("a", "decode", 3, 1e9)  # a round that b failed in
    ratio = samples.ratio("a", "b", "decode")
    assert ratio == Spread(2.0, 2.0, 2.0, 3)
    assert samples.ratio("a", "c", "decode") is None


def test_no_values_have_no_spread():
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_a_turn_takes_about_its_share_of_time_whatever_the_engine():
    assert Pace(prefill=100, decode=10).steps(DECODE, 2.0) == 20
    assert Pace(prefill=100, decode=10).steps(DECODE_BATCH, 2.0) == 10
    assert Pace(prefill=100, decode=0.01).steps(DECODE, 2.0) == 4
    assert Pace(prefill=100, decode=1e6).steps(DECODE, 2.0) == 128


def test_work_gives_the_rates_it_names_and_asks_all_engines_the_same():
    asked = []

    def ask(method, *arguments):
        asked.append((method, arguments))
        return (0.5, 2.0) if method == "decode" else 4.0

    pace = Pace(prefill=100, decode=8)
    for work in WORKS:
        rates = work.run(ask, 1000, 1, pace, 2.0)
        assert set(rates) == set(work.names)
        first, asked[:] = list(asked), []
        assert work.run(ask, 1000, 1, pace, 2.0) == rates
        assert asked == first
        asked.clear()
    assert WORKS[0].run(ask, 1000, 0, pace, 2.0) == {f"prefill {PROMPT}": PROMPT / 0.5, DECODE: 16 / 2.0}
    assert WORKS[2].run(ask, 1000, 0, pace, 2.0) == {DECODE_BATCH: BATCH * 8 / 4.0}
    assert pace.cached_tokens(DECODE_BATCH, 2.0) == BATCH * (BATCH_PROMPT + 4)


def test_logits_that_differ_by_a_constant_are_the_same_distribution():
    assert logits_error(LOGITS + 3, LOGITS) < 1e-12
    assert logits_error(np.roll(LOGITS, 1, axis=1), LOGITS) > 0.5


def test_an_engine_is_judged_by_what_comparable_arithmetic_does():
    def off_by(error):
        return LOGITS * np.float32(1 + error)

    logits = {
        REFERENCE: LOGITS,
        "transformers bf16": off_by(1e-3),
        "slotwise float32": off_by(1e-7),
        "slotwise bf16": off_by(1.3e-3),
        "llama.cpp bf16": off_by(1e-2),
    }
    findings = judge(logits)
    assert findings["slotwise float32"].error < EXACT_LIMIT
    assert {name for name, finding in findings.items() if finding.is_wrong} == {"llama.cpp bf16"}
    assert findings["transformers bf16"].limit is None


def test_logits_that_are_no_numbers_are_wrong():
    findings = judge({REFERENCE: LOGITS, "transformers bf16": np.full_like(LOGITS, np.nan)})
    assert findings["transformers bf16"].is_wrong


def test_without_the_reference_nothing_is_judged():
    assert judge({"slotwise bf16": LOGITS}) == {}
