"""What an engine is asked to do in a comparison.

Owns `Engine`, `About` and `EngineSpec`. What always holds: all engines get the same token ids and are asked for the
same work: greedy, stop tokens off, nothing shared between calls; every figure is wall time as a caller sees it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Tokens = Sequence[int]


@dataclass(frozen=True, slots=True)
class About:
    """What an engine says of itself.

    `weight_bytes` are those that one decode step reads, `kv_itemsize` the bytes of a number in its cache, `settings`
    what was chosen for it, for the reader of the results.
    """

    weight_bytes: int
    kv_itemsize: int
    settings: str


class Engine(Protocol):
    """One engine with one checkpoint loaded."""

    def about(self) -> About:
        """What was loaded, and how."""

    def decode(self, prompt: Tokens, new: int) -> tuple[float, float]:
        """Seconds until the first token after `prompt`, and seconds for the `new` tokens after it."""

    def decode_batch(self, prompts: Sequence[Tokens], steps: int) -> float:
        """Seconds for `steps` tokens of each prompt's, all advancing together; the prompts' own time is not counted."""

    def rows(self, tokens: Tokens) -> float:
        """Seconds to score `tokens` in one call from an empty cache, every position's logits included."""

    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """The logits after each of `tokens`, float32 [T, V]."""


@dataclass(frozen=True)
class EngineSpec:
    """How to make an engine: `module` has `load(**arguments, **options)`, which returns one with a checkpoint loaded.

    `bytes_a_weight` is about what a loaded checkpoint takes, so that none is loaded that does not fit.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    bytes_a_weight: float = 2.0

    def load(self, **arguments: Any) -> Any:
        """Import the module and load the checkpoint; raises whatever the engine does."""
        return importlib.import_module(self.module).load(**arguments, **self.options)
