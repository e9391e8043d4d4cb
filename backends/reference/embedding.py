"""Embedding and row selection.

Owns the kernels of `embedding` and `take_rows`. What always holds: rows are copied (and scaled element by element), so
no row can touch another's bits.
"""

from __future__ import annotations

from slotwise.backends.reference.binding import whole

KERNELS = (whole("embedding"), whole("take_rows"))
