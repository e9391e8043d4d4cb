"""Normalisation and the residual stream.

Owns the kernels of `add`, `rms_norm`, `add_rms_norm` and `head_rms_norm`. What always holds: a row is one thread's, and
its sum of squares runs over fixed lanes, so no row can touch another's bits; results are rounded where the ops say.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import torch

from slotwise.backends.numba_cpu.calls import Call, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import ONE, device, double_of_bits, elements, int64s, narrow, widen
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE, sum_of_squares
from slotwise.core.backend import Kernel, Launch, Tensors
from slotwise.core.graph import Attr

_AT = FIRST_FIELD * 8


@device
def _normalise(kind: int, x: int, weight: int, out: int, width: int, eps: float, offset: float) -> None:
    """One row: `x / sqrt(mean(x**2) + eps) * (offset + weight)`."""
    mean = sum_of_squares(kind, x, width) / np.float32(width)
    scale = ONE / np.sqrt(mean + np.float32(eps))
    source, factor, target = elements(kind, x, width), elements(kind, weight, width), elements(kind, out, width)
    if offset == 0.0:
        for i in range(width):
            rounded = widen(kind, narrow(kind, widen(kind, source[i]) * scale))
            target[i] = narrow(kind, widen(kind, factor[i]) * rounded)
    else:
        shift = np.float32(offset)
        for i in range(width):
            target[i] = narrow(kind, (widen(kind, source[i]) * scale) * (shift + widen(kind, factor[i])))


@functools.cache
def _norm(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def rms_norm(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 7)
        x, weight, out, rows, width = field[0], field[1], field[2], field[3], field[4]
        eps, offset = double_of_bits(field[5]), double_of_bits(field[6])
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            at = row * width * item
            _normalise(kind, x + at, weight, out + at, width, eps, offset)

    return compile_kernel(rms_norm)


@functools.cache
def _add_norm(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def add_rms_norm(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 9)
        x, residual, weight, total, out = field[0], field[1], field[2], field[3], field[4]
        rows, width = field[5], field[6]
        eps, offset = double_of_bits(field[7]), double_of_bits(field[8])
        first, last = share(rows, thread, threads)
        for row in range(first, last):
            at = row * width * item
            a, b = elements(kind, x + at, width), elements(kind, residual + at, width)
            both = elements(kind, total + at, width)
            for i in range(width):
                both[i] = narrow(kind, widen(kind, a[i]) + widen(kind, b[i]))
            _normalise(kind, total + at, weight, out + at, width, eps, offset)

    return compile_kernel(add_rms_norm)


@functools.cache
def _add(kind: int) -> Address:
    item = ITEMSIZE[kind]

    def add(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 4)
        first, last = share(field[3], thread, threads)
        count, at = last - first, first * item
        a, b = elements(kind, field[0] + at, count), elements(kind, field[1] + at, count)
        out = elements(kind, field[2] + at, count)
        for i in range(count):
            out[i] = narrow(kind, widen(kind, a[i]) + widen(kind, b[i]))

    return compile_kernel(add)


def _bind_add(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    return Call(Part("add", _add(kind_of(outputs[0])), (*inputs, *outputs, outputs[0].numel())))


def _bind_norm(
    op: str,
    kernel: Callable[[int], Address],
    inputs: Tensors,
    outputs: tuple[torch.Tensor, ...],
    attrs: Mapping[str, Attr],
    _: torch.Tensor | None,
) -> Launch:
    out = outputs[-1]
    width = out.shape[-1]
    numbers = (out.numel() // width, width, float(attrs["eps"]), float(attrs["weight_offset"]))
    return Call(Part(op, kernel(kind_of(out)), (*inputs, *outputs, *numbers)))


def _norm_kernel(op: str, kernel: Callable[[int], Address]) -> Kernel:
    return Kernel(op, op, functools.partial(_bind_norm, op, kernel), refuses_wide_floats)


KERNELS = (
    Kernel("add", "add", _bind_add, refuses_wide_floats),
    _norm_kernel("rms_norm", _norm),
    _norm_kernel("add_rms_norm", _add_norm),
    _norm_kernel("head_rms_norm", _norm),
)
