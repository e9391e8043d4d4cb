"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `gated_activation`, `linear_gated` and `logits`. What always
holds: the kernels that keep rows apart come first. A vendor's matrix product rounds by the number of rows, and
PyTorch's exp and tanh differ in the last bit between the vector loop and its remainder, which falls on other rows as
rows are added.
"""

from __future__ import annotations

from slotwise.backends.reference.binding import by_row, whole
from slotwise.core.backend import CallSpec
from slotwise.core.ops.linear import ACTIVATIONS


def refuses(call: CallSpec) -> str | None:
    """None, or why the call's activation cannot be run."""
    activation = call.attrs.get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return None


_OPS = ("linear", "linear_heads", "linear_qkv", "gated_activation", "linear_gated", "logits")

KERNELS = tuple(
    kernel for op in _OPS for kernel in (by_row(op, refuses=refuses), whole(op, invariant_rows=0, refuses=refuses))
)
