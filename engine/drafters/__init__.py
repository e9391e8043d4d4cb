"""Drafters: who proposes tokens. One file each.

Owns `Drafter` and `Drafting`. What always holds: a drafter proposes and touches no slot account: how wide a draft may
be, what is reserved for it, and what becomes of it, the ledger and the plan decide. Whatever it proposes, tokens with
`coupled` acceptance are those without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from slotwise.slots.binding import Binding, Ints


@dataclass(slots=True)
class Drafting:
    """What a drafter did for one binding.

    `tokens[i]` are the proposals for sequence i of the binding, exactly `width[i]` of them. `scores`, where the
    acceptance rule needs them, are the scores each was drawn from, [sum of widths, V] in the same order; None means
    that the drafter was certain of each. `broken` are the sequences for which it could not draft at all, by place in
    the binding.
    """

    tokens: list[list[int]]
    scores: npt.NDArray[np.float32] | None = None
    broken: dict[int, str] = field(default_factory=dict)


class Drafter(Protocol):
    """Proposes tokens for lanes."""

    kind: str

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        """A sequence with these known tokens has taken `lane`."""

    def extend(self, lane: int, tokens: Sequence[int]) -> None:
        """`tokens` were committed to the sequence of `lane`."""

    def end(self, lane: int) -> None:
        """The sequence of `lane` has left it."""

    def offer(self, lanes: Ints, widths: Ints) -> Ints:
        """How many tokens it could propose for each lane, at most `widths`; asked before slots are planned."""

    def draft(self, binding: Binding, at: Ints) -> Drafting:
        """Proposals for the sequences at places `at` of the binding (others get none), `binding.width` tokens each."""
