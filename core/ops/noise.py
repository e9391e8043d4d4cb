"""Counter-based random bits: Philox-4x32-10 as tensor arithmetic.

Owns `uniform_noise`. What always holds: the number for (seed, position, token, stream) depends on those four alone, so
it is the same whichever rows share the call, on any backend, in any order; integer arithmetic makes the bits exact.
Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011 (checked against the known
answers of the authors' Random123 library).
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLY_0, _MULTIPLY_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85

# Streams keep draws for different purposes at one position independent of each other.
TARGET_STREAM, DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM = 0, 1, 2, 3


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox-4x32; words are int64 tensors holding values in [0, 2**32), broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A 32 x 32 bit product wraps to the right low 64 bits; the shift's sign bits are masked away.
        product_0, product_1 = c0 * _MULTIPLY_0, c2 * _MULTIPLY_1
        high_0, low_0 = (product_0 >> 32) & _MASK, product_0 & _MASK
        high_1, low_1 = (product_1 >> 32) & _MASK, product_1 & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform_noise(seed: torch.Tensor, position: torch.Tensor, count: int, stream: int) -> torch.Tensor:
    """Uniform float32 numbers in (0, 1), [R, count]: entry (i, t) is for `seed[i]`, `position[i]` [R] and token t.

    The counter is (t // 4, position, stream, 0), the key the seed's two halves; token t takes output word t % 4. With n
    the word's top 23 bits the number is (n + 1/2) / 2**23: each of the 2**23 values is equally likely, is held exactly
    by float32 (n + 1/2 has 24 significant bits), and lies in [2**-24, 1 - 2**-24], so that its logarithm is finite and
    below zero.
    """
    blocks = -(-count // 4)
    block = torch.arange(blocks, dtype=torch.int64, device=seed.device).unsqueeze(0)
    wide_seed, wide_position = seed.long().unsqueeze(1), position.long().unsqueeze(1)
    zero = torch.zeros_like(block)
    key = (wide_seed & _MASK, (wide_seed >> 32) & _MASK)
    words = philox((block, wide_position & _MASK, zero + stream, zero), key)
    rows = seed.shape[0]
    bits = torch.stack([word.expand(rows, blocks) for word in words], dim=-1).reshape(rows, blocks * 4)[:, :count]
    # Every step is exact in float32, so any backend gets these bits with ordinary single-precision arithmetic.
    return ((bits >> 9).float() + 0.5) * 2.0**-23
