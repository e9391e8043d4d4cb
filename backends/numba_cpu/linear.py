"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `gated_activation`, `linear_gated` and `logits`. What always
holds: a call reads each weight from memory once, whatever its number of rows; sums are float32 and rounded once, after
bias or activation; threads take chunks of weights as they come, which changes who computes a number, never the number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numba import int64

from slotwise.backends.numba_cpu import panels, products_q
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
from slotwise.backends.numba_cpu.products_q import INT4, INT4_OFFSET, INT8, quantise_tile, quantised_products
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, next_chunk, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.ops.linear import ACTIVATIONS
from slotwise.core.ops.linear_q import FLOAT_OPS, GROUP

_AT = FIRST_FIELD * 8

TILES, PANELS = 0, 1
"""How rows meet weights: a few at a time, each weight as it is stored (`products.py`), or all, by panels (`panels.py`)."""

_SCRATCH = TILE_ROWS * CHUNK * 4

_SHARED = 13
"""Fields that all products share; each kernel's own come after them."""


@device
def _prepare(method: int, kind: int, form: int, field: int, thread: int) -> tuple[int, int]:
    """(packed rows, this thread's scratch memory); the rows are packed here where each thread does that for itself."""
    f = int64s(field, _SHARED)
    x, packed, rows, width, groups, row_bytes, private = f[0], f[1], f[3], f[4], f[5], f[6], f[7]
    if method == PANELS:
        return packed, packed + rows * width * 4 + thread * f[10]
    if private == 0:
        return packed, 0
    own = packed + thread * rows * row_bytes
    for tile in range(groups):
        first, last = tile_rows(tile, groups, rows)
        if form == 0:
            pack_tile(kind, x, width, 4 if kind == 0 else 2, first, last, own + first * row_bytes)
        else:
            quantise_tile(kind, x, width, first, last, own + first * row_bytes)
    return own, 0


@device
def _chunk(
    method: int, kind: int, form: int, group: int, field: int, packed: int, n: int, count: int, sums: int, scratch: int
) -> tuple[int, int]:
    """Products of a group's rows with `count` weights from n on, at `sums` [rows, CHUNK]; returns (first, last + 1)."""
    f = int64s(field, _SHARED)
    weight, rows, width, groups, row_bytes = f[2], f[3], f[4], f[5], f[6]
    scale, offset = f[11] + n * (width // GROUP * 2), f[12] + n * (width // GROUP * 2)
    stride = width * (4 if kind == 0 else 2)
    if form != 0:
        stride = width if form == INT8 else width // 2
    at = weight + n * stride
    if method == PANELS:
        panel_products(kind, form, rows, groups, packed, at, scale, offset, width, count, sums, scratch)
        return 0, rows
    first, last = tile_rows(group, groups, rows)
    tile = packed + first * row_bytes
    if form == 0:
        products(kind, last - first, tile, at, stride, width, count, sums, CHUNK * 4)
    else:
        quantised_products(form, last - first, tile, at, scale, offset, width, count, sums, CHUNK * 4)
    return first, last


@functools.cache
def _linear(method: int, kind: int, form: int) -> Address:
    """`y = x weight^T + bias`, rounded to the dtype, in up to three parts that lie apart (q, k, v)."""
    item = ITEMSIZE[kind]

    def linear(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 7)
        rows, count, chunk = field[3], field[8], field[9]
        bias = field[_SHARED]
        packed, scratch = _prepare(method, kind, form, at, thread)
        place = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(groups):
                first, last = _chunk(method, kind, form, group, at, packed, begin, some, place, scratch)
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
def _linear_gated(method: int, kind: int, form: int, activation: int) -> Address:
    """`activation(x gate^T) * (x up^T)`, rounded to the dtype once."""
    item = ITEMSIZE[kind]

    def linear_gated(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 1)
        rows, count, chunk, out = field[3], field[8], field[9], field[_SHARED]
        packed, scratch = _prepare(method, kind, form, at, thread)
        gate_at = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        up_at = stack_memory(_SCRATCH) if method == TILES else gate_at + rows * CHUNK * 4
        gate, up = floats(gate_at, rows * CHUNK), floats(up_at, rows * CHUNK)
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(groups):
                _chunk(method, kind, form, group, at, packed, begin, some, gate_at, scratch)
                first, last = _chunk(method, kind, form, group, at, packed, count + begin, some, up_at, scratch)
                for t in range(last - first):
                    target = elements(kind, out + ((first + t) * count + begin) * item, some)
                    row = t * CHUNK
                    for n in range(some):
                        target[n] = narrow(kind, activate(activation, gate[row + n]) * up[row + n])

    return compile_kernel(linear_gated)


@functools.cache
def _logits(method: int, kind: int, form: int) -> Address:
    """`y = x weight^T` in float32, bent by the soft cap where there is one."""

    def logits(call: int, thread: int, threads: int) -> None:
        at = call + _AT
        field = int64s(at, _SHARED + 2)
        rows, count, chunk, out = field[3], field[8], field[9], field[_SHARED]
        softcap = np.float32(double_of_bits(field[_SHARED + 1]))
        packed, scratch = _prepare(method, kind, form, at, thread)
        place = stack_memory(_SCRATCH) if method == TILES else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        groups = field[5] if method == TILES else 1
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(groups):
                first, last = _chunk(method, kind, form, group, at, packed, begin, some, place, scratch)
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


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight as a call has it: as stored, or codes with their scale and offset."""

    form: int
    stored: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def _split(op: str, inputs: Tensors, attrs: Mapping[str, Attr]) -> tuple[torch.Tensor, _Weight, Tensors]:
    """A call's x, its weight, and what inputs are left."""
    x, weight = given(inputs[0]), given(inputs[1])
    if op not in FLOAT_OPS:
        return x, _Weight(0, weight), inputs[2:]
    form = INT8 if attrs["bits"] == 8 else INT4 if inputs[3] is None else INT4_OFFSET
    return x, _Weight(form, weight, given(inputs[2]), inputs[3]), inputs[4:]


def _workspace(method: int, call: CallSpec) -> int:
    x = call.inputs[0]
    rows, width = x.sizes() if x is not None else (0, 0)
    if method == PANELS:
        return panels.packed_bytes(rows, width)
    return products_q.packed_bytes(rows, width) if call.op in FLOAT_OPS else packed_bytes(rows, width)


def _product(
    method: int,
    op: str,
    kernel: Address,
    x: torch.Tensor,
    weight: _Weight,
    count: int,
    workspace: Field,
    own: tuple[Field, ...],
) -> Launch:
    """The call of a product kernel, after a call that packs the rows where threads share them."""
    rows, width = x.shape
    groups, kind = tiles(rows), kind_of(x)
    if method == PANELS:
        pack, row_bytes, private = panels.pack_kernel(kind), width * 4, False
        chunk, scratch = panels.chunk_of(count), panels.own_bytes(rows)
    elif weight.form:
        pack, row_bytes = products_q.quantise_kernel(kind), products_q.row_bytes(width)
        private, chunk, scratch = products_q.is_private(rows, width), chunk_of(count), 0
    else:
        pack, row_bytes = pack_kernel(kind), packed_width(width) * 4
        private, chunk, scratch = is_private(rows, width), chunk_of(count), 0
    sizes = (rows, width, groups, row_bytes, private, count, chunk, scratch)
    part = Part(op, kernel, (x, workspace, weight.stored, *sizes, weight.scale, weight.offset, *own))
    if private:
        return Call(part)
    return Call(Part(op, pack, (x, workspace, rows, width, groups, row_bytes)), part)


Outputs = tuple[torch.Tensor, ...]


def _bind_linear(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, (bias,) = _split(op, inputs, attrs)
    parts: list[Field] = []
    for out in outputs:
        parts += [out, out.numel() // len(x)]
    parts += [0] * (6 - len(parts))
    kernel = _linear(method, kind_of(x), weight.form)
    return _product(method, op, kernel, x, weight, len(weight.stored), workspace, (bias, *parts))


def _bind_gated(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    kernel = _linear_gated(method, kind_of(x), weight.form, ACTIVATION_CODES[str(attrs["activation"])])
    return _product(method, op, kernel, x, weight, len(weight.stored) // 2, workspace, outputs)


def _bind_logits(
    method: int, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    kernel, own = _logits(method, kind_of(x), weight.form), (*outputs, float(attrs["softcap"]))
    return _product(method, op, kernel, x, weight, len(weight.stored), workspace, own)


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
_ALL = {**_BINDS, **{op: _BINDS[of.name] for op, of in FLOAT_OPS.items()}}


def _kernel(op: str, name: str, method: int, invariant_rows: int | None) -> Kernel:
    bind = functools.partial(_ALL[op], method, op)
    return Kernel(op, f"{op}{name}", bind, _refuses, invariant_rows, functools.partial(_workspace, method))


KERNELS = (
    *(_kernel(op, "", TILES, None) for op in _ALL),
    *(_kernel(op, ".panels", PANELS, 0) for op in _ALL),
    Kernel("gated_activation", "gated_activation", _bind_gate, _refuses),
)
