"""Plans one decode step: widths, spans, reservations.

Owns `DecodePlanner`. What always holds: widths come from the plan's formula with this step's numbers, once, before
anything runs; a page that speculation would take never costs another sequence its own next token; the binding it
returns is reserved in the ledger and verified.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slotwise.engine.lanes import Ints, Lanes
from slotwise.plans.plan import Plan
from slotwise.slots.binding import Binding, Reach, WidthFormula, bind_decode
from slotwise.slots.ledger import Ledger, RoleLedger
from slotwise.slots.step import DRAFT, TARGET
from slotwise.slots.verify_binding import verify_binding

UNLIMITED = 2**40


class DecodePlanner:
    """Binds the plan's decode step to the lanes of one step."""

    def __init__(self, plan: Plan, lanes: Lanes, ledger: Ledger) -> None:
        target = plan.target
        constants = {"capacity": target.capacity, "rotary": target.positions}
        if plan.has_draft_model:
            constants["draft_capacity"] = plan.role(DRAFT).capacity
        self._step = plan.step("decode")
        self._formula = WidthFormula(self._step, constants)
        self._reach = {role.role: Reach(self._step, role.role) for role in plan.roles}
        self._lanes = lanes
        self._ledger = ledger
        self._target = ledger[TARGET]
        # A step reserves at most its drafts, its pending token and what the draft role catches up with.
        self._most_pages = 1 + -(-2 * (plan.options.speculate + 1) // target.page_size)
        self._draft: RoleLedger | None = ledger.roles.get(DRAFT)

    def lacks_pages(self, chosen: Ints) -> bool:
        """Whether the pool cannot give each lane even the slot of its pending token: someone must be preempted."""
        return not self._fits(self._target, chosen, self._reach[TARGET](self._lanes.length[chosen], 0))

    def plan(self, epoch: int, sequences: Sequence[int], chosen: Ints, offered: Ints) -> Binding:
        """Widths for the lanes `chosen`, at most `offered`; spans reserved in every role; verified.

        Raises OutOfPages, with nothing changed, when the pool cannot give even one slot a lane.
        """
        length = self._lanes.length[chosen]
        values = {
            "len": length,
            "speculate": offered,
            "budget": self._lanes.length_limit[chosen] - length,
            "room": UNLIMITED,
        }
        width = self._formula.widths(values)
        drafts = np.count_nonzero(width)
        reach = self._reach[TARGET]
        if drafts and not self._fits(self._target, chosen, reach(length, width)):
            values["room"] = self._rooms(self._target, chosen, reach(length, 0), reach(length, width))
            width = self._formula.widths(values)
        filled = None
        if self._draft is not None:
            filled = self._draft.committed[chosen]
            width = self._fit_draft(chosen, length, width) if drafts else width
        known = {**self._formula.constants, **values}
        binding = bind_decode(self._step, epoch, sequences, chosen, length, width, filled, known)
        self._reserve(binding)
        verify_binding(binding, self._ledger, epoch)
        return binding

    def _reserve(self, binding: Binding) -> None:
        for span in binding.spans:
            self._ledger[span.role].reserve(span.lanes, span.end)

    def _fit_draft(self, chosen: Ints, length: Ints, width: Ints) -> Ints:
        """`width`, but 0 for lanes that the draft role's pool has no pages for."""
        draft = self._draft
        if draft is None:
            return width
        ends = self._reach[DRAFT](length, width)
        if self._fits(draft, chosen, ends):
            return width
        left = draft.pool.available
        short = draft.pages_short(chosen, ends)
        fitted = width.copy()
        for i in np.flatnonzero(width).tolist():
            if short[i] <= left:
                left -= int(short[i])
            else:
                fitted[i] = 0
        return fitted

    def _fits(self, role: RoleLedger, chosen: Ints, ends: Ints) -> bool:
        """Whether the pool has the pages for each lane to reach its end; in a roomy pool nothing need be counted."""
        if role.pool.available >= chosen.size * self._most_pages:
            return True
        return int(role.pages_short(chosen, ends).sum()) <= role.pool.available

    @staticmethod
    def _rooms(role: RoleLedger, chosen: Ints, needed: Ints, wanted: Ints) -> Ints:
        """Slots that each lane can have: pages for `needed` first, for all; then, in order, more up to `wanted`."""
        must = role.pages_short(chosen, needed)
        more = role.pages_short(chosen, wanted) - must
        left = max(0, role.pool.available - int(must.sum()))
        granted = np.clip(left - (np.cumsum(more) - more), 0, more)
        rooms: Ints = (role.page_count[chosen] + must + granted) * role.page_size
        return rooms
