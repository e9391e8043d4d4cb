"""How many tokens to draft for each sequence, from the acceptance seen so far.

Owns the table of best widths and the running average. What always holds: widths and averages are functions of their
arguments alone (no clock, no randomness), and a width is within 0..max_width; slot limits are the planner's to apply
on top. Source of the expected tokens of a step: Leviathan et al. 2023, "Fast Inference from Transformers via
Speculative Decoding".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import OptionError

RATE_STEPS: Final = 128

Rates = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WidthPolicy:
    """Chooses draft widths. Costs are in units of one decode step of the target with one row.

    max_width    most tokens drafted in a step
    cost_ratio   cost of drafting one token
    row_cost     cost of verifying one more row
    memory       how much of the average an observed token leaves in place: 0 <= memory < 1
    start_rate   the rate assumed of a sequence that has drafted nothing
    probe_every  a sequence for which drafting does not pay drafts one token in so many steps, to notice when it would
    """

    max_width: int
    cost_ratio: float
    row_cost: float = 0.0
    memory: float = 15 / 16
    start_rate: float = 0.75
    probe_every: int = 16

    def __post_init__(self) -> None:
        if self.max_width < 0:
            raise OptionError(f"max_width: expected 0 or more, found {self.max_width}")
        if self.probe_every < 1:
            raise OptionError(f"probe_every: expected 1 or more steps, found {self.probe_every}")
        for name, cost in (("cost_ratio", self.cost_ratio), ("row_cost", self.row_cost)):
            if not 0 <= cost < math.inf:
                raise OptionError(f"{name}: expected a finite cost of 0 or more, found {cost}")
        if not 0 <= self.memory < 1:
            raise OptionError(f"memory: expected a number from 0 to below 1, found {self.memory}")
        if not 0 <= self.start_rate <= 1:
            raise OptionError(f"start_rate: expected a number from 0 to 1, found {self.start_rate}")

    @cached_property
    def table(self) -> Counts:
        """Best width by rate in steps of 1/128, int64 [129]; the smallest of equals."""
        rate = np.linspace(0, 1, RATE_STEPS + 1)[:, None]
        width = np.arange(self.max_width + 1)
        # 1 + p + ... + p^k: the accepted tokens and the one that verification itself gives.
        expected_tokens = np.cumsum(rate**width, axis=1)
        cost = 1 + (self.cost_ratio + self.row_cost) * width
        table: Counts = np.argmax(expected_tokens / cost, axis=1).astype(np.int64)
        table.flags.writeable = False
        return table

    def widths(self, rate: Rates, step_index: int | Counts) -> Counts:
        """Return the width for each sequence, int64 [n], by its acceptance rate [n] and its count of steps so far."""
        best: Counts = self.table[np.rint(rate * RATE_STEPS).astype(np.int64)]
        # Where no rate would make drafting pay, there is nothing to notice.
        if not self.table.any():
            return best
        probing = (best == 0) & (np.asarray(step_index) % self.probe_every == 0)
        return np.where(probing, 1, best)

    def update(self, rate: Rates, drafted: Counts, accepted: Counts) -> Rates:
        """Return the rates [n] after a step in which `accepted` of `drafted` tokens [n] were accepted.

        A step shows `accepted` successes and, if it fell short, one failure; what was drafted after it shows nothing.
        The outcomes of one step weigh alike: counting the failure last would pull every average down.
        """
        seen = np.minimum(accepted + 1, drafted)
        kept = self.memory**seen
        return rate * kept + (1 - kept) * (accepted / np.maximum(seen, 1))
