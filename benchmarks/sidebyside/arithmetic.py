"""How many float32 multiplications and additions this machine does: the limit that prompts and batches are judged
against.

What always holds: vectors are as wide as kernels use them, multiply-adds are fused where the processor can, and enough
of them do not wait for each other to keep all units busy; nothing is read from memory.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sidebyside.bandwidth import timed
from slotwise.backends.numba_cpu.machine import LANES
from slotwise.backends.numba_cpu.vectors import Loop, fma, splat

CHAINS = 12
"""Sums that grow side by side: two units with four or five cycles each have always something to do."""

TURNS = 4_000_000

_VECTOR = ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def _multiply_and_add(typing: Any, turns: Any) -> Any:
    """`turns` times `CHAINS` fused multiply-adds of vectors; returns one number of their sum."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        factor, addend = splat(_VECTOR, 0.5), splat(_VECTOR, 0.3)
        first = [splat(_VECTOR, float(chain)) for chain in range(CHAINS)]
        with Loop(builder, arguments[0], 1, first) as loop:
            loop.next = [fma(builder, each, factor, addend) for each in loop.carried]
        total = functools.reduce(builder.fadd, loop.result)
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.int64), generate


@numba.njit(nogil=True)
def _work(turns: int) -> float:
    return _multiply_and_add(turns)


def multiply_adds_per_second(threads: int) -> float:
    """float32 multiply-adds a second of `threads` threads together; takes about ten milliseconds."""
    _work(1)  # compiled now, not when timed
    return threads * CHAINS * LANES * TURNS / timed([lambda: _work(TURNS)] * threads)
