"""Whether engines that are timed side by side compute the same thing.

What always holds: engines are judged by logits, since greedy tokens of random weights turn on near-ties; every limit is
relative to what is known to be right, transformers in float32 over the same bf16 weights, and to how far comparable
arithmetic strays from that.

The error of logits is the squared difference from the reference's over the squared reference, both about their mean (a
normalised mean squared error). Limits: float32 differs from float32 by the order of sums alone, about 1e-6 of a value
in a model of some tens of layers, so 1e-12 squared; 1e-9 leaves room, and a wrong rotary embedding, norm or mask gives
1e-2 to 1. For bf16 and quantised weights the measure is another engine's own error at that precision: twice as much is
allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

REFERENCE = "transformers float32"
EXACT_LIMIT = 1e-9
SLACK = 2.0
LIKE = {
    "slotwise bf16": "transformers bf16",
    "llama.cpp bf16": "transformers bf16",
    "slotwise int8": "llama.cpp q8_0",
    "slotwise int4": "llama.cpp q4_0",
}
"""The engine whose error measures another's."""
EXACT = ("slotwise float32",)

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Finding:
    """An engine's error; `limit` is None where there is nothing to hold it against. `agree` counts equal argmaxes."""

    error: float
    limit: float | None
    agree: int
    rows: int

    @property
    def is_wrong(self) -> bool:
        """Whether the error is beyond its limit, or no number."""
        return not np.isfinite(self.error) or (self.limit is not None and self.error > self.limit)

    def __str__(self) -> str:
        limit = "" if self.limit is None else f", limit {self.limit:.1e}"
        return f"error {self.error:.1e}{limit}; {self.agree} of {self.rows} likeliest tokens the same"


def logits_error(found: Logits, reference: Logits) -> float:
    """Normalised mean squared error of `found` [T, V], in float64."""
    wide = reference.astype(np.float64)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    mine = found.astype(np.float64)
    mine -= mine.mean(axis=-1, keepdims=True)
    return float(np.square(mine - centred).sum() / np.square(centred).sum())


def judge(logits: Mapping[str, Logits]) -> dict[str, Finding]:
    """A finding for each engine but the reference; empty where the reference is missing."""
    reference = logits.get(REFERENCE)
    if reference is None:
        return {}
    errors = {name: logits_error(found, reference) for name, found in logits.items() if name != REFERENCE}
    findings = {}
    for name, error in errors.items():
        like = LIKE.get(name)
        limit = EXACT_LIMIT if name in EXACT else SLACK * errors[like] if like in errors else None
        agree = int((logits[name].argmax(-1) == reference.argmax(-1)).sum())
        findings[name] = Finding(error, limit, agree, len(reference))
    return findings
