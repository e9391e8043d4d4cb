"""How a tool watches the engine: called at each turn of a step, with the engine's own records.

Owns `Observer`. What always holds: an observer sees what was planned, reserved, verified and decided,
and changes none of it; an engine without observers does nothing for them; an observer handles its own failures.
"""

from __future__ import annotations

from collections.abc import Sequence

from slotwise.engine.acceptance import Verdict
from slotwise.engine.sequence import Sequence as Running
from slotwise.slots.binding import Binding


class Observer:
    """Watches an engine; override what is of interest.

    While one with `is_in_step` watches, each step is settled before the next is started. Where all do without, steps
    are started ahead: `bound` of one comes before `judged` of the one before it, in an epoch that may not have begun.
    """

    is_in_step = True

    def added(self, sequence: Running) -> None:
        """A request was queued, or ended at once because nothing may be generated."""

    def began(self, epoch: int) -> None:
        """Step `epoch` begins."""

    def bound(self, binding: Binding) -> None:
        """A prefill chunk or the decode step is reserved and verified, and about to run."""

    def judged(self, binding: Binding, verdicts: Sequence[Verdict]) -> None:
        """The decode step ran; drafts still stand behind each lane's tokens, and its tokens are in no sequence yet.

        Nothing is committed, but for a step started ahead; of such a step it is told unless all its sequences ended.
        """

    def ended(self, epoch: int) -> None:
        """The step is over and the ledger balances."""

    def crashed(self, epoch: int, error: Exception) -> None:
        """The step raised; the engine is as the error left it."""
