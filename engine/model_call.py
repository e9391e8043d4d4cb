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
from slotwise.slots.binding import BoundSpan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.rows import FilledRows, fill_rows
from slotwise.slots.verify_binding import verify_rows


def run_rows(
    executor: Executor,
    ledger: RoleLedger,
    lanes: Lanes,
    span: BoundSpan,
    kind: str = DECODE,
) -> FilledRows:
    """Run the positions of `span` through its role's model; their logits are in the engine's array."""
    filled = prepare_rows(executor, ledger, lanes, span, kind)
    executor.run(span.role, kind, filled.bucket)
    return filled


def prepare_rows(
    executor: Executor,
    ledger: RoleLedger,
    lanes: Lanes,
    span: BoundSpan,
    kind: str = DECODE,
) -> FilledRows:
    """Fill and verify the rows of `run_rows`, and run nothing."""
    bucket = executor.bucket(span.role, kind, span.rows)
    inputs = executor.row_inputs(span.role, bucket)
    filled = fill_rows(inputs, ledger, lanes.tokens, span)
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
