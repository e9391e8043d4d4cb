"""Acceptance rules: which drafts become tokens. One file each.

Owns `Acceptance` and `Verdict`. What always holds: a verdict's candidates begin with the accepted drafts, in order, and
end with one token that the target chose itself; whatever a rule says, stops and the budget cut after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import SequenceFault, SlotwiseError
from slotwise.slots.rows import FilledRows


def broken_row() -> SequenceFault:
    """The fault of a sequence that met a row of logits without a finite greatest entry."""
    return SequenceFault("the target's logits are not finite (NaN, infinite, or no token left to choose from)")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One sequence's outcome: tokens in order, and why it cannot go on after them (None when it can)."""

    candidates: list[int]
    fault: SlotwiseError | None = None


class Acceptance(Protocol):
    """Turns the logits of verified rows into verdicts."""

    name: str

    def judge(self, rows: FilledRows, draft_scores: npt.NDArray[np.float32] | None) -> list[Verdict]:
        """A verdict for each sequence of `rows`, whose logits the target has just given.

        `draft_scores`, [rows, V], holds in row i what the draft after row i was drawn from; None means certainty.
        """
