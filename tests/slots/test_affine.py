"""Affine expressions print as they are read, mean what arithmetic means, and what is proved of them is true."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import PlanError
from slotwise.slots.affine import Affine, parse_affine, prove, variable

NAMES = ("a", "b", "len", "draft_capacity")
A, B, C = variable("a"), variable("b"), variable("c")


@st.composite
def affines(draw: st.DrawFn, names: tuple[str, ...] = NAMES, size: int = 9) -> Affine:
    number = st.integers(-size, size)
    total = Affine.of(draw(number))
    for name in names:
        total = total + variable(name) * draw(number)
    return total


@given(affines())
def test_parsing_reads_what_was_printed(expression: Affine) -> None:
    assert parse_affine(str(expression)) == expression


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (Affine(), "0"),
        (A - B, "a - b"),
        (1 - A, "-a + 1"),
        (2 * A - 3, "2 a - 3"),
        (variable("len") + variable("k") - 1, "len + k - 1"),
    ],
)
def test_it_prints_as_people_write(expression: Affine, text: str) -> None:
    assert str(expression) == text


@pytest.mark.parametrize("text", ["", "a b", "3 4", "a +", "+ a", "a * b", "2x", "b + a", "a - a", "1.5", "0 a", "²"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is no affine expression"):
        parse_affine(text)


@given(affines(), affines(), st.integers(-5, 5), st.tuples(*[st.integers(-100, 100)] * len(NAMES)))
def test_arithmetic_is_that_of_the_values(one: Affine, other: Affine, factor: int, point: tuple[int, ...]) -> None:
    values = dict(zip(NAMES, point, strict=True))
    x, y = one.evaluate(values), other.evaluate(values)
    assert x == sum(one.coefficient(name) * value for name, value in values.items()) + one.constant
    assert (one + other).evaluate(values) == x + y
    assert (one - other).evaluate(values) == x - y
    assert (one * factor).evaluate(values) == (factor * one).evaluate(values) == x * factor
    assert (factor - one).evaluate(values) == factor - x
    assert (-one).evaluate(values) == -x
    assert all(coefficient for _, coefficient in (one + other).terms)


@given(affines(), st.lists(st.tuples(*[st.integers(-100, 100)] * len(NAMES)), min_size=1, max_size=5))
def test_arrays_are_evaluated_element_by_element(expression: Affine, points: list[tuple[int, ...]]) -> None:
    arrays = dict(zip(NAMES, np.array(points).T, strict=True))
    expected = [expression.evaluate(dict(zip(NAMES, point, strict=True))) for point in points]
    assert np.broadcast_to(expression.evaluate(arrays), len(points)).tolist() == expected


def test_a_missing_value_is_named() -> None:
    with pytest.raises(PlanError, match="a - b cannot be evaluated: b has no value"):
        (A - B).evaluate({"a": 1})


POINTS = list(itertools.product(range(-4, 5), repeat=3))


@given(st.lists(affines(("a", "b", "c"), 3), max_size=4), affines(("a", "b", "c"), 3))
def test_what_is_proved_holds_at_every_integer_point(premises: list[Affine], goal: Affine) -> None:
    if prove(premises, goal):
        for point in POINTS:
            values = dict(zip("abc", point, strict=True))
            if all(premise.evaluate(values) >= 0 for premise in premises):
                assert goal.evaluate(values) >= 0, (
                    f"{goal} >= 0 was proved from {list(map(str, premises))}, not at {values}"
                )


@given(st.lists(affines(("a", "b", "c"), 3), min_size=1, max_size=4), st.data())
def test_sums_of_premises_are_proved(premises: list[Affine], data: st.DataObject) -> None:
    goal = Affine.of(data.draw(st.integers(0, 3)))
    for premise in premises:
        goal = goal + premise * data.draw(st.integers(0, 3))
    assert prove(premises, goal)


@pytest.mark.parametrize(
    ("premises", "goal"),
    [
        ([], Affine.of(0)),
        ([A - 1], A),
        ([A - B, B - C], A - C),
        ([A, B], A + B),
        ([2 * A - 1], A - 1),  # on integers: a >= 1/2 is a >= 1
        ([A - 3, 3 - A], 2 * A - 6),
        ([A - 1, -A], Affine.of(-1)),  # premises that no integers meet prove everything
    ],
)
def test_known_truths_are_proved(premises: list[Affine], goal: Affine) -> None:
    assert prove(premises, goal)


@pytest.mark.parametrize(("premises", "goal"), [([], A), ([A], A - 1), ([A + B], A), ([A - B], B - A)])
def test_known_falsehoods_are_not(premises: list[Affine], goal: Affine) -> None:
    assert not prove(premises, goal)
