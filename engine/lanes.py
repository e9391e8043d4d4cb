"""What the planner knows of running sequences, as arrays.

Owns `Lanes`. What always holds: a lane is one running sequence's place in every array; `tokens[lane, :length[lane]]`
are its known tokens, and what stands after them are drafts of the step under way, or nothing; a lane is `draftable` as
long as the draft model has all of its tokens; arrays are indexed by lane, so a step over hundreds of sequences is
planned with a few array operations. Where a step has been launched and not read (`overlap.py`), a lane's length counts
the token that it will give, which does not stand there yet.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


class Lanes:
    """Arrays over `count` lanes for sequences of up to `capacity` tokens.

    `draft_ids` is how many token ids a draft model has, where the target has more.
    """

    def __init__(
        self, count: int, capacity: int, start_rate: float, roles: Iterable[str], draft_ids: int | None = None
    ) -> None:
        self.count = count
        self._draft_ids = draft_ids
        self.start_rate = start_rate
        # One column more than capacity: a lane at capacity is never fed its last token, but indexing stays simple.
        self.tokens: npt.NDArray[np.int32] = np.zeros((count, capacity + 1), np.int32)
        self.length: Ints = np.zeros(count, np.int64)
        self.length_limit: Ints = np.zeros(count, np.int64)
        self.seed: Ints = np.zeros(count, np.int64)
        self.temperature: npt.NDArray[np.float32] = np.zeros(count, np.float32)
        self.top_k: npt.NDArray[np.int32] = np.zeros(count, np.int32)
        self.top_p: npt.NDArray[np.float32] = np.ones(count, np.float32)
        self.min_p: npt.NDArray[np.float32] = np.zeros(count, np.float32)
        self.adjusts: npt.NDArray[np.bool_] = np.zeros(count, bool)
        self.draftable: npt.NDArray[np.bool_] = np.ones(count, bool)
        self.rate: npt.NDArray[np.float64] = np.full(count, start_rate)
        self.steps: Ints = np.zeros(count, np.int64)
        self.peak_slots: dict[str, Ints] = {role: np.zeros(count, np.int64) for role in roles}
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Lanes that no sequence has."""
        return len(self._free)

    def take(self) -> int:
        """A free lane (IndexError when there is none)."""
        return self._free.pop()

    def give_back(self, lane: int) -> None:
        """Return a lane; its arrays are stale until it is taken again."""
        self.length[lane] = 0
        self._free.append(lane)

    def put(self, lane: int, start: int, tokens: list[int]) -> None:
        """`tokens` stand from position `start` of a lane on; what is known reaches at least to their end.

        A token that the draft model lacks cannot be fed to it, and every later position would attend to it: so from it
        on the lane is not drafted for.
        """
        end = start + len(tokens)
        if self._draft_ids is not None:
            fits = max(tokens, default=0) < self._draft_ids
            self.draftable[lane] = fits and (not start or bool(self.draftable[lane]))
        self.tokens[lane, start:end] = tokens
        self.length[lane] = max(int(self.length[lane]), end)
