"""What a program is fed: rows of token ids, positions, slots and page tables, padded to its bucket.

Owns `RowInputs` and `fill_rows`. What always holds: real rows come first, sequence by sequence, in position order; padded
rows have token 0 at position 0, write the scratch slot, and belong to no sequence, so they read nothing; page-table
entries that no sequence needs are the scratch page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from slotwise.core.ledger import RoleLedger
from slotwise.core.pages import SCRATCH_PAGE

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class RowInputs:
    """Writable views of the arrays that one program reads: `rows` is its bucket T, B = T.

    `used_columns` is how much of the page table earlier calls have written: cleared again as far as that.
    """

    rows: int
    token_ids: Ints32  # [T]
    positions: Ints32  # [T]
    slots: Ints32  # [T]
    row_start: Ints32  # [T + 1]
    kv_len: Ints32  # [T]
    page_table: Ints32  # [T, P]
    used_columns: int = 0


@dataclass(frozen=True, slots=True)
class FilledRows:
    """Which real rows a call has: `lanes[i]` has rows `row_start[i] .. row_start[i+1]`, positions from `begin[i]`."""

    role: str
    bucket: int
    lanes: Ints
    begin: Ints
    end: Ints
    row_start: Ints

    @property
    def rows(self) -> int:
        """Real rows."""
        return int(self.row_start[-1])


def fill_rows(inputs: RowInputs, ledger: RoleLedger, tokens: Ints32, lanes: Ints, begin: Ints, end: Ints) -> FilledRows:
    """Write the rows for positions `begin .. end` of each lane into `inputs`; `tokens` is [lanes, capacity].

    Every lane must have at least one row, and all of them must fit the bucket.
    """
    count = end - begin
    n = lanes.size
    row_start = np.zeros(n + 1, np.int64)
    np.cumsum(count, out=row_start[1:])
    total = int(row_start[-1])
    if total == n:
        row_lane, position = lanes, begin
    else:
        row_lane = np.repeat(lanes, count)
        position = np.arange(total) + np.repeat(begin - row_start[:-1], count)
    size = ledger.page_size
    column = position // size
    inputs.token_ids[:total] = tokens[row_lane, position]
    inputs.positions[:total] = position
    inputs.slots[:total] = ledger.page_table[row_lane, column] * size + (position - column * size)
    inputs.row_start[: n + 1] = row_start
    inputs.kv_len[:n] = end
    columns = -(-int(end.max()) // size)
    width = max(columns, inputs.used_columns)
    inputs.page_table[:n, :width] = ledger.page_table[lanes, :width]
    if total < inputs.rows:
        inputs.token_ids[total:] = 0
        inputs.positions[total:] = 0
        inputs.slots[total:] = SCRATCH_PAGE
    if n < inputs.rows:
        inputs.row_start[n + 1 :] = total
        inputs.kv_len[n:] = 0
        inputs.page_table[n:, :width] = SCRATCH_PAGE
    inputs.used_columns = columns
    return FilledRows(ledger.role, inputs.rows, lanes, begin, end, row_start)
