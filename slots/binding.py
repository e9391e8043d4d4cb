"""A step with its numbers bound.

Owns `WidthFormula`, `Reach`, `BoundSpan`, `Binding` and `bind_decode` / `bind_prefill`. What always holds: a binding is
complete and frozen when it is made (its arrays are read-only), its spans and widths are the plan's expressions
evaluated, nothing else; it carries the epoch of its step, and results of another epoch are not accepted for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import PlanError
from slotwise.slots.affine import Affine
from slotwise.slots.step import DRAFT, TARGET, Span, Step

Ints = npt.NDArray[np.int64]


class WidthFormula:
    """`k = max(0, min(limits))` with the plan's constants filled in, ready for arrays.

    Limits that differ only in their constant become one: the least decides.
    """

    def __init__(self, step: Step, constants: Mapping[str, int]) -> None:
        bounds: dict[tuple[tuple[str, int], ...], int] = {}
        for limit in step.limits:
            fixed = sum(c * constants[name] for name, c in limit.bound.terms if name in constants)
            terms = tuple((name, c) for name, c in limit.bound.terms if name not in constants)
            constant = fixed + limit.bound.constant
            bounds[terms] = min(constant, bounds.get(terms, constant))
        self.constants = dict(constants)
        self.bounds = tuple(Affine(terms, constant) for terms, constant in bounds.items())

    def widths(self, values: Mapping[str, Any]) -> Ints:
        """The draft width of each sequence; `values` are arrays over sequences (or integers)."""
        width: Any = None
        for bound in self.bounds:
            value = bound.evaluate(values)
            width = value if width is None else np.minimum(width, value)
        found: Ints = np.maximum(width, 0)
        return found


class Reach:
    """How far a step reserves in one role: the end of its span, an expression of the plan."""

    def __init__(self, step: Step, role: str) -> None:
        span = step.span("reserve", role)
        if span is None:
            raise PlanError(f"step {step.name} reserves nothing in role {role!r}")
        self._end = span.end

    def __call__(self, length: Ints, width: Ints | int) -> Ints:
        """The end for sequences of `length` tokens that draft `width`."""
        found: Ints = self._end.evaluate({"len": length, "k": width})
        return found


@dataclass(frozen=True, slots=True)
class BoundSpan:
    """Slots `begin[i] .. end[i]` of lane `lanes[i]`, all of one role; arrays are read-only int64[n]."""

    role: str
    lanes: Ints
    begin: Ints
    end: Ints

    @property
    def rows(self) -> int:
        """Slots in all lanes together."""
        return int((self.end - self.begin).sum())

    def at(self, places: Ints | slice) -> BoundSpan:
        """The spans of some of the lanes: those at `places`."""
        return BoundSpan(self.role, self.lanes[places], self.begin[places], self.end[places])


@dataclass(frozen=True, slots=True)
class Binding:
    """One executed step: which sequences, how long, how wide, and the spans they write.

    `sequences` are request ids, `lanes` their places in the ledger, `length` the tokens each knows, `width` its drafts;
    `spans` are what the step reserves, by role. `known` is what the width formula was given, by variable: integers, or
    arrays over the sequences; empty where there is no width.
    """

    step: Step
    epoch: int
    sequences: tuple[int, ...]
    lanes: Ints
    length: Ints
    width: Ints
    spans: tuple[BoundSpan, ...]
    known: Mapping[str, Any] = field(default_factory=dict)

    def span(self, role: str) -> BoundSpan | None:
        """The span of `role`, or None when this step touches none of its slots."""
        for span in self.spans:
            if span.role == role:
                return span
        return None

    def reserved(self, role: str) -> BoundSpan:
        """The span of `role`; raises KeyError when this step touches none of its slots."""
        span = self.span(role)
        if span is None:
            raise KeyError(role)
        return span


def frozen(array: Any) -> Ints:
    """A read-only int64 copy of `array`: the caller keeps its own."""
    result: Ints = np.array(array, dtype=np.int64)
    result.setflags(write=False)
    return result


def bind_decode(
    step: Step,
    epoch: int,
    sequences: Sequence[int],
    lanes: Ints,
    length: Ints,
    width: Ints,
    filled: Ints | None,
    known: Mapping[str, Any] | None = None,
) -> Binding:
    """Bind a decode step; `filled` is the draft role's committed marks, None without a draft model.

    `known` is what the widths were computed from, to be printed with them.
    """
    lanes, length, width = frozen(lanes), frozen(length), frozen(width)
    spans = []
    target = step.span("reserve", TARGET)
    if target is not None:
        spans.append(_bound(target, lanes, {"len": length, "k": width}))
    draft = step.span("reserve", DRAFT)
    if draft is not None and filled is not None and np.count_nonzero(width):
        chosen = np.flatnonzero(width)
        some = {"len": length[chosen], "k": width[chosen], "filled": filled[chosen]}
        spans.append(_bound(draft, frozen(lanes[chosen]), some))
    return Binding(step, epoch, tuple(sequences), lanes, length, width, tuple(spans), known or {})


def bind_prefill(
    step: Step, epoch: int, sequence: int, role: str, lane: int, known: int, begin: int, chunk: int
) -> Binding:
    """Bind a prefill step of one sequence: `chunk` rows from position `begin` of `known` tokens."""
    reserve = step.span("reserve", role)
    lanes = frozen([lane])
    values = {"begin": frozen([begin]), "chunk": frozen([chunk])}
    spans = () if reserve is None else (_bound(reserve, lanes, values),)
    return Binding(step, epoch, (sequence,), lanes, frozen([known]), frozen([0]), spans)


def _bound(span: Span, lanes: Ints, values: Mapping[str, Ints]) -> BoundSpan:
    """`span` with its expressions evaluated; `lanes` are read-only already."""
    begin, end = span.begin.evaluate(values), span.end.evaluate(values)
    begin.setflags(write=False)
    end.setflags(write=False)
    return BoundSpan(span.role, lanes, begin, end)
