"""What the rounds of a draft loop are fed: the rows of all of them, filled before the one launch.

Owns `RoundInputs` and `fill_rounds`. What always holds: sequences come by width, the widest first, so those that still
draft in a round are its first ones, in the same places as before; whoever does not is padding there, which writes the
scratch slot and reads nothing. Tokens are not filled: a round reads those that the one before it sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from slotwise.slots.binding import BoundSpan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.pages import SCRATCH_PAGE
from slotwise.slots.rows import FilledRows, Ints, Ints32, RowInputs, fill_rows


@dataclass(slots=True)
class RoundInputs:
    """Writable views of the arrays of the rounds after the first, one row of each a round; of `[r]` round r + 1 reads
    the first B, the loop's sequences (`row_start`: B + 1). Page tables are the first round's.
    """

    positions: Ints32
    slots: Ints32
    row_start: Ints32
    kv_len: Ints32
    token_positions: Ints32


@dataclass(frozen=True, slots=True)
class FilledRounds:
    """Which rows a loop has: the `first` round's, and of lane `span.lanes[i]` one in each of the first `width[i]`
    rounds, the last one at `span.end[i] - 1`. Widths fall. `sequences` is the loop's bucket of sequences.
    """

    first: FilledRows
    sequences: int
    span: BoundSpan
    width: Ints

    @property
    def rounds(self) -> int:
        """Rounds in which anybody drafts."""
        return int(self.width[0])


def first_rows(span: BoundSpan, width: Ints) -> BoundSpan:
    """The rows of the first round, a span of one slot each: each lane's last known token, then those from its mark on.

    `span` is what a drafting step reserves: from the mark to one before the last draft.
    """
    lanes, last = span.lanes, span.end - width
    behind = last - span.begin
    if np.count_nonzero(behind):
        place = np.repeat(np.arange(lanes.size), behind)
        within = np.arange(place.size) - np.repeat(np.cumsum(behind) - behind, behind)
        lanes, last = np.concatenate([lanes, lanes[place]]), np.concatenate([last, span.begin[place] + within])
    return BoundSpan(span.role, lanes, last, last + 1)


def round_of(span: BoundSpan, width: Ints, number: int) -> BoundSpan:
    """What round `number` feeds when rounds run one by one: the first from the mark on, each later one its newest slot.

    Every lane of `span` must draft in that round: `number < width`.
    """
    end = span.end - width + 1 + number
    return BoundSpan(span.role, span.lanes, end - 1 if number else span.begin, end)


def fill_rounds(
    first: RowInputs,
    later: RoundInputs,
    sequences: int,
    ledger: RoleLedger,
    tokens: Ints32,
    span: BoundSpan,
    width: Ints,
) -> FilledRounds:
    """Write the rows of all rounds of `span`; `tokens` is [lanes, capacity], `width` is 1 or more and falls.

    The first round's rows must fit `first`, the lanes `sequences`, the rounds `later`.
    """
    rows = fill_rows(first, ledger, tokens, first_rows(span, width), int(span.end.max()))
    filled = FilledRounds(rows, sequences, span, width)
    rounds = filled.rounds - 1
    if not rounds:
        return filled
    lanes, n, size = span.lanes, span.lanes.size, ledger.page_size
    number = np.arange(1, rounds + 1)[:, None]
    # Whoever is done stands where it last drafted, but is padding.
    position = np.minimum(span.end - width + number, span.end - 1)
    column = position // size
    slots = ledger.page_table[lanes, column] * size + (position - column * size)
    kv_len = position + 1
    starts = np.minimum(np.arange(sequences + 1), n)
    later.token_positions[:rounds, :n] = kv_len
    if width[-1] <= rounds:
        drafting = width > number  # [rounds, n]
        slots, kv_len = np.where(drafting, slots, SCRATCH_PAGE), kv_len * drafting
        starts = np.minimum(starts, drafting.sum(1)[:, None])
    later.positions[:rounds, :n] = position
    later.slots[:rounds, :n] = slots
    later.kv_len[:rounds, :n] = kv_len
    later.row_start[:rounds, : sequences + 1] = starts
    if n < sequences:
        for array in (later.positions, later.kv_len, later.token_positions):
            array[:rounds, n:sequences] = 0
        later.slots[:rounds, n:sequences] = SCRATCH_PAGE
    return filled
