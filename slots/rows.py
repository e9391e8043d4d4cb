"""What a program is fed: rows of token ids, positions, slots and page tables, padded to its bucket.

Owns `RowInputs` and `fill_rows`. What always holds: real rows come first, sequence by sequence, in position order;
padded rows have token 0 at position 0, write the scratch slot, and belong to no sequence, so they read nothing.
Columns of the page table beyond the longest sequence of the call are left as they were: `kv_len` keeps every kernel
from reading them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slotwise.slots.binding import BoundSpan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.pages import SCRATCH_PAGE

Ints = npt.NDArray[np.int64]
Ints32 = npt.NDArray[np.int32]


@dataclass(slots=True)
class RowInputs:
    """Writable views of the arrays that one program reads: `rows` is its bucket T, B = T.

    `id_limit` is the first token id that the program's model has no embedding for, where others of the run have more;
    None where every id is the model's, which is checked where ids enter.
    """

    rows: int
    token_ids: Ints32  # [T]
    positions: Ints32  # [T]
    slots: Ints32  # [T]
    row_start: Ints32  # [T + 1]
    kv_len: Ints32  # [T]
    page_table: Ints32  # [T, P]
    id_limit: int | None = None


@dataclass(frozen=True, slots=True)
class FilledRows:
    """Which real rows a call has: `lanes[i]` has rows `row_start[i] .. row_start[i+1]`, positions from `begin[i]`.

    `row_lanes` and `row_positions` say the same row by row.
    """

    role: str
    bucket: int
    lanes: Ints
    begin: Ints
    end: Ints
    row_start: Ints
    row_lanes: Ints
    row_positions: Ints

    @property
    def rows(self) -> int:
        """Real rows."""
        return int(self.row_start[-1])


def fill_rows(inputs: RowInputs, ledger: RoleLedger, tokens: Ints32, span: BoundSpan, upto: int = 0) -> FilledRows:
    """Write the rows for the positions of `span` into `inputs`; `tokens` is [lanes, capacity].

    Every lane must have at least one row, and all of them must fit the bucket. Page tables reach the longest end, and
    `upto` where more is read through them later.
    """
    lanes, begin, end = span.lanes, span.begin, span.end
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
    columns = -(-max(int(end.max()), upto) // size)
    inputs.page_table[:n, :columns] = ledger.page_table[lanes, :columns]
    if total < inputs.rows:
        inputs.token_ids[total:] = 0
        inputs.positions[total:] = 0
        inputs.slots[total:] = SCRATCH_PAGE
    if n < inputs.rows:
        inputs.row_start[n + 1 :] = total
        inputs.kv_len[n:] = 0
        inputs.page_table[n:, :columns] = SCRATCH_PAGE
    return FilledRows(ledger.role, inputs.rows, lanes, begin, end, row_start, row_lane, position)
