"""Rotary position embedding, alone and fused with the cache write.

Owns the kernels of `rotary` and `rotary_write`. What always holds: they multiply, add and copy element by element, each
correctly rounded, so no row can touch another's bits.
"""

from __future__ import annotations

from slotwise.backends.reference.binding import whole
from slotwise.core.backend import CallSpec


def _refuses(call: CallSpec) -> str | None:
    dims = call.contract.match(call.inputs, call.attrs)[0]
    head_dim, width = dims["D"], dims["W"]
    if isinstance(head_dim, int) and isinstance(width, int) and 2 * width > head_dim:
        return f"tables of width {width} rotate {2 * width} dimensions, but a head has {head_dim}"
    return None


KERNELS = (whole("rotary", refuses=_refuses), whole("rotary_write", refuses=_refuses))
