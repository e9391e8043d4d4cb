"""The run-time verifier of draft loops: the rows of all rounds, before the one launch.

Owns `verify_rounds`. What always holds: as for the rows of one call (`verify_binding.py`), what is checked comes from
the ledger and the arrays themselves; rounds write slots that differ, for a lane's rows stand at positions that follow
each other, each in the lane's own page for it; what a round reads, it or an earlier one has written.
"""

from __future__ import annotations

import numpy as np

from slotwise.core.errors import VerificationError
from slotwise.slots.binding import BoundSpan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.pages import SCRATCH_PAGE
from slotwise.slots.rounds import FilledRounds, RoundInputs, first_rows
from slotwise.slots.rows import RowInputs
from slotwise.slots.verify_binding import some, verify_call


def verify_rounds(first: RowInputs, later: RoundInputs, filled: FilledRounds, ledger: RoleLedger) -> None:
    """Check the arrays that all rounds are about to read; rows that pass count as written from then on.

    Raises VerificationError: `row order`, `slots`, `kv length`, `page table` or `padding`.
    """
    span, width = filled.span, filled.width
    n, lanes, last = span.lanes.size, span.lanes, span.end
    if some(width < 1) or some(width[1:] > width[:-1]) or n > filled.sequences:
        raise VerificationError(
            "row order", f"{ledger.role}: widths {width.tolist()} must fall, for up to {filled.sequences} sequences"
        )
    if some(last > ledger.reserved[lanes]):
        raise VerificationError(
            "kv length",
            f"{ledger.role}: lanes {lanes.tolist()} would draft up to {last.tolist()}, reserved are "
            f"{ledger.reserved[lanes].tolist()}",
        )
    # Together a lane's rows are all from its committed mark on, so each sees those before it as this call's own.
    expected = first_rows(BoundSpan(span.role, lanes, ledger.committed[lanes], last), width)
    rows = filled.first
    if rows.lanes.size != expected.lanes.size or some((rows.lanes != expected.lanes) | (rows.begin != expected.begin)):
        raise VerificationError(
            "row order",
            f"{ledger.role}: the first round feeds positions {rows.begin.tolist()} of lanes {rows.lanes.tolist()}, "
            f"expected {expected.begin.tolist()} of {expected.lanes.tolist()}",
        )
    verify_call(first, rows, ledger, expected.begin)
    columns = -(-int(last.max()) // ledger.page_size)
    if some(-(-last // ledger.page_size) > ledger.page_count[lanes]) or some(
        first.page_table[:n, :columns] != ledger.page_table[lanes, :columns]
    ):
        raise VerificationError(
            "page table",
            f"{ledger.role}: rounds of lanes {lanes.tolist()} would read pages "
            f"{first.page_table[:n, :columns].tolist()}, they hold {ledger.page_table[lanes, :columns].tolist()}",
        )
    if filled.rounds > 1:
        _verify_later(later, filled, ledger)
    ledger.written[lanes] = last


def _verify_later(later: RoundInputs, filled: FilledRounds, ledger: RoleLedger) -> None:
    """The rounds after the first, all at once: arrays over [rounds, sequences]."""
    lanes = filled.span.lanes
    n, most, rounds = lanes.size, filled.sequences, filled.rounds - 1
    if rounds > len(later.positions):
        raise VerificationError("row order", f"{ledger.role}: {rounds} later rounds, room for {len(later.positions)}")
    number = np.arange(1, rounds + 1)[:, None]
    drafting = filled.width > number
    starts = np.minimum(np.arange(most + 1), np.add.reduce(drafting, axis=1)[:, None])
    if some(later.row_start[:rounds, : most + 1] != starts):
        raise VerificationError(
            "row order",
            f"{ledger.role}: row_start {later.row_start[:rounds, : most + 1].tolist()} must give those who draft a row",
        )
    position, slots = later.positions[:rounds, :n], later.slots[:rounds, :n]
    expected = filled.span.end - filled.width + number
    kv_len = later.kv_len[:rounds, :most]
    if some(kv_len[:, :n] != np.where(drafting, expected + 1, 0)) or some(kv_len[:, n:]):
        raise VerificationError(
            "kv length",
            f"{ledger.role}: kv_len {kv_len.tolist()}, expected one more than {expected.tolist()} for those who draft, "
            "and nothing to read for the rest",
        )
    if some(drafting & (position != expected)):
        raise VerificationError(
            "row order", f"{ledger.role}: positions {position.tolist()}, expected {expected.tolist()}"
        )
    size, pool = ledger.page_size, ledger.pool
    page = slots // size
    owner, ordinal = pool.owner.take(page, mode="clip"), pool.ordinal.take(page, mode="clip")
    wrong = (page < 0) | (page > pool.total) | (owner != lanes) | ((ordinal - page) * size + slots != position)
    if some(drafting & wrong):
        r, i = (int(at[0]) for at in np.nonzero(drafting & wrong))
        raise VerificationError(
            "slots",
            f"{ledger.role}: round {r + 1} of lane {lanes[i]} at position {position[r, i]} would write slot "
            f"{slots[r, i]}, which is not that position's in a page of its own",
        )
    if some(~drafting & (page != SCRATCH_PAGE)) or some(later.slots[:rounds, n:most] // size != SCRATCH_PAGE):
        raise VerificationError(
            "padding", f"{ledger.role}: whoever does not draft in a round must write the scratch slot"
        )
