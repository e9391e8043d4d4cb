"""Tensor cores and what feeds them: products of small matrices that a warp holds, and copies into shared memory.

Owns the intrinsics `mma_bf16`, `mma_f16`, `load_matrices`, `load_matrices_transposed`, `copy_16`, `copies_done`,
`pack_bf16` and `pack_f16`. What always holds: the simulated side is the instruction's definition in NVIDIA's "Parallel
Thread Execution ISA" (chapters on `mma`, `ldmatrix`, `cp.async`), for the lane layouts stated here
(`simulator/fragments.py` has them as numpy).

Of a warp, lane l has `g = l // 4` and `t = l % 4`. A register holds two 16-bit elements, the first in its lower half.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import assembly
from slotwise.backends.numba_cuda.elements import PACK, bf16_bits, f16_bits
from slotwise.backends.numba_cuda.simulator import fragments, intrinsic
from slotwise.backends.numba_cuda.simulator.fragments import multiply_m16n8k16
from slotwise.core.specs import DType

ALIGNMENT = 16
"""Bytes: where an array in shared memory must start to be copied to and read so."""


def _joined(low, high):
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))


@intrinsic(numba=assembly.mma_bf16, warp=True)
def mma_bf16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """A [16, 16] times B [16, 8] plus C [16, 8], bf16 in and float32 out (`mma.sync.m16n8k16`).

    A's four registers hold (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), B's two (2t, g) and (2t + 8, g), each
    with the next element along k; C's four numbers are (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
    """
    return multiply_m16n8k16((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), "bf16")


@intrinsic(numba=assembly.mma_f16, warp=True)
def mma_f16(active, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """As `mma_bf16`, with fp16 in."""
    return multiply_m16n8k16((a0, a1, a2, a3), (b0, b1), (c0, c1, c2, c3), "f16")


@intrinsic(numba=assembly.load_matrices, memory="r", warp=True)
def load_matrices(active, array, index):
    """Four 8 x 8 matrices of 16-bit elements from shared memory: register i holds (g, 2t) and (g, 2t + 1) of matrix i.

    `index` is, for lane l, where row l % 8 of matrix l // 8 starts (`ldmatrix.x4`).
    """
    return fragments.load_matrices(active, array, index, 4)


@intrinsic(numba=assembly.load_matrices_transposed, memory="r", warp=True)
def load_matrices_transposed(active, array, index):
    """As `load_matrices`, each matrix transposed: register i holds (2t, g) and (2t + 1, g) (`ldmatrix.x4.trans`)."""
    return fragments.load_matrices(active, array, index, 4, transposed=True)


@intrinsic(numba=assembly.copy_16, memory="rw")
def copy_16(active, target, at, source, index, live):
    """Eight 16-bit elements from global to shared memory, zeros where not `live` (`cp.async.cg`, 16 bytes).

    It is done after `copies_done`, and then seen by other threads after a barrier. `index` must be in bounds where
    nothing is read, too.
    """
    found = active.load_vector(source, index, PACK)
    active.copy_later(target, at, tuple(np.where(live, part, np.uint16(0)) for part in found))


@intrinsic(numba=assembly.commit_copies)
def commit_copies(active):
    """The thread's copies so far, since the last call, are one group (`cp.async.commit_group`)."""
    active.commit_copies()
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.copies_done)
def copies_done(active):
    """Wait for all groups of the thread but the newest (`cp.async.wait_group 1`)."""
    active.wait_copies(newest=1)
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.all_copies_done)
def all_copies_done(active):
    """Wait for all copies of the thread (`cp.async.wait_all`)."""
    active.wait_copies()
    return np.zeros(active.shape, np.int32)


@intrinsic(numba=assembly.pack_bf16)
def pack_bf16(active, low, high):
    """Two float32 rounded to bf16, in one register (`cvt.rn.bf16x2.f32`)."""
    return _joined(bf16_bits(low), bf16_bits(high))


@intrinsic(numba=assembly.pack_f16)
def pack_f16(active, low, high):
    """Two float32 rounded to fp16, in one register (`cvt.rn.f16x2.f32`)."""
    return _joined(f16_bits(low), f16_bits(high))


def tensor_core_of(dtype: DType) -> tuple[Any, Any]:
    """The product and the packing for tensors of `dtype`."""
    return (mma_bf16, pack_bf16) if dtype is DType.BF16 else (mma_f16, pack_f16)


HALVES = (DType.BF16, DType.F16)
"""What tensor cores multiply exactly; float32 they would round."""
