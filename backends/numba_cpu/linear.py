"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `gated_activation`, `linear_gated` and `logits`. What always
holds: a call reads each weight from memory once, whatever its number of rows; sums are float32 and rounded once, after
bias or activation; threads take chunks of weights as they come, which changes who computes a number, never the number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import torch
from numba import int64

from slotwise.backends.numba_cpu.activation import ACTIVATION_CODES, activate
from slotwise.backends.numba_cpu.calls import Call, Field, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import device, double_of_bits, elements, floats, int64s, narrow, stack_memory
from slotwise.backends.numba_cpu.memory import tanh, widen
from slotwise.backends.numba_cpu.products import (
    CHUNK,
    TILE_ROWS,
    chunk_of,
    is_private,
    pack_kernel,
    pack_tile,
    packed_bytes,
    packed_width,
    products,
    tile_rows,
    tiles,
)
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, next_chunk, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.ops.linear import ACTIVATIONS

_AT = FIRST_FIELD * 8
_SCRATCH = TILE_ROWS * CHUNK * 4

# Fields that all products share; each kernel's own come after them.
_SHARED = 10


@device
def _rows_of(kind: int, item: int, field: int, thread: int) -> int:
    """Address of the packed rows, packed by this thread for itself where the call says so."""
    f = int64s(field, _SHARED)
    x, packed, rows, width, n_tiles, wide, private = f[0], f[1], f[3], f[4], f[5], f[6], f[7]
    if private == 0:
        return packed
    own = packed + thread * rows * wide * 4
    for tile in range(n_tiles):
        first, last = tile_rows(tile, n_tiles, rows)
        pack_tile(kind, x, width, item, first, last, own + first * wide * 4)
    return own


@functools.cache
def _linear(kind: int) -> Address:
    """`y = x weight^T + bias`, rounded to the dtype, in up to three parts that lie apart (q, k, v)."""
    item = ITEMSIZE[kind]

    def linear(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _SHARED + 7)
        weight, rows, width, n_tiles, wide = field[2], field[3], field[4], field[5], field[6]
        count, chunk = field[8], field[9]
        bias = field[_SHARED]
        packed = _rows_of(kind, item, call + _AT, thread)
        scratch = stack_memory(_SCRATCH)
        sums = floats(scratch, TILE_ROWS * CHUNK)
        stride = width * item
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for tile in range(n_tiles):
                first, last = tile_rows(tile, n_tiles, rows)
                tile_at = packed + first * wide * 4
                products(kind, last - first, tile_at, weight + begin * stride, stride, width, some, scratch, CHUNK * 4)
                if bias != 0:
                    addend = elements(kind, bias + begin * item, some)
                    for t in range(last - first):
                        for n in range(some):
                            sums[t * CHUNK + n] += widen(kind, addend[n])
                # A chunk may reach over the border between two outputs: each takes its part of the columns.
                start = int64(0)
                for part in range(3):
                    out, columns = field[_SHARED + 1 + 2 * part], field[_SHARED + 2 + 2 * part]
                    low, high = max(begin, start), min(begin + some, start + columns)
                    if low < high:
                        for t in range(last - first):
                            target = elements(kind, out + ((first + t) * columns + low - start) * item, high - low)
                            for n in range(high - low):
                                target[n] = narrow(kind, sums[t * CHUNK + low - begin + n])
                    start += columns

    return compile_kernel(linear)


@functools.cache
def _linear_gated(kind: int, activation: int) -> Address:
    """`activation(x gate^T) * (x up^T)`, rounded to the dtype once."""
    item = ITEMSIZE[kind]

    def linear_gated(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _SHARED + 1)
        weight, rows, width, n_tiles, wide = field[2], field[3], field[4], field[5], field[6]
        count, chunk, out = field[8], field[9], field[_SHARED]
        packed = _rows_of(kind, item, call + _AT, thread)
        gate_at, up_at = stack_memory(_SCRATCH), stack_memory(_SCRATCH)
        gate, up = floats(gate_at, TILE_ROWS * CHUNK), floats(up_at, TILE_ROWS * CHUNK)
        stride = width * item
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            source = weight + begin * stride
            for tile in range(n_tiles):
                first, last = tile_rows(tile, n_tiles, rows)
                tile_at = packed + first * wide * 4
                products(kind, last - first, tile_at, source, stride, width, some, gate_at, CHUNK * 4)
                products(kind, last - first, tile_at, source + count * stride, stride, width, some, up_at, CHUNK * 4)
                for t in range(last - first):
                    target = elements(kind, out + ((first + t) * count + begin) * item, some)
                    at = t * CHUNK
                    for n in range(some):
                        target[n] = narrow(kind, activate(activation, gate[at + n]) * up[at + n])

    return compile_kernel(linear_gated)


@functools.cache
def _logits(kind: int) -> Address:
    """`y = x weight^T` in float32, bent by the soft cap where there is one."""
    item = ITEMSIZE[kind]

    def logits(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _SHARED + 2)
        weight, rows, width, n_tiles, wide = field[2], field[3], field[4], field[5], field[6]
        count, chunk, out = field[8], field[9], field[_SHARED]
        softcap = np.float32(double_of_bits(field[_SHARED + 1]))
        packed = _rows_of(kind, item, call + _AT, thread)
        stride = width * item
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for tile in range(n_tiles):
                first, last = tile_rows(tile, n_tiles, rows)
                at = out + (first * count + begin) * 4
                tile_at = packed + first * wide * 4
                products(kind, last - first, tile_at, weight + begin * stride, stride, width, some, at, count * 4)
                if softcap > np.float32(0.0):
                    for t in range(last - first):
                        row = floats(at + t * count * 4, some)
                        for n in range(some):
                            row[n] = tanh(row[n] / softcap) * softcap

    return compile_kernel(logits)


@functools.cache
def _gate(kind: int, activation: int) -> Address:
    item = ITEMSIZE[kind]

    def gated_activation(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 4)
        first, last = share(field[3], thread, threads)
        count, at = last - first, first * item
        gate, up = elements(kind, field[0] + at, count), elements(kind, field[1] + at, count)
        out = elements(kind, field[2] + at, count)
        for i in range(count):
            out[i] = narrow(kind, activate(activation, widen(kind, gate[i])) * widen(kind, up[i]))

    return compile_kernel(gated_activation)


def _refuses(call: CallSpec) -> str | None:
    activation = call.attrs.get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return refuses_wide_floats(call)


def _workspace(call: CallSpec) -> int:
    x = call.inputs[0]
    rows, width = x.sizes() if x is not None else (0, 0)
    return packed_bytes(rows, width)


def product_parts(
    op: str,
    kernel: Address,
    x: torch.Tensor,
    weight: torch.Tensor,
    count: int,
    workspace: Field,
    own: tuple[Field, ...],
) -> Launch:
    """The call of a product kernel, after a call that packs the rows where threads share them."""
    rows, width = x.shape
    n_tiles, wide, private = tiles(rows), packed_width(width), is_private(rows, width)
    shared = (x, workspace, weight, rows, width, n_tiles, wide, private, count, chunk_of(count))
    part = Part(op, kernel, (*shared, *own))
    if private:
        return Call(part)
    return Call(Part(op, pack_kernel(kind_of(x)), (x, workspace, rows, width, n_tiles, wide)), part)


def _bind_linear(
    op: str, inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, bias = given(inputs[0]), given(inputs[1]), inputs[2]
    parts: list[Field] = []
    for out in outputs:
        parts += [out, out.numel() // len(x)]
    parts += [0] * (6 - len(parts))
    return product_parts(op, _linear(kind_of(x)), x, weight, len(weight), workspace, (bias, *parts))


def _bind_gated(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    x, weight = given(inputs[0]), given(inputs[1])
    kernel = _linear_gated(kind_of(x), ACTIVATION_CODES[str(attrs["activation"])])
    return product_parts("linear_gated", kernel, x, weight, len(weight) // 2, workspace, outputs)


def _bind_logits(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
) -> Launch:
    x, weight = given(inputs[0]), given(inputs[1])
    own = (*outputs, float(attrs["softcap"]))
    return product_parts("logits", _logits(kind_of(x)), x, weight, len(weight), workspace, own)


def _bind_gate(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    kernel = _gate(kind_of(outputs[0]), ACTIVATION_CODES[str(attrs["activation"])])
    return Call(Part("gated_activation", kernel, (*inputs, *outputs, outputs[0].numel())))


KERNELS = (
    *(
        Kernel(op, op, functools.partial(_bind_linear, op), _refuses, workspace=_workspace)
        for op in ("linear", "linear_heads", "linear_qkv")
    ),
    Kernel("gated_activation", "gated_activation", _bind_gate, _refuses),
    Kernel("linear_gated", "linear_gated", _bind_gated, _refuses, workspace=_workspace),
    Kernel("logits", "logits", _bind_logits, _refuses, workspace=_workspace),
)
