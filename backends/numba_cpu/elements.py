"""Which numbers these kernels compute with.

Owns `kind_of`, `given` and the refusals that most kernels share. What always holds: float32, bf16 and fp16 are taken, and float64
is refused, since sums are kept in float32.
"""

from __future__ import annotations

import torch

from slotwise.backends.numba_cpu.vectors import KINDS
from slotwise.core.backend import CallSpec
from slotwise.core.errors import BackendError
from slotwise.core.specs import DType


def kind_of(tensor: torch.Tensor) -> int:
    """The element kind of a tensor (see `vectors.py`)."""
    return KINDS[DType.of(tensor)]


def given(tensor: torch.Tensor | None) -> torch.Tensor:
    """A tensor that the contract requires; raises BackendError where it is missing."""
    if tensor is None:
        raise BackendError("an input that the op requires is missing; bind the kernel with all of them")
    return tensor


def refuses_wide_floats(call: CallSpec) -> str | None:
    """Why a call's dtype is refused, None when it is not."""
    if call.dtype not in KINDS:
        taken = ", ".join(dtype.value for dtype in KINDS)
        return f"it computes in float32, so {call.dtype.value} would lose digits; it takes {taken}"
    return None
