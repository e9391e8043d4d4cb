"""Counter-based random bits on the device: Philox-4x32-10.

Owns `uniform_noise` and `gumbel_noise`, Triton functions that other kernels call. What always holds: the bits are those
of `core/ops/noise.py` (Salmon et al., 2011), which says how counter, key and number are made.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Ten rounds of Philox-4x32 over uint32 words."""
    for _ in tl.static_range(10):
        high_0, low_0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high_1, low_1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform_noise(seed, position, first, stream, BLOCK: tl.constexpr):
    """Uniform float32 in (0, 1) for tokens `first .. first + BLOCK`, `first` and BLOCK multiples of 4."""
    block = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), tl.uint32)
    k0, k1 = zero + (seed & 0xFFFFFFFF).to(tl.uint32), zero + ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    w0, w1, w2, w3 = philox(block, zero + position.to(tl.uint32), zero + stream, zero, k0, k1)
    # Token t takes word t % 4.
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    return ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def gumbel_noise(seed, position, first, stream, BLOCK: tl.constexpr):
    """Standard Gumbel noise for tokens `first .. first + BLOCK`."""
    return -tl.log(-tl.log(uniform_noise(seed, position, first, stream, BLOCK)))
