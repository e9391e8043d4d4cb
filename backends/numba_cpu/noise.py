"""Counter-based random numbers: Philox-4x32-10, as `core/ops/noise.py` defines them.

Owns `noise_block`. What always holds: every step is integer arithmetic or exact in float32, so the bits are those of the
op's definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from slotwise.backends.numba_cpu.memory import HALF, device

_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_STEP = np.float32(2.0**-23)
_32, _9 = np.uint64(32), np.uint32(9)


@device
def noise_block(seed: int, position: int, block: int, stream: int, target: Any) -> None:
    """Four uniform numbers in (0, 1) for the tokens `4 block .. 4 block + 4`, into `target` [4]."""
    c0, c1, c2, c3 = np.uint32(block), np.uint32(position), np.uint32(stream), np.uint32(0)
    k0, k1 = np.uint32(np.uint64(seed)), np.uint32(np.uint64(seed) >> _32)
    for _ in range(10):
        first, second = np.uint64(c0) * _MULTIPLY_0, np.uint64(c2) * _MULTIPLY_1
        c0, c2 = np.uint32(second >> _32) ^ c1 ^ k0, np.uint32(first >> _32) ^ c3 ^ k1
        c1, c3 = np.uint32(second), np.uint32(first)
        k0, k1 = np.uint32(k0 + _WEYL_0), np.uint32(k1 + _WEYL_1)
    target[0] = (np.float32(c0 >> _9) + HALF) * _STEP
    target[1] = (np.float32(c1 >> _9) + HALF) * _STEP
    target[2] = (np.float32(c2 >> _9) + HALF) * _STEP
    target[3] = (np.float32(c3 >> _9) + HALF) * _STEP
