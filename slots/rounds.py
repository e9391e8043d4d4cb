"""What the rounds of a draft loop are fed: the rows of all of them, filled before the one launch.

Owns `RoundInputs` and `fill_rounds`. What always holds: sequences come by width, the widest first, so those that still
draft in a round are its first ones, in the same places as before; whoever does not is padding there, which writes the
scratch slot and reads nothing. Tokens are not filled: a round reads those that the one before it sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    """Which rows a loop has: the `first` round's, and of lane `lanes[i]`, with `length[i]` known tokens, one in each of
    the first `width[i]` rounds; `width` falls. `sequences` is the loop's bucket of sequences.
    """

    first: FilledRows
    sequences: int
    lanes: Ints
    length: Ints
    width: Ints

    @property
    def rounds(self) -> int:
        """Rounds in which anybody drafts."""
        return int(self.width[0])


def first_rows(lanes: Ints, length: Ints, filled: Ints) -> tuple[Ints, Ints]:
    """(lanes, positions) of the first round: each lane's last known token, then those from its mark `filled` on."""
    behind = length - 1 - filled
    if not np.count_nonzero(behind):
        return lanes, length - 1
    place = np.repeat(np.arange(lanes.size), behind)
    within = np.arange(place.size) - np.repeat(np.cumsum(behind) - behind, behind)
    return np.concatenate([lanes, lanes[place]]), np.concatenate([length - 1, filled[place] + within])


def fill_rounds(
    first: RowInputs,
    later: RoundInputs,
    sequences: int,
    ledger: RoleLedger,
    tokens: Ints32,
    lanes: Ints,
    length: Ints,
    width: Ints,
) -> FilledRounds:
    """Write the rows of all rounds; `tokens` is [lanes, capacity], `width` is 1 or more and falls.

    The first round's rows must fit `first`, the lanes `sequences`, the rounds `later`.
    """
    row_lanes, position = first_rows(lanes, length, ledger.committed[lanes])
    last = length + width - 1
    rows = fill_rows(first, ledger, tokens, row_lanes, position, position + 1, int(last.max()))
    filled = FilledRounds(rows, sequences, lanes, length, width)
    rounds = filled.rounds - 1
    if not rounds:
        return filled
    n, size = lanes.size, ledger.page_size
    number = np.arange(1, rounds + 1)[:, None]
    # Whoever is done stands where it last drafted, but is padding.
    position = np.minimum(length - 1 + number, last - 1)
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
