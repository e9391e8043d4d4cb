"""One call of a model's program on rows of several sequences.

Owns `run_rows`, `prepare_rows` and `cut_by_rows`. What always holds: the rows are verified against the
ledger before the program runs; a step with more rows than a program holds is cut between sequences, never inside one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Ints, Lanes
from slotwise.plans.program import DECODE
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.rows import FilledRows, fill_rows
from slotwise.slots.verify_binding import verify_rows


def run_rows(
    executor: Executor,
    ledger: RoleLedger,
    lanes: Lanes,
    role: str,
    chosen: Ints,
    begin: Ints,
    end: Ints,
    kind: str = DECODE,
) -> FilledRows:
    """Run positions `begin .. end` of the lanes `chosen` through `role`; their logits are in the engine's array."""
    filled = prepare_rows(executor, ledger, lanes, role, chosen, begin, end, kind)
    executor.run(role, kind, filled.bucket)
    return filled


def prepare_rows(
    executor: Executor,
    ledger: RoleLedger,
    lanes: Lanes,
    role: str,
    chosen: Ints,
    begin: Ints,
    end: Ints,
    kind: str = DECODE,
) -> FilledRows:
    """Fill and verify the rows of `run_rows`, and run nothing."""
    bucket = executor.bucket(role, kind, int((end - begin).sum()))
    inputs = executor.row_inputs(role, bucket)
    filled = fill_rows(inputs, ledger, lanes.tokens, chosen, begin, end)
    verify_rows(inputs, filled, ledger)
    return filled


def cut_by_rows(rows: Ints, most: int) -> Iterator[slice]:
    """Cut sequences with `rows` rows each into runs of at most `most` rows; every single one must fit."""
    total = np.cumsum(rows)
    if total.size and total[-1] <= most:
        yield slice(0, total.size)
        return
    start, done = 0, 0
    for i, upto in enumerate(total.tolist()):
        if upto - done > most:
            yield slice(start, i)
            start, done = i, int(total[i - 1])
    yield slice(start, total.size)
