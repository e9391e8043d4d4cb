"""Counter-based random bits on the device: Philox-4x32-10.

Owns `philox`, `uniform` and `gumbel`, device functions that other kernels call. What always holds: the bits are those
of `core/ops/noise.py` (Salmon et al., 2011), which says how counter, key and number are made. Words are held as int64
in 0 .. 2**32: a product of two wraps to the right low 64 bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math

import numpy as np

from slotwise.backends.numba_cuda.simulator import device

MASK = 0xFFFFFFFF
MULTIPLY_0, MULTIPLY_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
HALF = np.float32(0.5)
UNIT = np.float32(2.0**-23)


@device
def philox(seed, position, block, stream):
    """Four words for tokens `4 block .. 4 block + 4`."""
    c0 = block & MASK
    c1 = position & MASK
    c2 = stream & MASK
    c3 = stream & 0
    k0 = seed & MASK
    k1 = (seed >> 32) & MASK
    for _ in range(10):
        first = c0 * MULTIPLY_0
        second = c2 * MULTIPLY_1
        c0 = ((second >> 32) & MASK) ^ c1 ^ k0
        c1 = second & MASK
        c2 = ((first >> 32) & MASK) ^ c3 ^ k1
        c3 = first & MASK
        k0 = (k0 + WEYL_0) & MASK
        k1 = (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


@device
def uniform(word):
    """A uniform float32 in (0, 1) from a word."""
    return (np.float32(word >> 9) + HALF) * UNIT


@device
def gumbel(word):
    """Standard Gumbel noise from a word."""
    return -math.log(-math.log(uniform(word)))
