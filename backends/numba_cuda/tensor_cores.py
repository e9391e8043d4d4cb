"""Tensor cores and what feeds them: products of small matrices that a warp holds, and copies into shared memory.

Owns the intrinsics `mma_bf16`, `mma_f16`, `load_matrices`, `load_matrices_transposed`, `copy_16`, `copies_done`,
`pack_bf16` and `pack_f16`. What always holds: the simulated side is the instruction's definition in NVIDIA's "Parallel
Thread Execution ISA" (chapters on `mma`, `ldmatrix`, `cp.async`), for the lane layouts stated here; products add up in
float32, one k after another, so a column's bits do not depend on its place in the tile.

Of a warp, lane l has `g = l // 4` and `t = l % 4`. A register holds two 16-bit elements, the first in its lower half.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import assembly
from slotwise.backends.numba_cuda.elements import PACK, _from_bf16, _from_f16, _to_bf16, _to_f16
from slotwise.backends.numba_cuda.simulator import intrinsic
from slotwise.core.specs import DType

ALIGNMENT = 16
"""Bytes: where an array in shared memory must start to be copied to and read so."""

_LANE = np.arange(32)
_G, _T = _LANE // 4, _LANE % 4


def _halves(word):
    """The lower and the upper 16 bits of registers."""
    word = np.asarray(word).astype(np.uint32)
    return (word & np.uint32(0xFFFF)).astype(np.uint16), (word >> np.uint32(16)).astype(np.uint16)


def _joined(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


def matrix_a(registers, widen):
    """[warps, 16, 16] of four registers: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the next k."""
    found = np.zeros((registers[0].shape[0], 16, 16), np.float32)
    for word, row, k in zip(registers, (0, 8, 0, 8), (0, 0, 8, 8), strict=True):
        low, high = _halves(word)
        found[:, _G + row, 2 * _T + k] = widen(low)
        found[:, _G + row, 2 * _T + k + 1] = widen(high)
    return found


def matrix_b(registers, widen):
    """[warps, 16, 8] of two registers: (2t, g) and (2t + 8, g), each with the next k."""
    found = np.zeros((registers[0].shape[0], 16, 8), np.float32)
    for word, k in zip(registers, (0, 8), strict=True):
        low, high = _halves(word)
        found[:, 2 * _T + k, _G] = widen(low)
        found[:, 2 * _T + k + 1, _G] = widen(high)
    return found


def matrix_c(values):
    """[warps, 16, 8] of four float32: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)."""
    found = np.zeros((values[0].shape[0], 16, 8), np.float32)
    for value, row, column in zip(values, (0, 0, 8, 8), (0, 1, 0, 1), strict=True):
        found[:, _G + row, 2 * _T + column] = value
    return found


def _multiplied(a, b, c, widen):
    left, right, total = matrix_a(a, widen), matrix_b(b, widen), matrix_c(c)
    for k in range(16):
        total += left[:, :, k : k + 1] * right[:, k : k + 1, :]
    return tuple(
        np.ascontiguousarray(total[:, _G + row, 2 * _T + column])
        for row, column in ((0, 0), (0, 1), (8, 0), (8, 1))
    )


@intrinsic(numba=assembly.mma_bf16, warp=True)
def mma_bf16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """A [16, 16] times B [16, 8] plus C [16, 8], bf16 in and float32 out (`mma.sync.m16n8k16`)."""
    return _multiplied((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), _from_bf16)


@intrinsic(numba=assembly.mma_f16, warp=True)
def mma_f16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """As `mma_bf16`, with fp16 in."""
    return _multiplied((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), _from_f16)


def _matrices(active, array, index):
    """Four 8 x 8 matrices: lane l points at row l % 8 of matrix l // 8. [warps, 4, 8, 8]"""
    rows = np.stack(active.load_vector(array, index, PACK), axis=-1)  # [warps, 32, 8]
    return rows.reshape(len(rows), 4, 8, 8)


@intrinsic(numba=assembly.load_matrices, memory="r", warp=True)
def load_matrices(active, array, index):
    """Four 8 x 8 matrices of 16-bit elements from shared memory: register i holds (g, 2t) and (g, 2t + 1) of matrix i.

    `index` is, for lane l, where row l % 8 of matrix l // 8 starts (`ldmatrix.x4`).
    """
    found = _matrices(active, array, index)
    return tuple(_joined(found[:, i, _G, 2 * _T], found[:, i, _G, 2 * _T + 1]) for i in range(4))


@intrinsic(numba=assembly.load_matrices_transposed, memory="r", warp=True)
def load_matrices_transposed(active, array, index):
    """As `load_matrices`, each matrix transposed: register i holds (2t, g) and (2t + 1, g) (`ldmatrix.x4.trans`)."""
    found = _matrices(active, array, index)
    return tuple(_joined(found[:, i, 2 * _T, _G], found[:, i, 2 * _T + 1, _G]) for i in range(4))


@intrinsic(numba=assembly.copy_16, memory="rw")
def copy_16(active, target, at, source, index, live):
    """Eight 16-bit elements from global to shared memory, zeros where not `live` (`cp.async.cg`, 16 bytes).

    It is done after `copies_done`, and then seen by other threads after a barrier. The simulator copies at once: a
    missing wait is nothing that it can show. `index` must be in bounds where nothing is read, too.
    """
    found = active.load_vector(source, index, PACK)
    active.store_vector(target, at, tuple(np.where(live, part, np.uint16(0)) for part in found))


@intrinsic(numba=assembly.commit_copies)
def commit_copies(active):
    """The thread's copies so far, since the last call, are one group (`cp.async.commit_group`)."""
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.copies_done)
def copies_done(active):
    """Wait for all groups of the thread but the newest (`cp.async.wait_group 1`)."""
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.all_copies_done)
def all_copies_done(active):
    """Wait for all copies of the thread (`cp.async.wait_all`)."""
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.pack_bf16)
def pack_bf16(active, low, high):
    """Two float32 rounded to bf16, in one register (`cvt.rn.bf16x2.f32`)."""
    return _joined(_to_bf16(low), _to_bf16(high))


@intrinsic(numba=assembly.pack_f16)
def pack_f16(active, low, high):
    """Two float32 rounded to fp16, in one register (`cvt.rn.f16x2.f32`)."""
    return _joined(_to_f16(low), _to_f16(high))


def tensor_core_of(dtype: DType) -> tuple[Any, Any]:
    """The product and the packing for tensors of `dtype`."""
    return (mma_bf16, pack_bf16) if dtype is DType.BF16 else (mma_f16, pack_f16)


HALVES = (DType.BF16, DType.F16)
"""What tensor cores multiply exactly; float32 they would round."""
