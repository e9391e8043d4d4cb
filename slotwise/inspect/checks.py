"""What cross-validation finds of one kernel, and of two: the records that its run makes and its report reads.

What always holds: a check names the promise that it is about and its verdict; a measure that was not made is None,
never zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "refused", "waived", "failed", "unexpected pass"]


@dataclass(frozen=True, slots=True)
class Check:
    """One kernel on one case: `check` is `oracle` (means its op, within its borders) or `rows` (row invariance).

    `rule` is the promise that a failure broke. `ulps` is the greatest distance in representable numbers, `cosine` the
    least over the outputs, `seconds` the fastest launch; each None where it was not measured. `reason` is why a kernel
    refused the call, or the waiver's reason.
    """

    op: str
    backend: str
    kernel: str
    dtype: str
    case: str
    check: str
    verdict: Verdict
    rule: str = ""
    message: str = ""
    max_abs: float | None = None
    max_rel: float | None = None
    ulps: int | None = None
    cosine: float | None = None
    seconds: float | None = None
    reason: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether this check fails the run."""
        return self.verdict in ("failed", "unexpected pass")


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two kernels (`backend:kernel`) on one case, compared with each other: greatest distances, over all outputs."""

    op: str
    dtype: str
    case: str
    left: str
    right: str
    max_abs: float
    ulps: int

    @property
    def is_bit_equal(self) -> bool:
        """Whether the two gave the same bits (0 and -0 count as one)."""
        return self.ulps == 0
