"""The definition, as a backend: each op's kernel is the op's plain PyTorch function.

Owns `BACKEND`. What always holds: no arithmetic is written here; the function of the contract does it all, on whatever
device the tensors live. A kernel `<op>.by_row` calls the function once a row, so that no row can touch another's bits;
a kernel `<op>.whole` calls it once and is used where the function keeps rows apart, or for prefill.
"""

from __future__ import annotations

from slotwise.backends.reference import attention, embedding, linear, linear_q, norm, rotary, sampling
from slotwise.core.backend import Backend


def _unavailable() -> str | None:
    """PyTorch is a requirement of the package, so this backend runs wherever the package does."""
    return None


BACKEND = Backend(
    name="reference",
    kernels=(
        *embedding.KERNELS,
        *norm.KERNELS,
        *linear.KERNELS,
        *linear_q.KERNELS,
        *rotary.KERNELS,
        *attention.KERNELS,
        *sampling.KERNELS,
    ),
    unavailable=_unavailable,
    device="cpu",
)
