"""The run-time verifier: each binding, and each call's rows, before dispatch.

Owns `verify_binding` and `verify_rows`; a draft loop's rounds are checked in `verify_rounds.py`. What always holds:
what is checked comes from the ledger (who owns a page, as which page of whose sequence), not from the code that made
the numbers, so an error there is seen here; the checks are a few array operations, microseconds for a batch, always on.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import VerificationError
from slotwise.slots.binding import Binding, BoundSpan
from slotwise.slots.ledger import Ledger, RoleLedger
from slotwise.slots.pages import SCRATCH_PAGE
from slotwise.slots.rows import FilledRows, Ints, Ints32, RowInputs
from slotwise.slots.step import DRAFT, TARGET


def some(wrong: npt.NDArray[Any]) -> bool:
    """Whether anything in `wrong` is true; counting is the cheapest way that numpy has to ask."""
    return bool(np.count_nonzero(wrong))


def verify_binding(binding: Binding, ledger: Ledger, epoch: int) -> None:
    """Check a bound step against the ledger, after its reservation and before anything runs.

    Raises VerificationError for the rule that is broken: `epoch`, `lanes`, `watermark`, `reserved`, `capacity`,
    `pages`, `width`, `known`.
    """
    if binding.epoch != epoch:
        raise VerificationError("epoch", f"the binding is of step {binding.epoch}, the engine is at step {epoch}")
    lanes = binding.lanes
    if lanes.size > 1 and len(set(lanes.tolist())) != lanes.size:
        raise VerificationError("lanes", f"step {epoch}: a lane is bound twice: {lanes.tolist()}")
    roles = [span.role for span in binding.spans]
    if len(set(roles)) != len(roles) or any(role not in ledger for role in roles):
        raise VerificationError(
            "lanes", f"step {epoch}: spans are for roles {roles}, the ledger has {list(ledger.roles)}"
        )
    for span in binding.spans:
        _verify_span(binding, span, ledger[span.role])
    if not binding.step.limits:
        _verify_prefill(binding)
        return
    target = binding.span(TARGET)
    if target is None or target.lanes.size != lanes.size or some(target.lanes != lanes):
        raise VerificationError("lanes", f"step {epoch}: the target's span is not over the bound lanes")
    if some((binding.width < 0) | (target.end - target.begin != binding.width + 1)):
        raise VerificationError(
            "width", f"step {epoch}: {_show(target)} must have k + 1 slots a sequence, k is {binding.width.tolist()}"
        )
    if some(target.begin != binding.length - 1):
        raise VerificationError(
            "watermark",
            f"step {epoch}: {_show(target)} must begin at the pending token, lengths are {binding.length.tolist()}",
        )
    drafting, wide = binding.span(DRAFT), np.flatnonzero(binding.width)
    if drafting is None:
        if wide.size and binding.step.span("reserve", DRAFT) is not None:
            raise VerificationError(
                "width", f"step {epoch}: k is {binding.width.tolist()}, but no draft slots are bound"
            )
    else:
        if drafting.lanes.size != wide.size or some(drafting.lanes != lanes[wide]):
            raise VerificationError("width", f"step {epoch}: {_show(drafting)} must be over the sequences with k > 0")
        if some(drafting.end != binding.length[wide] + binding.width[wide] - 1):
            raise VerificationError(
                "width",
                f"step {epoch}: {_show(drafting)} must end one before the last draft, k is "
                f"{binding.width[wide].tolist()}",
            )


def _verify_prefill(binding: Binding) -> None:
    """A chunk is one sequence's, of tokens that it knows."""
    for span in binding.spans:
        if span.lanes.size != binding.lanes.size or some(span.lanes != binding.lanes):
            raise VerificationError("lanes", f"step {binding.epoch}: {_show(span)} is not over the bound lanes")
        if some(span.end > binding.length):
            raise VerificationError(
                "known", f"step {binding.epoch}: {_show(span)} goes past the {binding.length.tolist()} known tokens"
            )


def _verify_span(binding: Binding, span: BoundSpan, ledger: RoleLedger) -> None:
    lanes, epoch = span.lanes, binding.epoch
    if some((lanes < 0) | (lanes >= ledger.is_open.size)) or some(~ledger.is_open[lanes]):
        raise VerificationError("lanes", f"step {epoch}: {_show(span)} has a lane that is not open")
    if some((span.begin >= span.end) | (span.begin != ledger.committed[lanes])):
        raise VerificationError(
            "watermark",
            f"step {epoch}: {_show(span)} must begin at the committed marks "
            f"{ledger.committed[lanes].tolist()} and not be empty",
        )
    if some(span.end != ledger.reserved[lanes]):
        raise VerificationError(
            "reserved", f"step {epoch}: {_show(span)} is not what is reserved, up to {ledger.reserved[lanes].tolist()}"
        )
    if some(span.end > ledger.capacity):
        raise VerificationError("capacity", f"step {epoch}: {_show(span)} goes past the capacity {ledger.capacity}")
    if some(span.end > ledger.page_count[lanes] * ledger.page_size):
        raise VerificationError(
            "pages",
            f"step {epoch}: {_show(span)} goes past the owned pages, {ledger.page_count[lanes].tolist()} of "
            f"{ledger.page_size} slots",
        )


def verify_rows(inputs: RowInputs, filled: FilledRows, ledger: RoleLedger) -> None:
    """Check the very arrays that a program is about to read; rows that pass count as written from then on.

    Raises VerificationError: `row order`, `slots` (a row's slot is not its lane's own page for that position),
    `token ids` (one that the model lacks), `kv length` (something would be read that was never written), `page table`,
    or `padding`.
    """
    lanes = filled.lanes
    written = ledger.written[lanes]
    verify_call(inputs, filled, ledger, written)
    ledger.written[lanes] = np.maximum(written, filled.end)


def verify_call(inputs: RowInputs, filled: FilledRows, ledger: RoleLedger, written: Ints) -> None:
    """`verify_rows`, given how far each lane is `written` when this call's attention reads; it marks nothing."""
    rows, n, lanes = filled.rows, filled.lanes.size, filled.lanes
    starts, end = inputs.row_start, inputs.kv_len[:n]
    if rows > inputs.rows or starts[0] != 0 or starts[n] != rows:
        raise VerificationError("row order", f"{filled.role}: row_start {starts.tolist()} does not cover {rows} rows")
    count = starts[1 : n + 1] - starts[:n]
    begin = end - count
    needed = -(-end // ledger.page_size)
    disordered = count < 1
    unplanned = (begin != filled.begin) | (end != filled.end) | (end > ledger.reserved[lanes])
    unwritten = (begin > written) | (begin < ledger.committed[lanes])
    unowned = needed > ledger.page_count[lanes]
    # One question in the usual case; which rule it was is asked only when there is something to say.
    if some(disordered | unplanned | unwritten | unowned):
        _explain_spans(inputs, filled, ledger, written, disordered, unplanned, unwritten)
    _verify_slots(inputs, filled, ledger, count)
    if inputs.id_limit is not None and some(inputs.token_ids[:rows] >= inputs.id_limit):
        place = int(np.argmax(inputs.token_ids[:rows] >= inputs.id_limit))
        raise VerificationError(
            "token ids",
            f"{filled.role}: lane {int(filled.row_lanes[place])} would feed id {int(inputs.token_ids[place])} at "
            f"position {int(filled.row_positions[place])}, the model has ids below {inputs.id_limit}",
        )
    columns = int(needed.max())
    if some(inputs.page_table[:n, :columns] != ledger.page_table[lanes, :columns]):
        table, held = inputs.page_table[:n, :columns], ledger.page_table[lanes, :columns]
        bad = int(np.flatnonzero((table != held).any(axis=1))[0])
        raise VerificationError(
            "page table",
            f"{filled.role}: lane {lanes[bad]} would read pages {table[bad].tolist()}, it holds {held[bad].tolist()}",
        )
    if rows < inputs.rows and some(inputs.slots[rows:] // ledger.page_size != SCRATCH_PAGE):
        raise VerificationError("padding", f"{filled.role}: padded rows must write the scratch slot")
    if n < inputs.rows:
        reads = (starts[n + 1 :] != rows) | (inputs.kv_len[n:] != 0)
        if some(reads) or some(inputs.page_table[n:, :columns] != SCRATCH_PAGE):
            raise VerificationError(
                "padding", f"{filled.role}: padded rows must belong to no sequence and read nothing"
            )


def _verify_slots(inputs: RowInputs, filled: FilledRows, ledger: RoleLedger, count: Ints32) -> None:
    """Every row stands at its position, and its slot is that position's in its lane's own page."""
    rows, n, size, pool = filled.rows, filled.lanes.size, ledger.page_size, ledger.pool
    position, slots = inputs.positions[:rows], inputs.slots[:rows]
    if rows == n:
        lane, expected = filled.lanes, filled.begin
    else:
        lane = np.repeat(filled.lanes, count)
        expected = np.arange(rows) + np.repeat(filled.begin - inputs.row_start[:n], count)
    page = slots // size
    # Looking up a page that does not exist gives another's entry; that it does not exist is asked beside it.
    owner, ordinal = pool.owner.take(page, mode="clip"), pool.ordinal.take(page, mode="clip")
    outside = (page < 0) | (page > pool.total)
    wrong = outside | (owner != lane) | ((ordinal - page) * size + slots != position)
    if not some(wrong | (position != expected)):
        return
    if some(position != expected):
        raise VerificationError(
            "row order", f"{filled.role}: positions {position.tolist()}, expected {expected.tolist()}"
        )
    bad = int(np.flatnonzero(wrong)[0])
    where = (
        "in no page" if outside[bad] else f"page {page[bad]} (owner {owner[bad]}, number {ordinal[bad]} of its pages)"
    )
    raise VerificationError(
        "slots",
        f"{filled.role}: row {bad} of lane {lane[bad]} at position {position[bad]} would write slot {slots[bad]}, "
        f"which is {where}",
    )


def _explain_spans(
    inputs: RowInputs,
    filled: FilledRows,
    ledger: RoleLedger,
    written: Ints,
    disordered: npt.NDArray[np.bool_],
    unplanned: npt.NDArray[np.bool_],
    unwritten: npt.NDArray[np.bool_],
) -> NoReturn:
    """Say which rule the rows of a call break."""
    n, lanes = filled.lanes.size, filled.lanes
    starts, end = inputs.row_start[: n + 1].tolist(), inputs.kv_len[:n].tolist()
    if some(disordered):
        raise VerificationError("row order", f"{filled.role}: row_start {starts} must rise by a row a sequence")
    if some(unplanned):
        raise VerificationError(
            "kv length",
            f"{filled.role}: kv_len {end} with rows {starts} is not the planned span {filled.begin.tolist()} .. "
            f"{filled.end.tolist()} within reserved {ledger.reserved[lanes].tolist()}",
        )
    if some(unwritten):
        raise VerificationError(
            "kv length",
            f"{filled.role}: rows up to {end}, with rows {starts}, must follow what is written, up to "
            f"{written.tolist()}, and what is committed, up to {ledger.committed[lanes].tolist()}",
        )
    raise VerificationError(
        "page table",
        f"{filled.role}: kv_len {end} goes past the pages held, {ledger.page_count[lanes].tolist()} of "
        f"{ledger.page_size} slots",
    )


def _show(span: BoundSpan) -> str:
    parts = [
        f"lane {a} {b}..{c}"
        for a, b, c in zip(span.lanes.tolist(), span.begin.tolist(), span.end.tolist(), strict=True)
    ]
    return f"{span.role} span ({', '.join(parts)})"
