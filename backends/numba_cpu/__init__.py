"""Kernels for CPUs, compiled by Numba.

Owns `BACKEND`. What always holds: every kernel is row-invariant for any number of rows; consecutive calls run as one
chain on the backend's own threads, which meet between calls and sleep between runs.
"""

from __future__ import annotations

import sys

from slotwise.backends.numba_cpu import attention, embedding, linear, norm, rotary, sampling
from slotwise.backends.numba_cpu.calls import chain
from slotwise.core.backend import Backend
from slotwise.core.layouts import OCTETS


def _unavailable() -> str | None:
    if sys.platform not in ("linux", "darwin"):
        return f"its threads are POSIX threads, which {sys.platform} lacks; use backend='reference'"
    if sys.byteorder != "little" or sys.maxsize < 2**32:
        return "it needs a 64-bit little-endian processor; use backend='reference'"
    return None


BACKEND = Backend(
    name="numba_cpu",
    kernels=(
        *embedding.KERNELS,
        *norm.KERNELS,
        *linear.KERNELS,
        *rotary.KERNELS,
        *attention.KERNELS,
        *sampling.KERNELS,
    ),
    unavailable=_unavailable,
    device="cpu",
    chain=chain,
    layout=OCTETS,
)
