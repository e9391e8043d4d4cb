"""No drafter: every step is an ordinary decode step.

What always holds: it offers nothing, so every width is 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slotwise.engine.drafters import Drafting
from slotwise.slots.binding import Binding, Ints


class NoDrafter:
    """Offers nothing."""

    kind = "none"

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        """Nothing to do."""

    def extend(self, lane: int, tokens: Sequence[int]) -> None:
        """Nothing to do."""

    def end(self, lane: int) -> None:
        """Nothing to do."""

    def offer(self, lanes: Ints, widths: Ints) -> Ints:
        """Zero for every lane."""
        return np.zeros_like(widths)

    def draft(self, binding: Binding, at: Ints) -> Drafting:
        """No tokens."""
        return Drafting([[] for _ in binding.sequences])
