"""The run-time verifier: each binding, and each call's rows, before dispatch.

Owns `verify_binding` and `verify_rows`. What always holds: what they check they take from the ledger (who owns a page,
as which page of whose sequence), not from the code that made the numbers, so an error there is seen here; the checks
are a few array operations, microseconds for a batch, and always on.
"""

from __future__ import annotations

import numpy as np
from slotwise.core.errors import VerificationError
from slotwise.core.ledger import Ledger, RoleLedger
from slotwise.core.pages import SCRATCH_PAGE
from slotwise.plans.binding import Binding, BoundSpan
from slotwise.plans.program import DRAFT, TARGET
from slotwise.plans.rows import FilledRows, Ints32, RowInputs


def verify_binding(binding: Binding, ledger: Ledger, epoch: int) -> None:
    """Check a bound step against the ledger, after its reservation and before anything runs.

    Raises VerificationError for the rule that is broken: `epoch`, `lanes`, `watermark`, `reserved`, `capacity`,
    `pages`, `width`, `known`.
    """
    if binding.epoch != epoch:
        raise VerificationError("epoch", f"the binding is of step {binding.epoch}, the engine is at step {epoch}")
    lanes = binding.lanes
    if lanes.size > 1 and np.unique(lanes).size != lanes.size:
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
    if target is None or target.lanes.size != lanes.size or (target.lanes != lanes).any():
        raise VerificationError("lanes", f"step {epoch}: the target's span is not over the bound lanes")
    if (binding.width < 0).any() or (target.end - target.begin != binding.width + 1).any():
        raise VerificationError(
            "width", f"step {epoch}: {_show(target)} must have k + 1 slots a sequence, k is {binding.width.tolist()}"
        )
    if (target.begin != binding.length - 1).any():
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
        if drafting.lanes.size != wide.size or (drafting.lanes != lanes[wide]).any():
            raise VerificationError("width", f"step {epoch}: {_show(drafting)} must be over the sequences with k > 0")
        if (drafting.end != binding.length[wide] + binding.width[wide] - 1).any():
            raise VerificationError(
                "width",
                f"step {epoch}: {_show(drafting)} must end one before the last draft, k is "
                f"{binding.width[wide].tolist()}",
            )


def _verify_prefill(binding: Binding) -> None:
    """A chunk is one sequence's, of tokens that it knows."""
    for span in binding.spans:
        if span.lanes.size != binding.lanes.size or (span.lanes != binding.lanes).any():
            raise VerificationError("lanes", f"step {binding.epoch}: {_show(span)} is not over the bound lanes")
        if (span.end > binding.length).any():
            raise VerificationError(
                "known", f"step {binding.epoch}: {_show(span)} goes past the {binding.length.tolist()} known tokens"
            )


def _verify_span(binding: Binding, span: BoundSpan, ledger: RoleLedger) -> None:
    lanes, epoch = span.lanes, binding.epoch
    if (lanes < 0).any() or (lanes >= ledger.is_open.size).any() or not ledger.is_open[lanes].all():
        raise VerificationError("lanes", f"step {epoch}: {_show(span)} has a lane that is not open")
    if (span.begin >= span.end).any() or (span.begin != ledger.committed[lanes]).any():
        raise VerificationError(
            "watermark",
            f"step {epoch}: {_show(span)} must begin at the committed marks "
            f"{ledger.committed[lanes].tolist()} and not be empty",
        )
    if (span.end != ledger.reserved[lanes]).any():
        raise VerificationError(
            "reserved", f"step {epoch}: {_show(span)} is not what is reserved, up to {ledger.reserved[lanes].tolist()}"
        )
    if (span.end > ledger.capacity).any():
        raise VerificationError("capacity", f"step {epoch}: {_show(span)} goes past the capacity {ledger.capacity}")
    if (span.end > ledger.page_count[lanes] * ledger.page_size).any():
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
    if rows > inputs.rows or starts[0] != 0 or (starts[1 : n + 1] <= starts[:n]).any() or starts[n] != rows:
        raise VerificationError("row order", f"{filled.role}: row_start {starts.tolist()} does not cover {rows} rows")
    count = np.diff(starts[: n + 1])
    begin, end = inputs.kv_len[:n] - count, inputs.kv_len[:n]
    if (begin != filled.begin).any() or (end != filled.end).any() or (end > ledger.reserved[filled.lanes]).any():
        raise VerificationError(
            "kv length",
            f"{filled.role}: kv_len {end.tolist()} with {count.tolist()} rows is not the planned span "
            f"{filled.begin.tolist()} .. {filled.end.tolist()} within reserved "
            f"{ledger.reserved[filled.lanes].tolist()}",
        )
    written, committed = ledger.written[filled.lanes], ledger.committed[filled.lanes]
    if (begin > written).any() or (begin < committed).any():
        raise VerificationError(
            "kv length",
            f"{filled.role}: rows from positions {begin.tolist()} must follow what is written, up to "
            f"{written.tolist()}, and what is committed, up to {committed.tolist()}",
        )
    position = inputs.positions[:rows]
    lane = filled.lanes if rows == n else np.repeat(filled.lanes, count)
    expected = begin if rows == n else np.arange(rows) + np.repeat(begin - starts[:n], count)
    if (position != expected).any():
        raise VerificationError(
            "row order", f"{filled.role}: positions {position.tolist()}, expected {expected.tolist()}"
        )
    page = inputs.slots[:rows] // size
    if (page < 0).any() or (page > pool.total).any():
        raise VerificationError(
            "slots", f"{filled.role}: slots {inputs.slots[:rows].tolist()} are not all in the {pool.total} pages"
        )
    offset = inputs.slots[:rows] - page * size
    own = pool.owner[page] == lane
    if not own.all() or (pool.ordinal[page] * size + offset != position).any():
        bad = int(np.flatnonzero(~own | (pool.ordinal[page] * size + offset != position))[0])
        raise VerificationError(
            "slots",
            f"{filled.role}: row {bad} of lane {lane[bad]} at position {position[bad]} would write slot "
            f"{inputs.slots[bad]}, which is page {page[bad]} (owner {pool.owner[page[bad]]}, page number "
            f"{pool.ordinal[page[bad]]} of its sequence)",
        )
    _verify_page_table(inputs, filled, ledger, end)
    if (inputs.slots[rows:] // size != SCRATCH_PAGE).any() or (starts[n:] != rows).any() or inputs.kv_len[n:].any():
        raise VerificationError("padding", f"{filled.role}: padded rows must use the scratch slot and read nothing")
    ledger.written[filled.lanes] = np.maximum(written, end)


def _verify_page_table(inputs: RowInputs, filled: FilledRows, ledger: RoleLedger, end: Ints32) -> None:
    n, size = filled.lanes.size, ledger.page_size
    needed = -(-end // size)
    columns = int(needed.max())
    table = inputs.page_table[:n, :columns]
    read = np.arange(columns) < needed[:, None]
    held = (table != SCRATCH_PAGE) & (table == ledger.page_table[filled.lanes, :columns])
    if (read & ~held).any():
        bad = int(np.flatnonzero((read & ~held).any(axis=1))[0])
        raise VerificationError(
            "page table",
            f"{filled.role}: lane {filled.lanes[bad]} would read pages {table[bad].tolist()}, it holds "
            f"{ledger.page_table[filled.lanes[bad], :columns].tolist()}",
        )
    if (inputs.page_table[n:, :columns] != SCRATCH_PAGE).any():
        raise VerificationError("padding", f"{filled.role}: padded rows of the page table must be the scratch page")


def _show(span: BoundSpan) -> str:
    parts = [
        f"lane {a} {b}..{c}"
        for a, b, c in zip(span.lanes.tolist(), span.begin.tolist(), span.end.tolist(), strict=True)
    ]
    return f"{span.role} span ({', '.join(parts)})"
