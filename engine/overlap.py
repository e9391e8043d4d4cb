"""Steps that the host does not wait for: it plans, verifies and starts the next one while they run.

Owns `Flight` and `Overlap`. What always holds: only a step without drafts is started ahead, whose marks do not depend
on its tokens (`plans/checks/overlap.py` proves it). So it is committed when it is started, and the next step is bound,
reserved and verified by the same rules as any. Tokens are read one step late and end sequences then; what the step in
flight computes for those that ended is dropped, and the slot that it took returns with their others.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from slotwise.engine.acceptance import Verdict, broken_row
from slotwise.engine.executor import Executor, Started
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.model_call import prepare_rows
from slotwise.engine.sampling.sampler import Sampler
from slotwise.engine.sequence import Sequence
from slotwise.plans.program import DECODE, SAMPLER
from slotwise.plans.sampling import GREEDY, SAMPLE
from slotwise.slots.binding import Binding
from slotwise.slots.ledger import Ledger
from slotwise.slots.rows import FilledRows
from slotwise.slots.step import TARGET
from slotwise.slots.verify_follow import verify_follow


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that has been started and committed, and whose tokens have not been read."""

    binding: Binding
    sequences: tuple[Sequence, ...]
    rows: FilledRows
    started: Started


class Overlap:
    """Starts steps and reads them later, where the executor has a stream for them.

    `last_error` is the last that a step started ahead has met; it was run again, and waited for.
    """

    def __init__(self, executor: Executor, lanes: Lanes, ledger: Ledger, sampler: Sampler) -> None:
        self._executor = executor
        self._lanes = lanes
        self._target = ledger[TARGET]
        self._sampler = sampler
        self.last_error: Exception | None = None

    @property
    def is_possible(self) -> bool:
        """Whether steps may be started ahead now: nobody looks between kernels, or times them."""
        executor = self._executor
        is_watched = executor.conductor is not None or executor.probe is not None or executor.time_kernels
        return executor.stream is not None and not is_watched

    def takes(self, sequences: SequenceOf[Sequence], binding: Binding) -> bool:
        """Whether this step may be started ahead: one call, and nothing that the host does to its logits."""
        return (
            len(sequences) <= self._executor.most_rows(TARGET, DECODE)
            and not np.count_nonzero(binding.width)
            and not np.count_nonzero(self._lanes.adjusts[binding.lanes])
            and all(s.request.sampling.logprobs is None and not s.is_doubted for s in sequences)
        )

    def can_follow(self, flight: Flight) -> bool:
        """Whether what `flight` samples still stands in the kernels' arrays when the next step is started."""
        return flight.started.run == self._executor.runs

    def start(self, binding: Binding, sequences: SequenceOf[Sequence], before: Flight | None = None) -> Flight:
        """Fill and verify the step's rows and start it; with `before`, on the tokens that that flight samples."""
        rows = prepare_rows(self._executor, self._target, self._lanes, binding.reserved(TARGET))
        follows = None
        if before is not None:
            follows = _places(before.rows.lanes, rows.lanes)
            verify_follow(before.rows, rows, follows, self._target)
        kind = self._sampler.cheapest(SAMPLE, rows.row_lanes)
        if kind != GREEDY:
            self._sampler.set_controls(rows.row_lanes, binding.length)
        keys = (
            (TARGET, DECODE, rows.bucket),
            (SAMPLER, kind, self._executor.bucket(SAMPLER, kind, rows.rows)),
        )
        return Flight(binding, tuple(sequences), rows, self._executor.start(keys, follows))

    def read(self, flight: Flight) -> list[Verdict]:
        """Wait for the flight; a verdict for each of its sequences. Raises what its kernels raised."""
        sampled, drawn = self._executor.finish(flight.started, ("sampled", "ok"))
        n = len(flight.sequences)
        tokens: Ints = sampled[:n].astype(np.int64)
        ok = drawn[:n].astype(bool) & self._sampler.in_vocabulary(tokens)
        return [
            Verdict([token]) if good else Verdict([], broken_row())
            for token, good in zip(tokens.tolist(), ok.tolist(), strict=True)
        ]

    def doubt(self, sequences: SequenceOf[Sequence], error: Exception) -> None:
        """A flight with these in it failed: from now on their steps are waited for, to find whose fault it is."""
        self.last_error = error
        for sequence in sequences:
            sequence.is_doubted = True


def _places(lanes: Ints, chosen: Ints) -> Ints:
    """Where each of `chosen` stands in `lanes`; -1 for one that does not."""
    place = {lane: i for i, lane in enumerate(lanes.tolist())}
    return np.array([place.get(lane, -1) for lane in chosen.tolist()], np.int64)
