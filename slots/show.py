"""The text form of a bound step: what it did to slots, sequence by sequence.

What always holds: it prints the binding's own numbers and evaluates the step's own expressions, so what people read is
what was verified and run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from slotwise.slots.binding import Binding
from slotwise.slots.step import DRAFT, TARGET

BEYOND = 2**32
"""A limit above this is no limit: it is left out of the text."""


def show_binding(binding: Binding, kept: Mapping[int, int] | None = None) -> str:
    """The step as people read it, one block a sequence; `kept` is how many tokens each lane kept, once known."""
    return "\n".join(_block(binding, place, kept or {}) for place in range(len(binding.sequences)))


def _block(binding: Binding, place: int, kept: Mapping[int, int]) -> str:
    lane, length, width = (int(array[place]) for array in (binding.lanes, binding.length, binding.width))
    spans = {span.role: bounds for span in binding.spans if (bounds := _bounds(span, lane)) is not None}
    written = " ".join(f"{role}[{begin}..{end})" for role, (begin, end) in spans.items())
    head = f"step {binding.epoch} {binding.step.name}  seq={binding.sequences[place]} lane={lane} len={length}"
    if not binding.step.limits:
        ops = [f"reserve {written}", f"prefill {written}", f"commit  {written}"]
    else:
        ops = [f"reserve {written}  # {_width(binding, place, width)}"]
        if width:
            span = f"draft[{spans[DRAFT][0]}..{spans[DRAFT][1]}) " if DRAFT in spans else ""
            ops.append(f"draft   {span}-> {_count(width, 'token')}")
        begin, end = spans[TARGET]
        ops.append(f"verify  target[{begin}..{end}) rows={end - begin}")
        if lane in kept:
            ops += _outcome(binding, spans, length, width, kept[lane])
    return "\n".join([head, *(f"  %{n} = {op}" for n, op in enumerate(ops))])


def _bounds(span: Any, lane: int) -> tuple[int, int] | None:
    at = np.flatnonzero(span.lanes == lane)
    return (int(span.begin[at[0]]), int(span.end[at[0]])) if at.size else None


def _width(binding: Binding, place: int, width: int) -> str:
    """`k = min(speculate 5, target room 3, ...) = 3`, as far as the numbers are known."""
    if not binding.known:
        return f"k = {width}"
    values = {name: value if np.isscalar(value) else int(value[place]) for name, value in binding.known.items()}
    bounds = {limit.name: int(limit.bound.evaluate(values)) for limit in binding.step.limits}
    parts = ", ".join(f"{name} {bound}" for name, bound in bounds.items() if bound < BEYOND)
    return f"k = min({parts}) = {width}"


def _outcome(binding: Binding, spans: Mapping[str, tuple[int, int]], length: int, width: int, kept: int) -> list[str]:
    marks, released = [], []
    for op in binding.step.ops:
        if op.op == "commit" and op.spans[0].role in spans:
            role = op.spans[0].role
            mark = min(int(end.evaluate({"len": length, "kept": kept, "k": width})) for end in op.ends)
            marks.append(f"{role}..{mark}")
            released.append(f"{role} {spans[role][1] - mark}")
    return [
        f"accept  {_rule(binding)} -> {_count(kept, 'token')} kept, of {_count(width, 'draft')} and the target's own",
        f"commit  {' '.join(marks)} ; release {' '.join(released)}",
    ]


def _rule(binding: Binding) -> str:
    """The acceptance rule's name, as the step's own op gives it."""
    return next((op.note.partition(";")[0] for op in binding.step.ops if op.op == "accept"), "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
