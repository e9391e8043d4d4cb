"""Plans a decode step so that what goes wrong for one sequence is its own.

Owns `StepBinder`. What always holds: a binding that it returns is reserved in the ledger and verified; when planning
fails, nothing stays reserved, the sequences that fail alone end, and the others are planned without them.
"""

from __future__ import annotations

import numpy as np

from slotwise.core.errors import OutOfPages, SlotwiseError
from slotwise.engine.decode import as_fault
from slotwise.engine.drafters import Drafter
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.parts import lanes_of
from slotwise.engine.planner import DecodePlanner
from slotwise.engine.roster import Roster
from slotwise.engine.sequence import Sequence
from slotwise.engine.width import WidthPolicy
from slotwise.plans.plan import Plan
from slotwise.slots.binding import Binding
from slotwise.slots.ledger import Ledger


class StepBinder:
    """Binds decode steps; those of `roster` that cannot go on end, or give way."""

    def __init__(
        self,
        plan: Plan,
        lanes: Lanes,
        ledger: Ledger,
        policy: WidthPolicy,
        drafter: Drafter,
        roster: Roster,
    ) -> None:
        self.planner = DecodePlanner(plan, lanes, ledger)
        self._options = plan.options
        self._lanes = lanes
        self._ledger = ledger
        self._policy = policy
        self._drafter = drafter
        self._roster = roster

    def lacks_pages(self, sequences: list[Sequence]) -> bool:
        """Whether the pool cannot give each of them even the slot of its pending token."""
        return self.planner.lacks_pages(lanes_of(sequences))

    def bind(self, epoch: int, decoding: list[Sequence]) -> tuple[list[Sequence], Binding | None, list[Sequence]]:
        """Plan the step: (who is in it, the binding, who ended because its part could not be planned)."""
        ended: list[Sequence] = []
        drafts = True
        while decoding:
            chosen = lanes_of(decoding)
            try:
                offered = self._offer(chosen) if drafts else np.zeros(chosen.size, np.int64)
                return decoding, self.planner.plan(epoch, [s.id for s in decoding], chosen, offered), ended
            except Exception as error:
                self.release(chosen)
                faults = {s.id: fault for s in decoding if (fault := self._fault_alone(epoch, s)) is not None}
                if not faults and isinstance(error, OutOfPages):
                    # Each alone can go on, together they want too much: the youngest gives way.
                    self._roster.preempt(decoding[-1])
                elif not faults and drafts:
                    drafts = False  # A drafter that fails for all together and for none alone: do without it.
                elif not faults:
                    raise
                for sequence in decoding:
                    if sequence.id in faults:
                        self._roster.finish(sequence, "error", faults[sequence.id])
                        ended.append(sequence)
                decoding = [s for s in decoding if s.state == "decode"]
        return [], None, ended

    def release(self, chosen: Ints) -> None:
        """Give back what the lanes `chosen` have reserved and not committed."""
        for role in self._ledger.roles.values():
            role.commit(chosen, role.committed[chosen])

    def _fault_alone(self, epoch: int, sequence: Sequence) -> SlotwiseError | None:
        """What goes wrong when this sequence is planned alone, None when nothing does; its reservation is undone."""
        chosen = lanes_of([sequence])
        try:
            self.planner.plan(epoch, [sequence.id], chosen, self._offer(chosen))
        except Exception as error:
            return as_fault(error, sequence.id, "planning its step")
        finally:
            self.release(chosen)
        return None

    def _offer(self, chosen: Ints) -> Ints:
        """The width that policy and drafter would like for each lane, before any limit."""
        if self._drafter.kind == "none":
            return np.zeros(chosen.size, np.int64)
        if self._options.adaptive:
            wanted = self._policy.widths(self._lanes.rate[chosen], self._lanes.steps[chosen])
        else:
            wanted = np.full(chosen.size, self._options.speculate, np.int64)
        return np.minimum(self._drafter.offer(chosen, wanted), wanted)
