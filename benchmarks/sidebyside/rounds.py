"""Who is timed when, and what the times come to.

Owns `Samples` and the order of turns. What always holds: within a round every engine does one kind of work before any
does the next, in an order that rotates from round to round; so a machine that slows down for a while slows all of them.
Figures are medians over rounds, ratios medians of the rounds' own ratios.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


def rotated(items: Sequence[_T], by: int) -> list[_T]:
    """`items` from place `by` on, then those before it."""
    if not items:
        return []
    start = by % len(items)
    return [*items[start:], *items[:start]]


@dataclass(frozen=True, slots=True)
class Spread:
    """What several rounds gave."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError for no values."""
        found = sorted(values)
        if not found:
            raise ValueError("a spread needs at least one value")
        return cls(statistics.median(found), found[0], found[-1], len(found))

    def __str__(self) -> str:
        digits = 0 if self.median >= 100 else 1 if self.median >= 10 else 2
        if self.count == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.least:.{digits}f} to {self.most:.{digits}f})"


class Samples:
    """Values by (who, what) and round; a turn that failed leaves its round out."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)

    def add(self, who: str, what: str, turn: int, value: float) -> None:
        """The value of one turn."""
        self._values[who, what][turn] = value

    def values(self, who: str, what: str) -> dict[int, float]:
        """Values by round; empty where there are none."""
        return dict(self._values.get((who, what), {}))

    def spread(self, who: str, what: str) -> Spread | None:
        """Over all rounds; None where there are no values."""
        found = self.values(who, what)
        return Spread.of(found.values()) if found else None

    def ratio(self, who: str, other: str, what: str, other_what: str | None = None) -> Spread | None:
        """`who` over `other`, round by round; None where no round has both."""
        mine, theirs = self.values(who, what), self.values(other, other_what or what)
        both = [mine[turn] / theirs[turn] for turn in mine.keys() & theirs.keys()]
        return Spread.of(both) if both else None

    def as_json(self) -> dict[str, dict[str, list[float]]]:
        """who -> what -> values in order of rounds."""
        found: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for (who, what), values in self._values.items():
            found[who][what] = [values[turn] for turn in sorted(values)]
        return dict(found)
