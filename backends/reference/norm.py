"""Normalisation and the residual stream.

Owns the kernels of `add`, `rms_norm`, `add_rms_norm` and `head_rms_norm`. What always holds: PyTorch reduces each row
of a batch as it reduces one row alone, but only below `SPLIT` elements: from there it shares a lone row's sum among
threads, which changes its bits. Rows that long go one at a time.
"""

from __future__ import annotations

from slotwise.backends.reference.binding import by_row, whole
from slotwise.core.backend import CallSpec

SPLIT = 32768
"""Elements from which PyTorch splits a reduction over threads (`at::internal::GRAIN_SIZE`)."""


def _refuses(call: CallSpec) -> str | None:
    first = call.inputs[0]
    width = 1
    for size in first.sizes()[1:] if first is not None else ():
        width *= size
    if width >= SPLIT:
        return f"a row of {width} elements would be summed by several threads (the limit is {SPLIT - 1})"
    return None


_NORMS = ("rms_norm", "add_rms_norm", "head_rms_norm")

KERNELS = (
    whole("add"),
    *(whole(op, refuses=_refuses) for op in _NORMS),
    *(by_row(op) for op in _NORMS),
)
