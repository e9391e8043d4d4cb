"""Coupled acceptance: a draft is accepted when it is what the target draws in its place, with the same noise.

What always holds: the token at position p is a function of (logits, seed, p) alone, so the output with any drafter, any
width and any batch is the output without speculation, bit for bit, greedy and sampled alike.
Source: Daliri, Musco and Suresh, "Coupling without communication and drafter-invariant speculative decoding", 2024.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slotwise.engine.acceptance import Verdict, broken_row
from slotwise.engine.sampling.sampler import Sampler
from slotwise.slots.rows import FilledRows


class Coupled:
    """Draws at every verified row and counts how many drafts agree."""

    name = "coupled"

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def judge(self, rows: FilledRows, draft_scores: npt.NDArray[np.float32] | None) -> list[Verdict]:
        """See `Acceptance.judge`; `draft_scores` play no part."""
        drawn = self._sampler.sample(rows.row_lanes, rows.row_positions + 1)
        starts, tokens = rows.row_start.tolist(), drawn.tokens.tolist()
        has_drafts = rows.rows > rows.lanes.size
        accepted = self._sampler.accept(rows) if has_drafts else [0] * rows.lanes.size
        all_ok = bool(drawn.ok.all())
        verdicts = []
        for i, count in enumerate(accepted):
            first, last = starts[i], starts[i] + count + 1
            if not all_ok and not drawn.ok[first:last].all():
                # Rows before the broken one stand: without speculation they would have been given too.
                good = int(np.argmin(drawn.ok[first:last]))
                verdicts.append(Verdict(tokens[first : first + good], broken_row()))
            else:
                verdicts.append(Verdict(tokens[first:last]))
        return verdicts
