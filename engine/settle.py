"""What a decode step leaves behind: marks that are committed, and each sequence's tokens and counts.

Owns `Settler`. What always holds: marks move as the plan's step says, by its own expressions; stops and the budget cut
before that, but for a step started ahead, which commits its one slot a sequence whatever its token is.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from slotwise.engine.acceptance import Verdict
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.sampling.logprobs import logprobs_of
from slotwise.engine.sampling.sampler import Floats
from slotwise.engine.sequence import Sequence
from slotwise.engine.width import WidthPolicy
from slotwise.plans.plan import Plan
from slotwise.slots.binding import Binding
from slotwise.slots.ledger import Ledger
from slotwise.slots.step import DRAFT


class Settler:
    """Settles the decode steps of a plan."""

    def __init__(self, plan: Plan, lanes: Lanes, ledger: Ledger, policy: WidthPolicy) -> None:
        self._lanes = lanes
        self._ledger = ledger
        self._policy = policy
        self._commits = [(op.spans[0].role, op.ends) for op in plan.step("decode").ops if op.op == "commit"]

    def keep(self, sequence: Sequence, verdict: Verdict, width: int, raw: Floats | None) -> int:
        """Let a sequence take its tokens, up to its first stop; returns how many. `raw`: unedited logits, if kept."""
        count = sequence.keep(verdict.candidates)
        sequence.verifications += 1
        sequence.drafted += width
        # Where nothing went wrong, the last candidate is the target's own.
        sequence.accepted += min(count, len(verdict.candidates) - (verdict.fault is None))
        asked = sequence.request.sampling.logprobs
        if asked is not None and raw is not None:
            sequence.logprobs += logprobs_of(raw, verdict.candidates[:count], asked, sequence.bytes_of)
        return count

    def note_peaks(self, binding: Binding, places: list[int]) -> None:
        """Remember how many slots the sequences at `places` of the binding have had at most, this step's included."""
        whole = len(places) == binding.lanes.size
        chosen = binding.lanes if whole else binding.lanes[places]
        for role, peak in self._lanes.peak_slots.items():
            span = binding.span(role)
            if span is None or span.lanes.size < binding.lanes.size:
                peak[chosen] = np.maximum(peak[chosen], self._ledger[role].committed[chosen])
            if span is not None:
                # Only of a step started ahead have some ended, and it has no span but the target's, over all lanes.
                lanes, ends = (span.lanes, span.end) if whole else (chosen, span.end[places])
                peak[lanes] = np.maximum(peak[lanes], ends)

    def commit(self, binding: Binding, whole: npt.NDArray[np.bool_], kept: Ints) -> None:
        """Move the committed marks as the step says; what faulted is left to be released when it closes."""
        chosen, length, width, count = binding.lanes, binding.length, binding.width, kept
        if not whole.all():
            chosen, length, width, count = chosen[whole], length[whole], width[whole], count[whole]
        marks = {"len": length, "kept": count, "k": width}
        drafting = np.flatnonzero(width)
        for role, expressions in self._commits:
            ends = functools.reduce(np.minimum, [end.evaluate(marks) for end in expressions])
            if role == DRAFT:
                self._ledger[role].commit(chosen[drafting], ends[drafting])
            else:
                self._ledger[role].commit(chosen, ends)
        lanes = self._lanes
        if drafting.size:  # a step without drafts says nothing of how many are accepted
            lanes.rate[chosen] = self._policy.update(lanes.rate[chosen], width, np.clip(count - 1, 0, width))
        lanes.steps[chosen] += 1
