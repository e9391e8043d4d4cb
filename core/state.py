"""What a layer remembers, declared: the states of a model, and which of them live and die together.

Owns `StatePart`, `StateSpec` and `StateGroup`. What always holds: a state says all that accounting needs to know of it,
its size for one token or one sequence, how far back it is read, what becomes of it when drafts are rejected; whoever
allocates, prints, saves or checks states reads it here and assumes no shape of K and V.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slotwise.core.specs import DType

Unit = Literal["token", "sequence"]
OnRejection = Literal["truncate", "replay"]


@dataclass(frozen=True, slots=True)
class StatePart:
    """One array of a state: `shape` is that of one unit's entry, so all of them are [units, *shape]."""

    name: str
    shape: tuple[int, ...]
    dtype: DType

    @property
    def nbytes(self) -> int:
        """Bytes of one unit's entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.value}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class StateSpec:
    """The state of one layer. Its name in graphs and ledgers is `kind` and the layer: `kv0`.

    `unit` is what has an entry: `token` (a slot a token) or `sequence` (a slot a sequence). `on_rejection` says how a
    rejected draft is undone: `truncate`, the mark goes back; `replay`, what was accepted is run again from the last
    state. `window` is how many tokens back a state of unit `token` is read, the row's own included; 0 means all.
    """

    kind: str
    layer: int
    parts: tuple[StatePart, ...]
    unit: Unit = "token"
    on_rejection: OnRejection = "truncate"
    window: int = 0

    @property
    def name(self) -> str:
        """`kv0`: the state in graphs, plans and ledgers."""
        return f"{self.kind}{self.layer}"

    @property
    def nbytes(self) -> int:
        """Bytes of one unit, all parts together."""
        return sum(part.nbytes for part in self.parts)

    def value_name(self, part: str) -> str:
        """`kv0.k`: the array of a part among a program's values."""
        return f"{self.name}.{part}"

    def __str__(self) -> str:
        reach = f", the last {self.window} tokens" if self.window else ""
        return f"{self.name}: {', '.join(map(str, self.parts))}, a slot a {self.unit}{reach}, {self.on_rejection}"


@dataclass(frozen=True, slots=True)
class StateGroup:
    """States that live and die together: of one unit, read equally far back, undone alike."""

    unit: Unit
    on_rejection: OnRejection
    window: int
    states: tuple[StateSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of one unit in all states."""
        return sum(state.nbytes for state in self.states)

    def __str__(self) -> str:
        entries = sorted({", ".join(map(str, state.parts)) for state in self.states})
        reach = f"the last {self.window} tokens" if self.window else "all tokens"
        read = f", {reach} read" if self.unit == "token" else ""
        layers = "1 layer" if len(self.states) == 1 else f"{len(self.states)} layers"
        return f"{layers} of {' or '.join(entries)}{read}, {self.on_rejection} on rejection"


def grouped(states: Iterable[StateSpec]) -> tuple[StateGroup, ...]:
    """The groups of `states`, in the order in which each first appears."""
    found: dict[tuple[Unit, OnRejection, int], list[StateSpec]] = {}
    for state in states:
        found.setdefault((state.unit, state.on_rejection, state.window), []).append(state)
    return tuple(StateGroup(*key, tuple(members)) for key, members in found.items())


def kv_state(layer: int, kv_heads: int, head_dim: int, dtype: DType, window: int = 0) -> StateSpec:
    """Keys and values of `kv_heads` heads of `head_dim`: what attention remembers of a token."""
    shape = (kv_heads, head_dim)
    return StateSpec("kv", layer, (StatePart("k", shape, dtype), StatePart("v", shape, dtype)), window=window)
