"""What is said to fit does, one page more does not, and more memory never holds less."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotwise.core.errors import PlanError
from slotwise.core.model import ModelSpec
from slotwise.plans.compile import compile_plan
from slotwise.plans.fit import Subject, _last_within, fit, survey
from slotwise.plans.memory import Budget, need_of
from slotwise.plans.options import WEIGHTS, PlanOptions

from .conftest import _tiny_model

QUICK = settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def _subject(layers: int, max_positions: int, draft: str) -> Subject:
    model = functools.partial(_tiny_model, max_positions=max_positions, hidden=32, inner=32)
    drafts: dict[str, ModelSpec | str | None] = {"none": None, "ngram": "ngram", "model": model("draft", layers=1)}
    return Subject(model(layers=layers), drafts[draft])


@st.composite
def subjects(draw: st.DrawFn) -> tuple[Subject, PlanOptions]:
    """A small model with or without a drafter, and options that leave capacity open."""
    subject = _subject(
        draw(st.integers(1, 2)), draw(st.integers(5, 90)), draw(st.sampled_from(("none", "ngram", "model")))
    )
    options = PlanOptions(
        page_size=draw(st.integers(1, 7)),
        max_sequences=draw(st.integers(1, 5)),
        decode_rows=8,
        speculate=draw(st.integers(1, 3)),
        prefill_chunk=draw(st.integers(4, 40)),
    )
    return subject, options


def _peak(subject: Subject, options: PlanOptions, **changes: Any) -> int:
    changed = options.with_changes(**changes)
    return need_of(compile_plan(subject.target, draft=subject.draft, options=changed)).peak


def _between(subject: Subject, options: PlanOptions, share: float) -> Budget:
    """A budget between what the smallest and the largest capacity take."""
    low = _peak(subject, options, capacity=min(options.page_size, subject.target.max_positions))
    high = _peak(subject, options, capacity=subject.target.max_positions)
    return Budget(int(low + share * (high - low)), "memory is")


@QUICK
@given(subjects(), st.floats(0, 1))
def test_the_capacity_that_is_said_to_fit_is_accepted_and_a_page_more_is_not(
    drawn: tuple[Subject, PlanOptions], share: float
) -> None:
    subject, options = drawn
    budget = _between(subject, options, share)
    plan = fit(subject, options, budget)
    capacity = plan.options.capacity
    assert need_of(plan).peak <= budget.nbytes
    assert plan == compile_plan(subject.target, draft=subject.draft, options=plan.options)
    assert fit(subject, options.with_changes(capacity=capacity), budget) == plan
    assert capacity == subject.target.max_positions or capacity % options.page_size == 0
    if capacity < subject.target.max_positions:
        more = min(capacity + options.page_size, subject.target.max_positions)
        each = -(-more // options.page_size)
        assert _peak(subject, options, capacity=more) > budget.nbytes
        with pytest.raises(PlanError, match=r"what fits: capacity=|no capacity"):
            fit(subject, options.with_changes(capacity=more, pages=each * options.max_sequences), budget)


@QUICK
@given(subjects(), st.floats(0, 1), st.floats(0, 1))
def test_more_memory_never_holds_less(drawn: tuple[Subject, PlanOptions], one: float, other: float) -> None:
    subject, options = drawn
    less, more = (fit(subject, options, _between(subject, options, share)) for share in sorted((one, other)))
    assert less.options.capacity <= more.options.capacity
    assert less.target.pages <= more.target.pages


@QUICK
@given(subjects(), st.floats(0, 1))
def test_a_capacity_without_pages_gets_the_largest_pool_that_fits(
    drawn: tuple[Subject, PlanOptions], share: float
) -> None:
    subject, options = drawn
    asked = options.with_changes(capacity=subject.target.max_positions)
    each = -(-asked.capacity // asked.page_size)
    full = each * asked.max_sequences
    low, high = (_peak(subject, asked, pages=pages) for pages in (each, full))
    budget = Budget(int(low + share * (high - low)), "memory is")
    plan = fit(subject, asked, budget)
    assert need_of(plan).peak <= budget.nbytes
    assert plan.options.capacity == asked.capacity
    assert each <= plan.options.pages <= full
    if plan.options.pages < full:
        assert _peak(subject, asked, pages=plan.options.pages + 1) > budget.nbytes
    with pytest.raises(PlanError, match=r"in .* pages"):
        fit(subject, asked, Budget(low - 1, "memory is"))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=40), st.integers(0, 100), st.integers(0, 50))
def test_a_search_finds_the_last_that_is_within_whatever_the_steps(steps: list[int], budget: int, guess: int) -> None:
    amounts = [sum(steps[: n + 1]) for n in range(len(steps))]
    expected = max((n for n, amount in enumerate(amounts) if amount <= budget), default=None)
    for first in (None, guess):
        assert _last_within(amounts.__getitem__, 0, len(amounts) - 1, budget, first) == expected


def test_a_refusal_names_what_fits_and_each_does() -> None:
    subject = _subject(2, 64, "none")
    options = PlanOptions(page_size=4, max_sequences=4, decode_rows=8, prefill_chunk=8)
    asked = options.with_changes(capacity=64, pages=64)
    budget = Budget(_peak(subject, asked) * 3 // 4, "memory is")
    with pytest.raises(PlanError) as caught:
        fit(subject, asked, budget)
    advice = str(caught.value).partition("what fits: ")[2]
    named = dict(part.partition(" ")[0].partition("=")[::2] for part in advice.split("; or "))
    assert list(named) == ["capacity", "pages", "max_sequences", "weights"]
    for name, by, kept in (
        ("capacity", 4, options),
        ("max_sequences", 1, asked.with_changes(pages=0)),
        ("pages", 1, asked),
    ):
        fitting, beyond = (_peak(subject, kept, **{name: int(named[name]) + more}) for more in (0, by))
        assert fitting <= budget.nbytes < beyond
    assert _peak(subject, asked, weights=named["weights"].strip("'")) <= budget.nbytes


def test_a_survey_has_a_row_for_every_form_of_weights_and_says_which_there_cannot_be() -> None:
    options = PlanOptions(page_size=4, max_sequences=2, decode_rows=8, prefill_chunk=8)
    subject = _subject(1, 40, "none")
    budget = _between(subject, options, 0.5)
    rows = survey(subject, options, budget)
    assert [row.weights for row in rows] == list(WEIGHTS)
    for row in rows:
        asked = options.with_changes(weights=row.weights)
        assert row.plan is not None
        try:
            assert row.plan == fit(subject, asked, budget)
            assert (row.fits, row.capacity) == (True, row.plan.options.capacity)
        except PlanError:
            assert (row.fits, row.capacity, row.plan.options.capacity) == (False, 0, 4)
    odd = Subject(_tiny_model(hidden=24))
    native, *others = survey(odd, options, budget)
    assert native.plan is not None
    assert all(row.plan is None and "quantises weights whose columns" in row.refused for row in others)


def test_a_survey_of_a_capacity_shows_that_plan_and_the_pool_that_fits() -> None:
    options = PlanOptions(page_size=4, max_sequences=3, decode_rows=8, prefill_chunk=8, capacity=40)
    subject = _subject(1, 40, "none")
    low, high = (_peak(subject, options, pages=pages) for pages in (10, 30))
    (row,) = survey(subject, options, Budget((low + high) // 2, "memory is"), ("native",))
    assert row.plan is not None
    assert (row.plan.options.capacity, row.plan.options.pages, row.fits) == (40, 30, False)
    assert 10 < row.pages < 30
    assert 0 < row.capacity < 40
