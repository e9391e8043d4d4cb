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

from slotwise.backends.numba_cpu import panels
from slotwise.backends.numba_cpu.activation import ACTIVATION_CODES, activate
from slotwise.backends.numba_cpu.calls import Call, Field, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import (
    ZERO,
    device,
    double_of_bits,
    elements,
    floats,
    int64s,
    narrow,
    stack_memory,
    tanh,
    widen,
)
from slotwise.backends.numba_cpu.panels import PANEL_BYTES, panel_products
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

TILES, PANELS = 0, 1
"""How rows meet weights: a few at a time, each weight as it is stored (`products.py`), or all, by panels (`panels.py`)."""

_SCRATCH = TILE_ROWS * CHUNK * 4

_SHARED = 11
"""Fields that all products share; each kernel's own come after them."""


@device
def _prepare(method: int, kind: int, item: int, field: int, thread: int) -> tuple[int, int]:
    """(packed rows, this thread's scratch memory); the rows are packed here where each thread does that for itself."""
    f = int64s(field, _SHARED)
    x, packed, rows, width, groups, wide, private = f[0], f[1], f[3], f[4], f[5], f[6], f[7]
    if method == PANELS:
        return packed, packed + rows * width * 4 + thread * f[10]
    if private == 0:
        return packed, 0
    own = packed + thread * rows * wide * 4
    for tile in range(groups):
        first, last = tile_rows(tile, groups, rows)
        pack_tile(kind, x, width, item, first, last, own + first * wide * 4)
    return own, 0


@device
def _chunk(
    method: int,
    kind: int,
    group: int,
    field: int,
    packed: int,
    weight: int,
    stride: int,
    count: int,
    sums: int,
    scratch: int,
) -> tuple[int, int]:
    """Products of a group's rows with `count` weights, at `sums` [rows, CHUNK]; returns the rows (first, last + 1)."""
    f = int64s(field, _SHARED)
    rows, width, groups, wide = f[3], f[4], f[5], f[6]
    if method == PANELS:
        panel_products(kind, rows, groups, packed, weight, width, count, sums, scratch)
        return 0, rows
    first, last = tile_rows(group, groups, rows)
    products(kind, last - first, packed + first * wide * 4, weight, stride, width, count, sums, CHUNK * 4)
    return first, last


@functools.cache
def _linear(method: int, kind: int) -> Address:
    """`y = x weight^T + bias`, rounded to the dtype, in up to three parts that lie apart (q, k, v)."""
    item = ITEMSIZE[kind]

    def linear(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 7)
        weight, rows, width, count, chunk = field[2], field[3], field[4], field[8], field[9]
        bias = field[_SHARED]
        packed, scratch = _prepare(method, kind, item, at, thread)
        place = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        stride = width * item
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(groups):
                first, last = _chunk(
                    method, kind, group, at, packed, weight + begin * stride, stride, some, place, scratch
                )
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
def _linear_gated(method: int, kind: int, activation: int) -> Address:
    """`activation(x gate^T) * (x up^T)`, rounded to the dtype once."""
    item = ITEMSIZE[kind]

    def linear_gated(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 1)
        weight, rows, width, count, chunk, out = field[2], field[3], field[4], field[8], field[9], field[_SHARED]
        packed, scratch = _prepare(method, kind, item, at, thread)
        gate_at = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        up_at = stack_memory(_SCRATCH) if method == TILES else gate_at + rows * CHUNK * 4
        gate, up = floats(gate_at, rows * CHUNK), floats(up_at, rows * CHUNK)
        stride = width * item
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            source = weight + begin * stride
            for group in range(groups):
                _chunk(method, kind, group, at, packed, source, stride, some, gate_at, scratch)
                source_up = source + count * stride
                first, last = _chunk(method, kind, group, at, packed, source_up, stride, some, up_at, scratch)
                for t in range(last - first):
                    target = elements(kind, out + ((first + t) * count + begin) * item, some)
                    row = t * CHUNK
                    for n in range(some):
                        target[n] = narrow(kind, activate(activation, gate[row + n]) * up[row + n])

    return compile_kernel(linear_gated)


@functools.cache
def _logits(method: int, kind: int) -> Address:
    """`y = x weight^T` in float32, bent by the soft cap where there is one."""
    item = ITEMSIZE[kind]

    def logits(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 2)
        weight, rows, width, count, chunk, out = field[2], field[3], field[4], field[8], field[9], field[_SHARED]
        softcap = np.float32(double_of_bits(field[_SHARED + 1]))
        packed, scratch = _prepare(method, kind, item, at, thread)
        place = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        stride = width * item
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(groups):
                first, last = _chunk(
                    method, kind, group, at, packed, weight + begin * stride, stride, some, place, scratch
                )
                for t in range(last - first):
                    target = floats(out + ((first + t) * count + begin) * 4, some)
                    row = t * CHUNK
                    if softcap > ZERO:
                        for n in range(some):
                            target[n] = tanh(sums[row + n] / softcap) * softcap
                    else:
                        for n in range(some):
                            target[n] = sums[row + n]

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


def _workspace(method: int, call: CallSpec) -> int:
    x = call.inputs[0]
    rows, width = x.sizes() if x is not None else (0, 0)
    return panels.packed_bytes(rows, width) if method == PANELS else packed_bytes(rows, width)


def _product(
    method: int,
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
    groups = tiles(rows)
    if method == PANELS:
        pack = Part(op, panels.pack_kernel(kind_of(x)), (x, workspace, rows, width, groups))
        chunk, scratch = panels.chunk_of(count), panels.own_bytes(rows)
        return Call(
            pack, Part(op, kernel, (x, workspace, weight, rows, width, groups, width, 0, count, chunk, scratch, *own))
        )
    wide, private = packed_width(width), is_private(rows, width)
    part = Part(op, kernel, (x, workspace, weight, rows, width, groups, wide, private, count, chunk_of(count), 0, *own))
    if private:
        return Call(part)
    return Call(Part(op, pack_kernel(kind_of(x)), (x, workspace, rows, width, groups, wide)), part)


Outputs = tuple[torch.Tensor, ...]


def _bind_linear(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, bias = given(inputs[0]), given(inputs[1]), inputs[2]
    parts: list[Field] = []
    for out in outputs:
        parts += [out, out.numel() // len(x)]
    parts += [0] * (6 - len(parts))
    return _product(method, op, _linear(method, kind_of(x)), x, weight, len(weight), workspace, (bias, *parts))


def _bind_gated(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight = given(inputs[0]), given(inputs[1])
    kernel = _linear_gated(method, kind_of(x), ACTIVATION_CODES[str(attrs["activation"])])
    return _product(method, op, kernel, x, weight, len(weight) // 2, workspace, outputs)


def _bind_logits(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight = given(inputs[0]), given(inputs[1])
    own = (*outputs, float(attrs["softcap"]))
    return _product(method, op, _logits(method, kind_of(x)), x, weight, len(weight), workspace, own)


def _bind_gate(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    kernel = _gate(kind_of(outputs[0]), ACTIVATION_CODES[str(attrs["activation"])])
    return Call(Part("gated_activation", kernel, (*inputs, *outputs, outputs[0].numel())))


_BINDS = {
    "linear": _bind_linear,
    "linear_heads": _bind_linear,
    "linear_qkv": _bind_linear,
    "linear_gated": _bind_gated,
    "logits": _bind_logits,
}


def _kernel(op: str, name: str, method: int, invariant_rows: int | None) -> Kernel:
    bind = functools.partial(_BINDS[op], method, op)
    return Kernel(op, f"{op}{name}", bind, _refuses, invariant_rows, functools.partial(_workspace, method))


KERNELS = (
    *(_kernel(op, "", TILES, None) for op in _BINDS),
    *(_kernel(op, ".panels", PANELS, 0) for op in _BINDS),
    Kernel("gated_activation", "gated_activation", _bind_gate, _refuses),
)
