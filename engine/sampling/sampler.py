"""Feeds the sampler's programs: from rows of logits to tokens.

Owns `Sampler`. What always holds: the logits of a row are edited only by its own sequence's edits (`adjust.py`),
and only after anything that wants them raw has taken its copy; each row's noise is keyed by its sequence's seed and its
token's position, so which rows share a call never matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import SequenceFault
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.sampling.edits import Edits
from slotwise.plans.arrays import rows_array
from slotwise.plans.program import SAMPLER
from slotwise.plans.sampling import ACCEPT, CHEAPER, FILTER, SAMPLE
from slotwise.slots.rows import FilledRows
from slotwise.slots.step import TARGET

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Tokens int64[n] drawn for n rows, and whether each row could be drawn from."""

    tokens: Ints
    ok: Bools


class Sampler:
    """Runs sampler programs of `executor` with the settings of `lanes`, on logits of the model of `role`."""

    def __init__(self, executor: Executor, lanes: Lanes, role: str = TARGET) -> None:
        self._executor = executor
        self._lanes = lanes
        self._arrays = executor.arrays
        self.vocab_size = executor.plan.role(role).vocab_size
        """Token ids that it draws from."""
        self._logits, self.scores_name = (
            rows_array(name, self.vocab_size, executor.plan.target.vocab_size) for name in ("logits", "scores")
        )

    @property
    def logits(self) -> Floats:
        """The logits that the last model program gave, [R, V], to be read or edited."""
        found: Floats = self._arrays[self._logits].view(np.float32)
        return found

    @property
    def scores(self) -> Floats:
        """The scores that the last `filter` or `sample` program gave, [R, V]."""
        found: Floats = self._arrays[self.scores_name].view(np.float32)
        return found

    def edit(self, row: int, edits: Edits) -> None:
        """Apply one sequence's edits to the logits of `row`; those of ids that the model lacks change nothing."""
        edits.apply(self.logits[row])

    def is_dead(self, row: int) -> bool:
        """Whether the logits of `row` leave no token to choose from, though none of them is broken."""
        return bool(np.isneginf(self.logits[row].max()))

    def sample(self, row_lanes: Ints, positions: Ints, kind: str = SAMPLE) -> SampledRows:
        """Draw a token for each of the first rows of the logits; row i is lane `row_lanes[i]`'s, at `positions[i]`.

        When every row is greedy, and scores are not asked for, the cheaper `greedy` program runs: same tokens.
        """
        rows = row_lanes.size
        kind = self.cheapest(kind, row_lanes)
        if kind not in CHEAPER.values():
            self.set_controls(row_lanes, positions)
        self._run(kind, rows)
        tokens = self._arrays["sampled"][:rows].astype(np.int64)
        return SampledRows(tokens, self._arrays["ok"][:rows].astype(bool) & self.in_vocabulary(tokens))

    def cheapest(self, kind: str, row_lanes: Ints) -> str:
        """`greedy` where `sample` is asked for and every row is greedy, of whichever width; else `kind`."""
        return CHEAPER[kind] if kind in CHEAPER and not self._lanes.temperature[row_lanes].any() else kind

    def in_vocabulary(self, tokens: Ints) -> Bools:
        """Which of `tokens` are ids of this model: what a kernel says is checked like anyone's word."""
        inside: Bools = (tokens >= 0) & (tokens < self.vocab_size)
        return inside

    def filter(self, row_lanes: Ints, positions: Ints) -> None:
        """Turn the first rows of the logits into scores."""
        self.set_controls(row_lanes, positions)
        self._run(FILTER, row_lanes.size)

    def accept(self, rows: FilledRows) -> list[int]:
        """Run the acceptance program on what the arrays hold: how many drafts of each sequence are accepted.

        Raises SequenceFault when the kernel's counts cannot be true.
        """
        self._executor.run(SAMPLER, ACCEPT, rows.bucket)
        accepted = self._arrays["accepted"][: rows.lanes.size].astype(np.int64)
        drafts = rows.end - rows.begin - 1
        if np.count_nonzero((accepted < 0) | (accepted > drafts)):
            raise SequenceFault(f"the acceptance kernel accepted {accepted.tolist()} of {drafts.tolist()} drafts")
        counts: list[int] = accepted.tolist()
        return counts

    def _run(self, kind: str, rows: int) -> None:
        self._executor.run(SAMPLER, kind, self._executor.bucket(SAMPLER, kind, rows))

    def set_controls(self, row_lanes: Ints, positions: Ints) -> None:
        """Hand the first rows their lanes' settings and the positions that key their noise."""
        rows, lanes, arrays = row_lanes.size, self._lanes, self._arrays
        arrays["temperature"][:rows] = lanes.temperature[row_lanes]
        arrays["top_k"][:rows] = lanes.top_k[row_lanes]
        arrays["top_p"][:rows] = lanes.top_p[row_lanes]
        arrays["min_p"][:rows] = lanes.min_p[row_lanes]
        arrays["seed"][:rows] = lanes.seed[row_lanes]
        arrays["token_positions"][:rows] = positions
        # Rows beyond are padding: greedy, so that nothing is sorted for them.
        arrays["temperature"][rows:] = 0
