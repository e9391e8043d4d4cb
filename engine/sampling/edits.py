"""Edits of one row of logits: what history makes of each token's logit, merged to one edit a token.

Owns `Edit` and `Edits`. What always holds: an edit applies in stages, and of each stage any number merge into one
exactly: biases are added, then penalties divide, then penalties are added, then a logit grows by a share of its size,
then bans make it impossible. What is finite stays finite, however large a bias is; what a model leaves that is not
finite is handed on, for whoever draws to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_LARGEST: Final = np.finfo(np.float32).max


class Edit(NamedTuple):
    """One change of one logit z.

    `z += bias`; `z = z / divide if z > 0 else z * divide`; `z += add`; `z += abs(z) * grow`; and a ban makes it minus
    infinity.
    """

    bias: float = 0.0
    divide: float = 1.0
    add: float = 0.0
    grow: float = 0.0
    banned: bool = False


BAN: Final = Edit(banned=True)


def merged(edits: Iterable[Edit]) -> Edit:
    """The edit that does what `edits` do together, stage by stage."""
    found = tuple(edits)
    return Edit(
        bias=sum(edit.bias for edit in found),
        divide=math.prod(edit.divide for edit in found),
        add=sum(edit.add for edit in found),
        grow=sum(edit.grow for edit in found),
        banned=any(edit.banned for edit in found),
    )


@dataclass(frozen=True, eq=False)
class Edits:
    """Merged edits of one row of logits, one a token, by rising token id; the arrays are read-only.

    A row of `changes` is bias, divide, add, grow. `only`, where it is given, are the ids that are left to choose from:
    all others are banned. `forced` are ids of which one must come, whatever is said of them elsewhere.
    """

    tokens: Ints  # [E]
    changes: Floats  # [E, 4]
    banned: Bools  # [E]
    only: Ints | None = None
    forced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for array in (self.tokens, self.changes, self.banned):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, edits: Mapping[int, Edit]) -> Edits:
        """One edit a token."""
        ids = sorted(edits)
        changes = np.array([edits[token][:4] for token in ids], np.float64)
        return cls(
            np.array(ids, np.int64),
            np.clip(changes, -_LARGEST, _LARGEST).astype(np.float32).reshape(len(ids), 4),
            np.array([edits[token].banned for token in ids], np.bool_),
        )

    def overlaid(self, other: Edits) -> Edits:
        """These edits with those of `other` put in place of the same tokens', or inserted."""
        return self._with(other, in_place=True)

    def joined(self, other: Edits) -> Edits:
        """These edits and those of `other`, together."""
        return self._with(other, in_place=False)

    def apply(self, row: Floats) -> None:
        """Edit `row`, float32 [V], where it stands; a draft model may lack ids, whose edits change nothing."""
        if (self.only is not None or self.forced) and not np.isfinite(row.max()):
            return  # a row that is broken must not look sound
        if self.forced:
            row.fill(-np.inf)
            row[[token for token in self.forced if token < row.size]] = 0
            return
        count = int(np.searchsorted(self.tokens, row.size))
        if count:
            tokens = self.tokens[:count]
            raw = row[tokens]
            bias, divide, add, grow = self.changes[:count].T
            with np.errstate(over="ignore", invalid="ignore"):
                z = np.clip(raw + bias, -_LARGEST, _LARGEST)
                z = np.clip(np.where(z > 0, z / divide, z * divide), -_LARGEST, _LARGEST)
                z = np.clip(z + add, -_LARGEST, _LARGEST)
                z = np.clip(z + np.abs(z) * grow, -_LARGEST, _LARGEST)
            z[self.banned[:count]] = -np.inf
            row[tokens] = np.where(np.isfinite(raw), z, raw)
        if self.only is not None:
            only = self.only[self.only < row.size]
            left = row[only]
            row.fill(-np.inf)
            row[only] = left

    def _with(self, other: Edits, *, in_place: bool) -> Edits:
        if not len(other):
            return self
        at = np.searchsorted(self.tokens, other.tokens)
        known = np.zeros(len(other), dtype=np.bool_)
        inside = at < len(self)
        known[inside] = self.tokens[at[inside]] == other.tokens[inside]
        changes, banned, here = self.changes.copy(), self.banned.copy(), at[known]
        if in_place:
            changes[here], banned[here] = other.changes[known], other.banned[known]
        else:
            added, divided = changes[here] + other.changes[known], changes[here, 1] * other.changes[known, 1]
            changes[here] = np.clip(added, -_LARGEST, _LARGEST)
            changes[here, 1] = np.clip(divided, 0, _LARGEST)
            banned[here] |= other.banned[known]
        new = ~known
        return Edits(
            np.insert(self.tokens, at[new], other.tokens[new]),
            np.insert(changes, at[new], other.changes[new], axis=0),
            np.insert(banned, at[new], other.banned[new]),
            self.only,
            self.forced,
        )
