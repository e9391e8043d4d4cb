"""The run-time verifier: each binding, and each call's rows, before dispatch.

Owns `verify_binding` and `verify_rows`. What always holds: what they check they take from the ledger (who owns a page,
as which page of whose sequence), not from the code that made the numbers, so an error there is seen here; the checks
are a few array operations, microseconds for a batch, and always on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from slotwise.core.errors import VerificationError
from slotwise.core.ledger import Ledger, RoleLedger
from slotwise.core.pages import SCRATCH_PAGE
from slotwise.plans.binding import Binding, BoundSpan
from slotwise.plans.program import DRAFT, TARGET
from slotwise.plans.rows import FilledRows, Ints32, RowInputs


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
    `kv length` (something would be read that was never written), `page table`, or `padding`.
    """
    rows, n = filled.rows, filled.lanes.size
    size, pool = ledger.page_size, ledger.pool
    starts = inputs.row_start
    if rows > inputs.rows or starts[0] != 0 or some(starts[1 : n + 1] <= starts[:n]) or starts[n] != rows:
        raise VerificationError("row order", f"{filled.role}: row_start {starts.tolist()} does not cover {rows} rows")
    count = np.diff(starts[: n + 1])
    begin, end = inputs.kv_len[:n] - count, inputs.kv_len[:n]
    if some((begin != filled.begin) | (end != filled.end) | (end > ledger.reserved[filled.lanes])):
        raise VerificationError(
            "kv length",
            f"{filled.role}: kv_len {end.tolist()} with {count.tolist()} rows is not the planned span "
            f"{filled.begin.tolist()} .. {filled.end.tolist()} within reserved "
            f"{ledger.reserved[filled.lanes].tolist()}",
        )
    written, committed = ledger.written[filled.lanes], ledger.committed[filled.lanes]
    if some((begin > written) | (begin < committed)):
        raise VerificationError(
            "kv length",
            f"{filled.role}: rows from positions {begin.tolist()} must follow what is written, up to "
            f"{written.tolist()}, and what is committed, up to {committed.tolist()}",
        )
    position = inputs.positions[:rows]
    lane = filled.lanes if rows == n else np.repeat(filled.lanes, count)
    expected = begin if rows == n else np.arange(rows) + np.repeat(begin - starts[:n], count)
    if some(position != expected):
        raise VerificationError(
            "row order", f"{filled.role}: positions {position.tolist()}, expected {expected.tolist()}"
        )
    page = inputs.slots[:rows] // size
    if some((page < 0) | (page > pool.total)):
        raise VerificationError(
            "slots", f"{filled.role}: slots {inputs.slots[:rows].tolist()} are not all in the {pool.total} pages"
        )
    offset = inputs.slots[:rows] - page * size
    wrong = (pool.owner[page] != lane) | (pool.ordinal[page] * size + offset != position)
    if some(wrong):
        bad = int(np.flatnonzero(wrong)[0])
        raise VerificationError(
            "slots",
            f"{filled.role}: row {bad} of lane {lane[bad]} at position {position[bad]} would write slot "
            f"{inputs.slots[bad]}, which is page {page[bad]} (owner {pool.owner[page[bad]]}, page number "
            f"{pool.ordinal[page[bad]]} of its sequence)",
        )
    _verify_page_table(inputs, filled, ledger, end)
    if some(inputs.slots[rows:] // size != SCRATCH_PAGE) or some(starts[n:] != rows) or some(inputs.kv_len[n:]):
        raise VerificationError("padding", f"{filled.role}: padded rows must use the scratch slot and read nothing")
    ledger.written[filled.lanes] = np.maximum(written, end)


def _verify_page_table(inputs: RowInputs, filled: FilledRows, ledger: RoleLedger, end: Ints32) -> None:
    n, size = filled.lanes.size, ledger.page_size
    needed = -(-end // size)
    columns = int(needed.max())
    table = inputs.page_table[:n, :columns]
    read = np.arange(columns) < needed[:, None]
    held = (table != SCRATCH_PAGE) & (table == ledger.page_table[filled.lanes, :columns])
    if some(read & ~held):
        bad = int(np.flatnonzero((read & ~held).any(axis=1))[0])
        raise VerificationError(
            "page table",
            f"{filled.role}: lane {filled.lanes[bad]} would read pages {table[bad].tolist()}, it holds "
            f"{ledger.page_table[filled.lanes[bad], :columns].tolist()}",
        )
    if some(inputs.page_table[n:, :columns] != SCRATCH_PAGE):
        raise VerificationError("padding", f"{filled.role}: padded rows of the page table must be the scratch page")


def _show(span: BoundSpan) -> str:
    parts = [
        f"lane {a} {b}..{c}"
        for a, b, c in zip(span.lanes.tolist(), span.begin.tolist(), span.end.tolist(), strict=True)
    ]
    return f"{span.role} span ({', '.join(parts)})"
