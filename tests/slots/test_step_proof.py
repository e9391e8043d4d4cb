"""What the prover says of the decode step, told again by living every life.

A simulator that shares nothing with the prover runs sequences to their end for every capacity up to 40, every prompt,
max_new_tokens, width up to 6, page size 1, 3 and 16, with draft models as long as the target and shorter, pools that
can give every page and none, and acceptance of nothing, everything, and by turns. It sees faults where the prover does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from slotwise.core.errors import VerificationError
from slotwise.slots.binding import WidthFormula
from slotwise.slots.step import Limit, Step, decode_step
from slotwise.slots.verify_step import verify_step

Ints = npt.NDArray[np.int64]
PAGE_SIZES = (1, 3, 16)
WIDEST = 6
PATTERNS: dict[str, Callable[[Ints, int], Ints]] = {
    "nothing accepted": lambda k, step: k * 0,
    "everything accepted": lambda k, step: k,
    "by turns": lambda k, step: k // 2 if step % 2 else k,
}


def _lives(capacity: int) -> dict[str, Ints]:
    """Every (prompt, max_new, width, whether the pool has pages left), as columns."""
    axes = (np.arange(1, capacity), np.arange(1, capacity + 2), np.arange(WIDEST + 1), np.arange(2))
    grid = np.meshgrid(*axes, indexing="ij")
    return {n: g.ravel() for n, g in zip(("prompt", "max_new", "width", "rich"), grid, strict=True)}


def _draft_capacities(capacity: int, draft: str) -> Iterable[int]:
    return (capacity, 2 * capacity // 3) if draft == "model" else (capacity,)


def _live(step: Step, capacity: int, page_size: int, draft: str, draft_capacity: int, accept: Any) -> set[str]:
    """Run every life to its end; the names of what went wrong."""
    wrong: set[str] = set()

    def demand(name: str, holds: Any) -> None:
        if not np.all(holds):
            wrong.add(name)

    rotary = capacity
    constants = {"capacity": capacity, "rotary": rotary, "draft_capacity": draft_capacity}
    formula = WidthFormula(step, constants)
    target, spans = step.span("reserve", "target"), step.span("reserve", "draft")
    ends = {op.spans[0].role: op.ends for op in step.ops if op.op == "commit"}
    assert target is not None
    life = _lives(capacity)
    pages = -(-capacity // page_size)
    length = life["prompt"].copy()
    left = life["max_new"].copy()
    target_mark, draft_mark = length - 1, np.minimum(length - 1, draft_capacity)
    expected = np.minimum(life["max_new"], capacity - life["prompt"])
    for turn in range(capacity + 1):
        done = (left == 0) | (length == capacity)
        demand("ends with the tokens it should have", (life["max_new"] - left == expected)[done])
        alive = ~done
        life = {name: column[alive] for name, column in life.items()}
        length, left, expected = length[alive], left[alive], expected[alive]
        target_mark, draft_mark = target_mark[alive], draft_mark[alive]
        if not length.size:
            return wrong
        room = np.where(life["rich"], pages, -(-length // page_size)) * page_size
        k = formula.widths({"len": length, "room": room, "budget": left, "speculate": life["width"]})

        def fits(k: Ints, length: Ints = length, left: Ints = left, room: Ints = room) -> Any:
            """Whether k drafts leave every token a place: said token by token, not as the plan says it."""
            last_row, tokens_after = length - 1 + k, length + k + 1
            here = (last_row < room) & (last_row < rotary) & (tokens_after <= capacity) & (k + 1 <= left)
            return here & (length + k - 2 < draft_capacity) if draft == "model" else here

        demand("no wider than asked", (k >= 0) & (k <= life["width"]))
        demand("drafts have room", (k == 0) | fits(k))
        demand("no narrower than need be", (k >= life["width"]) | ~fits(k + 1))
        values = {"len": length, "k": k, "filled": draft_mark}
        begin, end = target.begin.evaluate(values), target.end.evaluate(values)
        demand("starts at the mark", begin == target_mark)
        demand("one row for the pending token and one a draft", end - begin == k + 1)
        demand("within capacity", end <= capacity)
        demand("within pages", end <= room)
        kept = np.minimum(accept(k, turn) + 1, left)
        values["kept"] = kept
        mark = np.min([e.evaluate(values) for e in ends["target"]], axis=0)
        demand("commits what was written", (mark >= begin) & (mark <= end))
        demand("all but the pending token is filled", mark == length + kept - 1)
        if spans is not None:
            wide = k > 0
            first, last = (np.broadcast_to(e.evaluate(values), k.shape) for e in (spans.begin, spans.end))
            demand("the draft starts at its mark", (first == draft_mark)[wide])
            demand("the draft is fed all but the last", (last == length + k - 1)[wide])
            demand("the draft within its capacity", (last <= draft_capacity)[wide])
            new = np.min([e.evaluate(values) for e in ends["draft"]], axis=0)
            demand("the draft commits what was kept", ((new >= first) & (new <= last) & (new <= mark))[wide])
            demand("the draft keeps all it may", (new == np.minimum(mark, last))[wide])
            draft_mark = np.where(wide, new, draft_mark)
        target_mark, length, left = mark, length + kept, left - kept
        demand("the sequence within capacity", length <= capacity)
        length = np.minimum(length, capacity)  # a faulty step must end, too
    wrong.add("a life without end")
    return wrong


def _faults(step: Step, draft: str, capacity: int) -> set[str]:
    return {
        fault
        for page_size in PAGE_SIZES
        for draft_capacity in _draft_capacities(capacity, draft)
        for accept in PATTERNS.values()
        for fault in _live(step, capacity, page_size, draft, draft_capacity, accept)
    }


@pytest.mark.parametrize("draft", ["none", "ngram", "model"])
@pytest.mark.parametrize("capacity", [2, 3, 16, 17])
def test_every_life_stays_in_bounds_and_ends_exactly(capacity: int, draft: str) -> None:
    assert not _faults(decode_step(draft, "coupled"), draft, capacity)


@pytest.mark.parametrize("draft", ["ngram", "model"])
@pytest.mark.parametrize("capacity", range(2, 41))
def test_every_life_of_every_capacity(capacity: int, draft: str) -> None:
    assert not _faults(decode_step(draft, "coupled"), draft, capacity)


def _changed(step: Step, index: int, by: int | None) -> Step:
    """The step with a limit moved, or dropped where `by` is None."""
    limits = list(step.limits)
    old = limits.pop(index)
    if by is not None:
        limits.insert(index, Limit(old.bound + by, old.reason))
    return dataclasses.replace(step, limits=tuple(limits))


FAULTS = {
    "speculate": "no wider than asked",
    "target room": "the sequence within capacity",
    "pages": "within pages",
    "budget": "drafts have room",
    "draft room": "the draft within its capacity",
}


@pytest.mark.parametrize("by", [None, 1], ids=["dropped", "one looser"])
@pytest.mark.parametrize("reason", FAULTS)
def test_prover_and_lives_agree_that_a_limit_is_needed(reason: str, by: int | None) -> None:
    step = decode_step("model", "coupled")
    (index,) = [i for i, limit in enumerate(step.limits) if limit.name == reason]
    changed = _changed(step, index, by)
    assert FAULTS[reason] in _faults(changed, "model", 17)
    with pytest.raises(VerificationError):
        verify_step(changed, True)


def test_a_rotary_table_as_long_as_the_capacity_never_decides() -> None:
    """The prover asks for the limit all the same: it takes no word for how long the table is."""
    step = decode_step("model", "coupled")
    (index,) = [i for i, limit in enumerate(step.limits) if limit.name == "rotary table"]
    changed = _changed(step, index, None)
    assert not _faults(changed, "model", 17)
    with pytest.raises(VerificationError) as caught:
        verify_step(changed, True)
    assert caught.value.rule == "rotary"


@pytest.mark.parametrize("index", range(6))
def test_a_tighter_limit_is_safe_to_the_prover_but_wastes_drafts(index: int) -> None:
    step = _changed(decode_step("model", "coupled"), index, -1)
    verify_step(step, True)
    faults = _faults(step, "model", 17)
    assert faults <= {"no narrower than need be"}


@pytest.mark.parametrize("draft", ["none", "ngram", "model"])
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_the_steps_as_written_are_proved(draft: str, acceptance: str) -> None:
    verify_step(decode_step(draft, acceptance), draft == "model")


def test_the_width_formula_fills_in_constants_and_keeps_the_least() -> None:
    formula = WidthFormula(decode_step("model", "coupled"), {"capacity": 40, "rotary": 64, "draft_capacity": 36})
    assert sorted(map(str, formula.bounds)) == ["-len + 37", "budget - 1", "room - len", "speculate"]
    values = {"len": _row(30, 34, 36, 39, 1), "room": 64, "budget": _row(9, 9, 9, 9, 1), "speculate": 5}
    assert formula.widths(values).tolist() == [5, 3, 1, 0, 0]


def _row(*values: int) -> Ints:
    return np.array(values, np.int64)
