"""Affine integer expressions and a prover for them.

Owns `Affine` and `prove`. What always holds: an expression is a sum of integer multiples of named variables and a
constant; it prints as people write it, evaluates on integers and on numpy arrays alike, and `prove` answers True only
when the goal holds for all integers that meet the premises.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

from slotwise.core.errors import PlanError


@dataclass(frozen=True, slots=True)
class Affine:
    """`sum(coefficient * variable) + constant`; terms are sorted by name and have no zero coefficient."""

    terms: tuple[tuple[str, int], ...] = ()
    constant: int = 0

    @staticmethod
    def of(value: Affine | int) -> Affine:
        """`value` itself, or the constant it is."""
        return value if isinstance(value, Affine) else Affine((), value)

    def __add__(self, other: Affine | int) -> Affine:
        right = Affine.of(other)
        sums = dict(self.terms)
        for name, coefficient in right.terms:
            sums[name] = sums.get(name, 0) + coefficient
        terms = tuple(sorted((name, c) for name, c in sums.items() if c))
        return Affine(terms, self.constant + right.constant)

    __radd__ = __add__

    def __neg__(self) -> Affine:
        return self * -1

    def __sub__(self, other: Affine | int) -> Affine:
        return self + Affine.of(other) * -1

    def __rsub__(self, other: Affine | int) -> Affine:
        return Affine.of(other) - self

    def __mul__(self, factor: int) -> Affine:
        return Affine(tuple((n, c * factor) for n, c in self.terms) if factor else (), self.constant * factor)

    __rmul__ = __mul__

    def coefficient(self, name: str) -> int:
        """The coefficient of `name`, 0 when it does not occur."""
        return dict(self.terms).get(name, 0)

    def evaluate(self, values: Mapping[str, Any]) -> Any:
        """The value under `values` (integers or integer arrays that broadcast); raises PlanError for a missing name."""
        total: Any = self.constant
        for name, coefficient in self.terms:
            if name not in values:
                raise PlanError(f"{self} cannot be evaluated: {name} has no value; given are {sorted(values)}")
            term = values[name]
            total = total + (term if coefficient == 1 else term * coefficient)
        return total

    def __str__(self) -> str:
        parts: list[str] = []
        for name, coefficient in sorted(self.terms, key=lambda term: (term[1] < 0, -len(term[0]))):
            sign = "-" if coefficient < 0 else "+"
            size = "" if abs(coefficient) == 1 else f"{abs(coefficient)} "
            parts.append(f"{sign} {size}{name}" if parts else f"{'-' if sign == '-' else ''}{size}{name}")
        if self.constant or not parts:
            sign = "-" if self.constant < 0 else "+"
            parts.append(f"{sign} {abs(self.constant)}" if parts else str(self.constant))
        return " ".join(parts)


def variable(name: str) -> Affine:
    """The expression that is just `name`."""
    return Affine(((name, 1),), 0)


def parse_affine(text: str) -> Affine:
    """Read what `str(Affine)` printed; raises PlanError when it is not such text."""
    tokens = text.replace("-", " - ").replace("+", " + ").split()
    total, sign, factor, pending = Affine(), 1, 1, False
    for token in tokens:
        if token in "+-":
            if pending:
                total, factor, pending = total + sign * factor, 1, False
            sign = -1 if token == "-" else 1
        elif token.isascii() and token.isdigit():
            if pending:
                raise PlanError(f"{text!r} is no affine expression: two numbers in a row")
            factor, pending = int(token), True
        elif token.isascii() and token.isidentifier():
            total, factor, pending = total + variable(token) * (sign * factor), 1, False
            sign = 1
        else:
            raise PlanError(f"{text!r} is no affine expression: {token!r} is neither a name nor a number")
    total = total + sign * factor if pending else total
    if str(total) != text:
        raise PlanError(f"{text!r} is no affine expression as they are printed; it would read {str(total)!r}")
    return total


def prove(premises: Iterable[Affine], goal: Affine) -> bool:
    """Whether `goal >= 0` follows from `p >= 0` for every p in `premises`, for all integers.

    By Fourier-Motzkin elimination: premises together with the negated goal (`-goal - 1 >= 0`) are shown to have no
    rational, hence no integer, solution. Sound; complete over the rationals; doubly exponential in the worst case,
    which a step's handful of variables never comes near.
    """
    rows = {_normal(p) for p in premises} | {_normal(-goal - 1)}
    names = {name for row in rows for name, _ in row.terms}
    while names:
        # The variable with the fewest products is cheapest to eliminate.
        name = min(sorted(names), key=lambda n: _products(rows, n))
        lower = [row for row in rows if row.coefficient(name) > 0]
        upper = [row for row in rows if row.coefficient(name) < 0]
        kept = {row for row in rows if row.coefficient(name) == 0}
        for low in lower:
            for high in upper:
                kept.add(_normal(low * -high.coefficient(name) + high * low.coefficient(name)))
        rows = kept
        names.discard(name)
    return any(row.constant < 0 for row in rows)


def _products(rows: set[Affine], name: str) -> int:
    signs = [row.coefficient(name) for row in rows]
    return sum(c > 0 for c in signs) * sum(c < 0 for c in signs)


def _normal(row: Affine) -> Affine:
    """Divide by the greatest common divisor of the coefficients, rounding the constant down (exact on integers)."""
    divisor = gcd(*(c for _, c in row.terms)) if row.terms else 0
    if divisor <= 1:
        return row
    return Affine(tuple((n, c // divisor) for n, c in row.terms), row.constant // divisor)
