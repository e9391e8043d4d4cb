"""Rejection acceptance: keeps the target's distribution and accepts as many drafts as any rule can.

What always holds: each token is distributed as if the target had drawn it; which token it is depends on the drafter.
Sources: Leviathan, Kalman and Matias, 2023; Chen et al., 2023.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slotwise.engine.acceptance import Verdict, broken_row
from slotwise.engine.executor import Executor
from slotwise.engine.sampling.sampler import Sampler
from slotwise.slots.rows import FilledRows


class Rejection:
    """Compares the target's probability of each draft with the drafter's."""

    name = "rejection"

    def __init__(self, executor: Executor, sampler: Sampler) -> None:
        self._executor = executor
        self._sampler = sampler

    def judge(self, rows: FilledRows, draft_scores: npt.NDArray[np.float32] | None) -> list[Verdict]:
        """See `Acceptance.judge`."""
        arrays, count = self._executor.arrays, rows.rows
        self._sampler.filter(rows.row_lanes, rows.row_positions + 1)
        token_ids = arrays["token_ids"]
        scores = arrays["draft_scores"]
        if draft_scores is not None:
            scores[:count] = draft_scores
        elif count > rows.lanes.size:
            scores[:count] = -np.inf
            scores[np.arange(count - 1), token_ids[1:count]] = 0
        accepted = self._sampler.accept(rows)
        n = rows.lanes.size
        following = arrays["following"][:n].astype(np.int64)
        ok = (arrays["accept_ok"][:n].astype(bool) & self._sampler.in_vocabulary(following)).tolist()
        verdicts = []
        for i, first in enumerate(rows.row_start[:-1].tolist()):
            drafts = token_ids[first + 1 : first + 1 + accepted[i]].tolist()
            verdicts.append(Verdict([*drafts, int(following[i])]) if ok[i] else Verdict(drafts, broken_row()))
        return verdicts
