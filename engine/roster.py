"""Who waits and who runs: requests from their arrival to their end.

Owns `Roster`. What always holds: requests are admitted in order of arrival and none overtakes another; a running
sequence has a lane and an account in every role's ledger, and when it ends or gives its pages up both return; an
exception while one is admitted ends that one alone.
"""

from __future__ import annotations

import bisect
import contextlib

import numpy as np

from slotwise.core.errors import SlotwiseError
from slotwise.engine.decode import as_fault
from slotwise.engine.drafters import Drafter
from slotwise.engine.lanes import Lanes
from slotwise.engine.parts import lanes_of
from slotwise.engine.prefill import Prefiller
from slotwise.engine.request import FinishReason
from slotwise.engine.sequence import Sequence
from slotwise.slots.ledger import Ledger
from slotwise.slots.step import DRAFT, TARGET


class Roster:
    """The sequences of an engine: `waiting` and `running`, each in order of arrival."""

    def __init__(self, lanes: Lanes, ledger: Ledger, prefiller: Prefiller, drafter: Drafter) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._lanes = lanes
        self._ledger = ledger
        self._prefiller = prefiller
        self._drafter = drafter

    @property
    def filling(self) -> list[Sequence]:
        """Those that have a prompt, or what they had before they gave way, to fill."""
        return [s for s in self.running if s.state == "prefill"]

    @property
    def decoding(self) -> list[Sequence]:
        """Those that decode."""
        return [s for s in self.running if s.state == "decode"]

    def admit(self) -> list[Sequence]:
        """Give lanes to waiting sequences, oldest first, while there are lanes and pages; none overtakes another.

        Returns those that failed at it.
        """
        failed: list[Sequence] = []
        while self.waiting and self._lanes.free:
            sequence, pool = self.waiting[0], self._ledger[TARGET].pool
            if self._will_share(sequence):
                break
            prefix = self._prefiller.find_prefix(sequence)
            pages = -(-(len(sequence.tokens) + 1) // pool.page_size) - len(prefix)
            # A prefix page that nobody holds is no longer evictable once it is shared.
            resting = sum(int(pool.references[page] == 0) for page in prefix)
            if self.running and pages + resting + self._promised() > pool.available:
                break
            try:
                self._start(self.waiting.pop(0), prefix)
            except Exception as error:
                self.finish(sequence, "error", as_fault(error, sequence.id, "being admitted"))
                failed.append(sequence)
        return failed

    def preempt(self, sequence: Sequence) -> None:
        """Take a sequence's lane and pages; it waits again at its place in the order of arrival."""
        sequence.preemptions += 1
        self._leave(sequence)
        sequence.state = "waiting"
        bisect.insort(self.waiting, sequence, key=lambda other: other.id)

    def finish(self, sequence: Sequence, reason: FinishReason, error: SlotwiseError | None = None) -> None:
        """End a sequence wherever it is; its slots return in every role."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.lane is not None:
            if error is None:
                self._prefiller.publish(sequence)
            else:
                self._ledger.withdraw(sequence.lane)
            self._leave(sequence)
        sequence.end(reason, error)

    def take_in(self, sequence: Sequence, before: int) -> None:
        """Put the tokens that a sequence has kept since it had `before` into its lane; finish it if they ended it."""
        if sequence.finish_reason is not None:
            self.finish(sequence, sequence.finish_reason)
        elif sequence.lane is not None:
            fresh = sequence.tokens[before:]
            self._lanes.put(sequence.lane, before, fresh)
            try:
                self._drafter.extend(sequence.lane, fresh)
            except Exception as error:
                self.finish(sequence, "error", as_fault(error, sequence.id, "telling the drafter of its tokens"))

    def _will_share(self, sequence: Sequence) -> bool:
        """Whether the same prompt is being filled, so that this one takes its pages when it waits for them."""
        prompt = sequence.request.prompt_ids
        return self._prefiller.may_share(sequence) and any(s.request.prompt_ids == prompt for s in self.filling)

    def _promised(self) -> int:
        """Pages that admitted sequences still need for the tokens they have: not there for others to count on."""
        target = self._ledger[TARGET]
        return sum(int(target.pages_short(lanes_of([s]), np.array([len(s.tokens) + 1]))[0]) for s in self.filling)

    def _start(self, sequence: Sequence, prefix: list[int]) -> None:
        lanes, sampling = self._lanes, sequence.request.sampling
        lane = lanes.take()
        sequence.lane, sequence.state = lane, "prefill"
        bisect.insort(self.running, sequence, key=lambda other: other.id)
        lanes.put(lane, 0, sequence.tokens)
        lanes.length_limit[lane] = sequence.prompt_length + sequence.granted
        # Seeds are 64 unsigned bits, kept in signed words.
        lanes.seed[lane] = np.array([sequence.seed], np.uint64).view(np.int64)[0]
        lanes.temperature[lane], lanes.top_k[lane] = sampling.temperature, min(sampling.top_k, 2**31 - 1)
        lanes.top_p[lane], lanes.min_p[lane] = sampling.top_p, sampling.min_p
        lanes.adjusts[lane] = sequence.adjuster is not None
        lanes.rate[lane], lanes.steps[lane] = lanes.start_rate, 0
        target = self._ledger[TARGET]
        target.open(lane, prefix)
        sequence.shared_tokens += len(prefix) * target.page_size
        if DRAFT in self._ledger:
            self._ledger[DRAFT].open(lane, self._prefiller.find_draft_prefix(sequence))
        self._drafter.begin(lane, sequence.tokens)

    def _leave(self, sequence: Sequence) -> None:
        lane = sequence.lane
        if lane is None:
            return
        for role, peak in self._lanes.peak_slots.items():
            sequence.peak_slots[role] = max(sequence.peak_slots.get(role, 0), int(peak[lane]))
            peak[lane] = 0
        # A drafter that fails here has nobody left to fail; should the lane be taken again, it begins anew.
        with contextlib.suppress(Exception):
            self._drafter.end(lane)
        self._ledger.close(lane)
        self._lanes.give_back(lane)
        self.running.remove(sequence)
        sequence.lane = None
