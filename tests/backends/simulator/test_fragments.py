"""Tensor-core instructions of the simulator multiply matrices that kernels lay out as the PTX ISA says."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import Misaligned, cuda, fragments, intrinsic, kernel


@intrinsic(numba=lambda: None, warp=True)
def mma_bf16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    return fragments.multiply_m16n8k16((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), "bf16")


@intrinsic(numba=lambda: None, warp=True)
def mma_f16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    return fragments.multiply_m16n8k16((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), "f16")


@intrinsic(numba=lambda: None, warp=True, memory="r")
def ldmatrix_4(active, array, index):
    return fragments.load_matrices(active, array, index, 4)


@intrinsic(numba=lambda: None, warp=True, memory="r")
def ldmatrix_2_transposed(active, array, index):
    return fragments.load_matrices(active, array, index, 2, transposed=True)


def _product(mma):
    @kernel
    def product(a, b, c, out):
        """One 16 x 16 by 16 x 8 product a warp, elements fetched one by one, as the PTX ISA numbers them."""
        warp = cuda.threadIdx.x // 32
        lane = cuda.threadIdx.x % 32
        group = lane // 4
        pair = lane % 4 * 2
        words = cuda.local.array(6, np.uint32)
        for i in range(4):
            row = group + 8 * (i % 2)
            column = pair + 8 * (i // 2)
            words[i] = a[warp, row, column] | (np.uint32(a[warp, row, column + 1]) << 16)
        for i in range(2):
            words[4 + i] = b[warp, pair + 8 * i, group] | (np.uint32(b[warp, pair + 8 * i + 1, group]) << 16)
        c0, c1 = c[warp, group, pair], c[warp, group, pair + 1]
        c2, c3 = c[warp, group + 8, pair], c[warp, group + 8, pair + 1]
        d0, d1, d2, d3 = mma(words[0], words[1], words[2], words[3], words[4], words[5], c0, c1, c2, c3)
        out[warp, group, pair] = d0
        out[warp, group, pair + 1] = d1
        out[warp, group + 8, pair] = d2
        out[warp, group + 8, pair + 1] = d3

    return product


@pytest.mark.parametrize(("mma", "kind"), [(mma_bf16, "bf16"), (mma_f16, "f16")])
def test_mma_multiplies_the_matrices_that_lanes_hold(mma, kind) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    if kind == "f16":
        a, b = (x.astype(np.float16).view(np.uint16) for x in (a, b))
    else:
        a, b = ((x.view(np.uint32) >> 16).astype(np.uint16) for x in (a, b))
    out = np.zeros_like(c)
    _product(mma).simulate(1, 64, (a, b, c, out))
    expected = fragments.float32_of(a, kind).astype(np.float64) @ fragments.float32_of(b, kind) + c
    assert np.abs(out - expected).max() < 1e-6 * np.abs(expected).max()


@kernel
def by_ldmatrix(a, b, out, shift):
    """The same product from shared memory: A by ldmatrix.x4, B (16 x 8, rows of 8) by ldmatrix.x2.trans."""
    left = cuda.shared.array(16 * 24, np.uint16, 16)
    right = cuda.shared.array(16 * 8, np.uint16, 16)
    lane = cuda.threadIdx.x
    for i in range(lane, 256, 32):
        left[i // 16 * 24 + i % 16] = a[i // 16, i % 16]
    for i in range(lane, 128, 32):
        right[i] = b[i // 8, i % 8]
    cuda.syncthreads()
    zero = np.float32(0)
    a0, a1, a2, a3 = ldmatrix_4(left, lane % 16 * 24 + lane // 16 * 8 + shift)
    b0, b1 = ldmatrix_2_transposed(right, lane % 16 * 8)
    d0, d1, d2, d3 = mma_bf16(a0, a1, a2, a3, b0, b1, zero, zero, zero, zero)
    row, column = lane // 4, lane % 4 * 2
    out[row, column] = d0
    out[row, column + 1] = d1
    out[row + 8, column] = d2
    out[row + 8, column + 1] = d3


def test_ldmatrix_gives_lanes_what_mma_takes() -> None:
    rng = np.random.default_rng(1)
    a, b = (
        (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for shape in ((16, 16), (16, 8))
    )
    out = np.zeros((16, 8), np.float32)
    by_ldmatrix.simulate(1, 32, (a, b, out, 0))
    expected = fragments.float32_of(a, "bf16").astype(np.float64) @ fragments.float32_of(b, "bf16")
    assert np.abs(out - expected).max() < 1e-6 * np.abs(expected).max()
    with pytest.raises(Misaligned, match=r"left\[1\]"):
        by_ldmatrix.simulate(1, 32, (a, b, out, 1))
