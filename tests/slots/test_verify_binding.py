"""Every number of a bound step, and of the arrays that a program reads, is checked against the ledger.

Mutants change one number. What may differ unseen, because nothing reads it: token ids (a vocabulary is not slots),
positions and token ids of padded rows, and page-table entries beyond the pages that a sequence's `kv_len` reaches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from slotwise.core.errors import VerificationError
from slotwise.slots.binding import Binding, BoundSpan, bind_decode, bind_prefill, frozen
from slotwise.slots.ledger import Ledger, RoleLedger
from slotwise.slots.pages import NOBODY
from slotwise.slots.rows import FilledRows, RowInputs, fill_rows
from slotwise.slots.step import decode_step, prefill_step
from slotwise.slots.verify_binding import verify_binding, verify_rows

CAPACITY, LANES, EPOCH = 40, 6, 9
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass
class Bound:
    """A reserved decode step of ragged widths, and the rows of its verification in a bucket with padding."""

    ledger: Ledger
    binding: Binding
    inputs: RowInputs
    filled: FilledRows

    @property
    def target(self) -> RoleLedger:
        return self.ledger["target"]

    def verify(self) -> None:
        verify_binding(self.binding, self.ledger, EPOCH)
        verify_rows(self.inputs, self.filled, self.target)


def _ints(values: Any) -> Ints:
    return np.array(values, np.int64)


def _bound(
    page_size: int,
    lanes: tuple[int, ...] = (4, 0, 2, 1),
    lengths: tuple[int, ...] = (17, 33, 4, 9),
    widths: tuple[int, ...] = (3, 0, 5, 1),
    lag: tuple[int, ...] = (1, 0, 2, 0),
    spare: int = 3,
) -> Bound:
    """`lag` is how far each draft mark trails; lane 5 is another open sequence, of 12 tokens, that takes no part."""
    columns = -(-CAPACITY // page_size)
    roles = [
        RoleLedger(role, lanes=LANES, capacity=CAPACITY, page_size=page_size, pages=columns * LANES)
        for role in ("target", "draft")
    ]
    ledger = Ledger(roles)
    tokens = np.arange(LANES * CAPACITY, dtype=np.int32).reshape(LANES, CAPACITY)
    for lane, target, draft in [
        *((lane, n - 1, n - 1 - back) for lane, n, back in zip(lanes, lengths, lag, strict=True)),
        (5, 12, 12),
    ]:
        for role, end in zip(roles, (target, draft), strict=True):
            role.open(lane)
            role.reserve(_ints([lane]), _ints([end]))
            role.commit(_ints([lane]), _ints([end]))
    at, length, width = _ints(lanes), _ints(lengths), _ints(widths)
    binding = bind_decode(
        decode_step("model", "coupled"), EPOCH, range(len(lanes)), at, length, width, ledger["draft"].committed[at]
    )
    for span in binding.spans:
        ledger[span.role].reserve(span.lanes, span.end)
    span = binding.spans[0]
    rows = span.rows + spare
    inputs = RowInputs(
        rows=rows,
        token_ids=np.full(rows, 7, np.int32),
        positions=np.full(rows, 7, np.int32),
        slots=np.full(rows, 7, np.int32),
        row_start=np.full(rows + 1, 7, np.int32),
        kv_len=np.full(rows, 7, np.int32),
        page_table=np.zeros((rows, columns), np.int32),
    )
    filled = fill_rows(inputs, roles[0], tokens, span)
    return Bound(ledger, binding, inputs, filled)


def _span(bound: Bound, index: int, **arrays: Any) -> None:
    """Replace arrays of a bound span; each is given as a function of the old array's copy."""
    spans = list(bound.binding.spans)
    old = spans[index]
    spans[index] = dataclasses.replace(
        old, **{n: frozen(change(getattr(old, n).copy())) for n, change in arrays.items()}
    )
    bound.binding = dataclasses.replace(bound.binding, spans=tuple(spans))


def _field(bound: Bound, name: str, change: Callable[[Ints], Any]) -> None:
    new = frozen(change(getattr(bound.binding, name).copy()))
    bound.binding = dataclasses.replace(bound.binding, **{name: new})


def _add(at: int, by: int) -> Callable[[Ints], Ints]:
    def change(array: Ints) -> Ints:
        array[at] += by
        return array

    return change


def _put(at: int, value: int) -> Callable[[Ints], Ints]:
    def change(array: Ints) -> Ints:
        array[at] = value
        return array

    return change


def _swap(array: Ints) -> Ints:
    array[[0, 1]] = array[[1, 0]]
    return array


def _replace(bound: Bound, **changes: Any) -> None:
    bound.binding = dataclasses.replace(bound.binding, **changes)


def _roles_swapped(bound: Bound) -> None:
    one, other = bound.binding.spans
    _replace(bound, spans=(dataclasses.replace(one, role="draft"), dataclasses.replace(other, role="target")))


BINDING_MUTANTS: dict[str, tuple[str, Callable[[Bound], None]]] = {
    "stale epoch": ("epoch", lambda b: _replace(b, epoch=EPOCH - 1)),
    "epoch ahead": ("epoch", lambda b: _replace(b, epoch=EPOCH + 1)),
    "target begins one early": ("watermark", lambda b: _span(b, 0, begin=_add(1, -1))),
    "target begins one late": ("watermark", lambda b: _span(b, 0, begin=_add(0, 1))),
    "target ends one early": ("reserved", lambda b: _span(b, 0, end=_add(0, -1))),
    "target ends one late": ("reserved", lambda b: _span(b, 0, end=_add(2, 1))),
    "target empty": ("watermark", lambda b: _span(b, 0, end=_put(0, 16))),
    "draft begins one early": ("watermark", lambda b: _span(b, 1, begin=_add(0, -1))),
    "draft begins one late": ("watermark", lambda b: _span(b, 1, begin=_add(0, 1))),
    "draft ends one early": ("reserved", lambda b: _span(b, 1, end=_add(1, -1))),
    "draft ends one late": ("reserved", lambda b: _span(b, 1, end=_add(1, 1))),
    "spans of two roles swapped": ("watermark", _roles_swapped),
    "two lanes of a span swapped": ("watermark", lambda b: _span(b, 0, lanes=_swap)),
    "two lanes swapped with their marks": ("lanes", lambda b: _span(b, 0, lanes=_swap, begin=_swap, end=_swap)),
    "two bound lanes swapped": ("lanes", lambda b: _field(b, "lanes", _swap)),
    "two lanes equal": ("lanes", lambda b: _field(b, "lanes", _put(1, 4))),
    "two lanes of a span equal": (
        "lanes", lambda b: _span(b, 0, lanes=_put(1, 4), begin=_put(1, 16), end=_put(1, 20))),
    "a lane that is not open": ("lanes", lambda b: _span(b, 0, lanes=_put(0, 3))),
    "a lane below zero": ("lanes", lambda b: _span(b, 0, lanes=_put(0, -2))),
    "a lane beyond the ledger": ("lanes", lambda b: _span(b, 0, lanes=_put(0, LANES))),
    "another sequence's lane": ("watermark", lambda b: _span(b, 0, lanes=_put(0, 5))),
    "a wider width": ("width", lambda b: _field(b, "width", _add(0, 1))),
    "a narrower width": ("width", lambda b: _field(b, "width", _add(2, -1))),
    "a width where there was none": ("width", lambda b: _field(b, "width", _add(1, 1))),
    "a longer length": ("watermark", lambda b: _field(b, "length", _add(3, 1))),
    "a shorter length": ("watermark", lambda b: _field(b, "length", _add(3, -1))),
    "no target span": ("lanes", lambda b: _replace(b, spans=b.binding.spans[1:])),
    "no draft span": ("width", lambda b: _replace(b, spans=b.binding.spans[:1])),
    "a span twice": ("lanes", lambda b: _replace(b, spans=(b.binding.spans[0], *b.binding.spans))),
    "a role without a ledger": (
        "lanes", lambda b: _replace(b, spans=(*b.binding.spans[:1],
                                              dataclasses.replace(b.binding.spans[1], role="judge")))),
    "a draft for a sequence without drafts": (
        "watermark", lambda b: _span(b, 1, lanes=lambda a: [*a, 0], begin=lambda a: [*a, 32], end=lambda a: [*a, 32])),
    "a draft missing": (
        "width", lambda b: _span(b, 1, lanes=lambda a: a[:-1], begin=lambda a: a[:-1], end=lambda a: a[:-1])),
    "a reservation beyond capacity": (
        "capacity", lambda b: (_span(b, 0, end=_put(1, 41)), b.target.reserved.__setitem__(0, 41))[0]),
    "a draft reserved one too far": (
        "width", lambda b: (_span(b, 1, end=_add(0, 1)), b.ledger["draft"].reserve(_ints([4]), _ints([20])))[0]),
    "pages that are not owned": ("pages", lambda b: b.target.page_count.__setitem__(4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_a_bound_step_passes(page_size: int) -> None:
    _bound(page_size).verify()


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("name", BINDING_MUTANTS)
def test_a_mutant_binding_is_caught_and_named(name: str, page_size: int) -> None:
    bound = _bound(page_size)
    rule, mutate = BINDING_MUTANTS[name]
    mutate(bound)
    with pytest.raises(VerificationError) as caught:
        verify_binding(bound.binding, bound.ledger, EPOCH)
    assert caught.value.rule == rule, str(caught.value)


def test_the_widths_of_a_drafter_without_slots_are_checked_too() -> None:
    bound = _bound(3)
    step = decode_step("ngram", "coupled")
    binding = dataclasses.replace(bound.binding, step=step, spans=bound.binding.spans[:1])
    verify_binding(binding, bound.ledger, EPOCH)
    for by in (-1, 1):
        changed = dataclasses.replace(binding, width=frozen(_add(0, by)(binding.width.copy())))
        with pytest.raises(VerificationError) as caught:
            verify_binding(changed, bound.ledger, EPOCH)
        assert caught.value.rule == "width"


def test_a_lane_bound_twice_with_all_its_numbers_is_caught() -> None:
    bound = _bound(3, lanes=(4,), lengths=(17,), widths=(3,), lag=(0,))
    twice = {name: frozen(np.repeat(getattr(bound.binding, name), 2)) for name in ("lanes", "length", "width")}
    spans = tuple(
        BoundSpan(s.role, *(frozen(np.repeat(a, 2)) for a in (s.lanes, s.begin, s.end))) for s in bound.binding.spans
    )
    with pytest.raises(VerificationError, match=r"a lane is bound twice: \[4, 4\]"):
        verify_binding(dataclasses.replace(bound.binding, **twice, spans=spans), bound.ledger, EPOCH)


def _prefill(page_size: int = 3) -> tuple[Ledger, Binding]:
    ledger = Ledger([RoleLedger("target", lanes=2, capacity=20, page_size=page_size, pages=20)])
    ledger["target"].open(0)
    ledger["target"].open(1)
    binding = bind_prefill(prefill_step("target"), EPOCH, 7, "target", 1, known=10, begin=0, chunk=8)
    ledger["target"].reserve(_ints([1]), _ints([8]))
    return ledger, binding


def test_a_bound_prefill_passes_and_its_mutants_are_caught() -> None:
    ledger, binding = _prefill()
    verify_binding(binding, ledger, EPOCH)
    span = binding.spans[0]
    other = BoundSpan("target", frozen([0]), span.begin, span.end)
    mutants = {
        "known": dataclasses.replace(binding, length=frozen([7])),
        "reserved": dataclasses.replace(binding, spans=(other,)),
        "lanes": dataclasses.replace(binding, lanes=frozen([0])),
        "watermark": dataclasses.replace(binding, spans=(dataclasses.replace(span, begin=frozen([1])),)),
        "epoch": dataclasses.replace(binding, epoch=8),
    }
    for rule, mutant in mutants.items():
        with pytest.raises(VerificationError) as caught:
            verify_binding(mutant, ledger, EPOCH)
        assert caught.value.rule == rule, str(caught.value)


def _own_page(bound: Bound, lane: int) -> int:
    return int(bound.target.page_table[lane, 0])


# In these: lanes 4, 0, 2, 1 have the rows 0..4, 4..5, 5..11, 11..13; rows 13..16 are padding.
ROW_MUTANTS: dict[str, tuple[str, Callable[[Bound], object]]] = {
    "a slot one further": ("slots", lambda b: _add(2, 1)(b.inputs.slots)),
    "a slot one back": ("slots", lambda b: _add(6, -1)(b.inputs.slots)),
    "a slot of another sequence": (
        "slots", lambda b: _put(0, _own_page(b, 5) * b.target.page_size)(b.inputs.slots)),
    "a slot of another sequence in the batch": ("slots", lambda b: _put(0, int(b.inputs.slots[6]))(b.inputs.slots)),
    "a slot twice": ("slots", lambda b: _put(1, int(b.inputs.slots[0]))(b.inputs.slots)),
    "a slot below zero": ("slots", lambda b: _put(0, -1)(b.inputs.slots)),
    "a slot beyond the cache": ("slots", lambda b: _put(0, 10**6)(b.inputs.slots)),
    "the scratch slot for a real row": ("slots", lambda b: _put(0, 0)(b.inputs.slots)),
    "a free page's slot": ("slots", lambda b: _put(0, b.target.pool.total * b.target.page_size)(b.inputs.slots)),
    "two slots swapped": ("slots", lambda b: _swap(b.inputs.slots)),
    "a position one further": ("row order", lambda b: _add(4, 1)(b.inputs.positions)),
    "a position one back": ("row order", lambda b: _add(12, -1)(b.inputs.positions)),
    "kv_len one longer": ("kv length", lambda b: _add(0, 1)(b.inputs.kv_len)),
    "kv_len one shorter": ("kv length", lambda b: _add(2, -1)(b.inputs.kv_len)),
    "row_start shifted on": ("kv length", lambda b: _add(3, 1)(b.inputs.row_start)),
    "row_start shifted back": ("kv length", lambda b: _add(3, -1)(b.inputs.row_start)),
    "row_start from one": ("row order", lambda b: _put(0, 1)(b.inputs.row_start)),
    "a sequence without rows": ("row order", lambda b: _put(2, 4)(b.inputs.row_start)),
    "row_start ends early": ("row order", lambda b: _put(4, 12)(b.inputs.row_start)),
    "a token that the model lacks": (
        "token ids", lambda b: (setattr(b.inputs, "id_limit", 9), _put(1, 9)(b.inputs.token_ids))),
    "a page of another lane": ("page table", lambda b: b.inputs.page_table.__setitem__((0, 0), _own_page(b, 5))),
    "the scratch page where tokens are": ("page table", lambda b: b.inputs.page_table.__setitem__((3, 0), 0)),
    "two lanes' pages swapped": (
        "page table", lambda b: b.inputs.page_table.__setitem__(([0, 1], 0), b.inputs.page_table[[1, 0], 0])),
    "a padded row on an owned page": ("padding", lambda b: _put(14, int(b.inputs.slots[0]))(b.inputs.slots)),
    "a padded row below zero": ("padding", lambda b: _put(14, -1)(b.inputs.slots)),
    "a padded row that reads": ("padding", lambda b: _put(5, 1)(b.inputs.kv_len)),
    "a padded sequence with a row": ("padding", lambda b: _put(6, 14)(b.inputs.row_start)),
    "a padded page table": ("padding", lambda b: b.inputs.page_table.__setitem__((7, 0), _own_page(b, 4))),
    "a published page as the target of a write": (
        "slots", lambda b: b.target.pool.owner.__setitem__(b.inputs.slots[0] // b.target.page_size, NOBODY)),
    "a page given to another lane": (
        "slots", lambda b: b.target.pool.owner.__setitem__(b.inputs.slots[0] // b.target.page_size, 5)),
    "a page at another place of its sequence": (
        "slots", lambda b: b.target.pool.ordinal.__setitem__(b.inputs.slots[0] // b.target.page_size, 0)),
    "a reservation that shrank": ("kv length", lambda b: b.target.reserved.__setitem__(4, 18)),
    "a hole before the first row": ("kv length", lambda b: b.target.written.__setitem__(4, 15)),
    "committed slots overwritten": ("kv length", lambda b: b.target.committed.__setitem__(4, 17)),
}  # fmt: skip


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("name", ROW_MUTANTS)
def test_mutant_rows_are_caught_and_named(name: str, page_size: int) -> None:
    bound = _bound(page_size)
    rule, mutate = ROW_MUTANTS[name]
    mutate(bound)
    with pytest.raises(VerificationError) as caught:
        verify_rows(bound.inputs, bound.filled, bound.target)
    assert caught.value.rule == rule, str(caught.value)


def test_a_step_may_write_on_from_what_it_wrote_but_not_beyond() -> None:
    bound = _bound(3)
    draft, tokens = bound.ledger["draft"], np.zeros((LANES, CAPACITY), np.int32)

    def feed(begin: int, end: int) -> None:
        filled = fill_rows(bound.inputs, draft, tokens, BoundSpan("draft", _ints([2]), _ints([begin]), _ints([end])))
        verify_rows(bound.inputs, filled, draft)

    with pytest.raises(VerificationError, match="kv length"):
        feed(2, 3)
    feed(1, 4)  # catches up, up to the pending token; then a row a draft
    feed(4, 5)
    with pytest.raises(VerificationError, match="kv length"):
        feed(6, 7)
    feed(5, 6)
    draft.commit(_ints([2]), _ints([3]))
    draft.reserve(_ints([2]), _ints([6]))
    with pytest.raises(VerificationError, match="kv length"):
        feed(5, 6)


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    count = draw(st.integers(1, 5))
    lanes = draw(st.permutations(range(5)))[:count]
    widths = [draw(st.integers(0, 6)) for _ in lanes]
    lengths = [draw(st.integers(1, CAPACITY - width - 1)) for width in widths]
    lag = [draw(st.integers(0, min(3, length - 1))) for length in lengths]
    return _bound(
        draw(st.sampled_from((1, 3, 16))),
        tuple(lanes),
        tuple(lengths),
        tuple(widths),
        tuple(lag),
        draw(st.integers(0, 3)),
    )


@given(bounds(), st.data())
def test_any_single_changed_number_of_the_rows_is_caught(bound: Bound, data: st.DataObject) -> None:
    filled, size = bound.filled, bound.target.page_size
    rows, sequences = filled.rows, filled.lanes.size
    name = data.draw(st.sampled_from(("slots", "positions", "row_start", "kv_len", "page_table")))
    array = getattr(bound.inputs, name)
    at = tuple(data.draw(st.integers(0, extent - 1)) for extent in array.shape)
    columns = -(-filled.end // size)
    if name == "positions":
        assume(at[0] < rows)
    if name == "page_table":
        assume(at[1] < (columns[at[0]] if at[0] < sequences else columns.max()))
    new = data.draw(st.one_of(st.integers(-2, 300), st.integers(-(2**31), 2**31 - 1), st.sampled_from(array.ravel())))
    assume(new != array[at])
    if name == "slots" and at[0] >= rows:
        assume(not 0 <= new < size)  # any slot of the scratch page will do for padding
    array[at] = new
    with pytest.raises(VerificationError):
        bound.verify()


@given(bounds(), st.data())
def test_any_single_changed_number_of_the_binding_is_caught(bound: Bound, data: st.DataObject) -> None:
    span = data.draw(st.sampled_from(bound.binding.spans))
    holder: Any = data.draw(st.sampled_from((bound.binding, span)))
    name = data.draw(
        st.sampled_from(("lanes", "length", "width") if holder is bound.binding else ("lanes", "begin", "end"))
    )
    array = getattr(holder, name).copy()
    at = data.draw(st.integers(0, array.size - 1))
    new = data.draw(st.integers(-3, 50))
    assume(new != array[at])
    array[at] = new
    changed = dataclasses.replace(holder, **{name: frozen(array)})
    if holder is not bound.binding:
        changed = dataclasses.replace(
            bound.binding, spans=tuple(changed if s is holder else s for s in bound.binding.spans)
        )
    with pytest.raises(VerificationError):
        verify_binding(changed, bound.ledger, EPOCH)


@given(bounds())
def test_what_is_bound_and_filled_by_the_planner_passes(bound: Bound) -> None:
    bound.verify()
