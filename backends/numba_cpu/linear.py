"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `gated_activation`, `linear_gated` and `logits`. What always
holds: a call reads each weight from memory once, whatever its number of rows; sums are float32 and rounded once, after
bias or activation; threads take chunks of weights as they come, which changes who computes a number, never the number.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
    call_5,
    call_8,
    call_9,
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
from slotwise.backends.numba_cpu.panels import PANEL_BYTES
from slotwise.backends.numba_cpu.products import (
    CHUNK,
    TILE_ROWS,
    chunk_of,
    is_private,
    pack_function,
    pack_kernel,
    packed_bytes,
    packed_width,
    products_function,
    tile_rows,
    tiles,
)
from slotwise.backends.numba_cpu.products_q import INT4, INT4_OFFSET, INT8
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, next_chunk, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.ops.linear import ACTIVATIONS
from slotwise.core.ops.linear_q import FLOAT_OPS, GROUP

_AT = FIRST_FIELD * 8

TILES, QUANTISED, PANELS = 0, 1, 2
"""How rows meet weights: a few rows at a time, each weight as it is stored (`products.py`) or in whole numbers
(`products_q.py`); or all rows at once, by panels of weights (`panels.py`)."""

_SCRATCH = TILE_ROWS * CHUNK * 4

# Fields that all products share; each kernel's own come after them.
_X, _PACKED, _WEIGHT, _SCALE, _OFFSET, _STRIDE, _SCALE_STRIDE, _ROWS, _WIDTH = range(9)
_TILES, _ROW_BYTES, _PRIVATE, _COUNT, _CHUNK, _OWN_BYTES, _METHOD, _PACK, _PRODUCTS, _OWN = range(9, 19)


@device
def _prepare(field: Any, thread: int) -> tuple[int, int]:
    """(packed rows, this thread's scratch memory); the rows are packed here where each thread does that for itself."""
    packed, rows = field[_PACKED], field[_ROWS]
    if field[_METHOD] == PANELS:
        return packed, packed + rows * field[_ROW_BYTES] + thread * field[_OWN_BYTES]
    if field[_PRIVATE] == 0:
        return packed, 0
    own = packed + thread * rows * field[_ROW_BYTES]
    for tile in range(field[_TILES]):
        first, last = tile_rows(tile, field[_TILES], rows)
        call_5(field[_PACK], (field[_X], field[_WIDTH], first, last, own + first * field[_ROW_BYTES]))
    return own, 0


@device
def _groups(field: Any) -> int:
    """Groups of rows whose products are made together."""
    return 1 if field[_METHOD] == PANELS else field[_TILES]


@device
def _chunk(field: Any, group: int, packed: int, n: int, count: int, sums: int, scratch: int) -> tuple[int, int]:
    """Products of a group's rows with `count` weights from n on, at `sums` [rows, CHUNK]; returns (first, last + 1)."""
    rows, width = field[_ROWS], field[_WIDTH]
    weight = field[_WEIGHT] + n * field[_STRIDE]
    scale, offset = field[_SCALE] + n * field[_SCALE_STRIDE], field[_OFFSET] + n * field[_SCALE_STRIDE]
    if field[_METHOD] == PANELS:
        call_9(field[_PRODUCTS], (rows, packed, weight, scale, offset, width, count, sums, scratch))
        return 0, rows
    first, last = tile_rows(group, field[_TILES], rows)
    tile = packed + first * field[_ROW_BYTES]
    if field[_METHOD] == TILES:
        call_8(field[_PRODUCTS], (last - first, tile, weight, field[_STRIDE], width, count, sums, CHUNK * 4))
    else:
        call_9(field[_PRODUCTS], (last - first, tile, weight, scale, offset, width, count, sums, CHUNK * 4))
    return first, last


@functools.cache
def _linear(kind: int) -> Address:
    """`y = x weight^T + bias`, rounded to the dtype, in up to three parts that lie apart (q, k, v)."""
    item = ITEMSIZE[kind]

    def linear(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _OWN + 7)
        rows, count, chunk, bias = field[_ROWS], field[_COUNT], field[_CHUNK], field[_OWN]
        packed, scratch = _prepare(field, thread)
        place = stack_memory(_SCRATCH) if scratch == 0 else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(_groups(field)):
                first, last = _chunk(field, group, packed, begin, some, place, scratch)
                if bias != 0:
                    addend = elements(kind, bias + begin * item, some)
                    for t in range(last - first):
                        for n in range(some):
                            sums[t * CHUNK + n] += widen(kind, addend[n])
                # A chunk may reach over the border between two outputs: each takes its part of the columns.
                start = int64(0)
                for part in range(3):
                    out, columns = field[_OWN + 1 + 2 * part], field[_OWN + 2 + 2 * part]
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
        field = int64s(call + _AT, _OWN + 1)
        rows, count, chunk, out = field[_ROWS], field[_COUNT], field[_CHUNK], field[_OWN]
        packed, scratch = _prepare(field, thread)
        gate_at = stack_memory(_SCRATCH) if scratch == 0 else scratch + 2 * PANEL_BYTES
        up_at = stack_memory(_SCRATCH) if scratch == 0 else gate_at + rows * CHUNK * 4
        gate, up = floats(gate_at, rows * CHUNK), floats(up_at, rows * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(_groups(field)):
                _chunk(field, group, packed, begin, some, gate_at, scratch)
                first, last = _chunk(field, group, packed, count + begin, some, up_at, scratch)
                for t in range(last - first):
                    target = elements(kind, out + ((first + t) * count + begin) * item, some)
                    row = t * CHUNK
                    for n in range(some):
                        target[n] = narrow(kind, activate(activation, gate[row + n]) * up[row + n])

    return compile_kernel(linear_gated)


@functools.cache
def _logits() -> Address:
    """`y = x weight^T` in float32, bent by the soft cap where there is one."""

    def logits(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _OWN + 2)
        rows, count, chunk, out = field[_ROWS], field[_COUNT], field[_CHUNK], field[_OWN]
        softcap = np.float32(double_of_bits(field[_OWN + 1]))
        packed, scratch = _prepare(field, thread)
        place = stack_memory(_SCRATCH) if scratch == 0 else scratch + 2 * PANEL_BYTES
        sums = floats(place, rows * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for group in range(_groups(field)):
                first, last = _chunk(field, group, packed, begin, some, place, scratch)
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


def _workspace(by_panels: bool, call: CallSpec) -> int:
    x = call.inputs[0]
    rows, width = x.sizes() if x is not None else (0, 0)
    if by_panels:
        return panels.packed_bytes(rows, width)
    return products_q.packed_bytes(rows, width) if call.op in FLOAT_OPS else packed_bytes(rows, width)


def _product(
    by_panels: bool,
    op: str,
    kernel: Address,
    x: torch.Tensor,
    weight: _Weight,
    count: int,
    workspace: Field,
    own: tuple[Field, ...],
) -> Launch:
    """The call of a product kernel, after a call that packs the rows where threads share them."""
    (rows, width), form, kind = x.shape, weight.form, kind_of(x)
    private, chunk, own_bytes = False, chunk_of(count), 0
    if by_panels:
        method, pack, made = PANELS, panels.pack_function(kind), panels.panels_function(0 if form else kind, form)
        row_bytes, chunk, own_bytes = width * 4, panels.chunk_of(count), panels.own_bytes(rows)
    elif form:
        method, pack, made = QUANTISED, products_q.quantise_function(kind), products_q.quantised_function(form)
        row_bytes, private = products_q.row_bytes(width), products_q.is_private(rows, width)
    else:
        method, pack, made = TILES, pack_function(kind), products_function(kind)
        row_bytes, private = packed_width(width) * 4, is_private(rows, width)
    stride = products_q.code_bytes(form, width) if form else width * ITEMSIZE[kind]
    fields = (
        x, workspace, weight.stored, weight.scale, weight.offset, stride, width // GROUP * 2, rows, width,
        tiles(rows), row_bytes, private, count, chunk, own_bytes, method, pack, made, *own,
    )  # fmt: skip
    part = Part(op, kernel, fields)
    if private:
        return Call(part)
    return Call(Part(op, pack_kernel(), (x, workspace, rows, width, tiles(rows), row_bytes, pack)), part)


Outputs = tuple[torch.Tensor, ...]


def _bind_linear(
    by_panels: bool, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, (bias,) = _split(op, inputs, attrs)
    parts: list[Field] = []
    for out in outputs:
        parts += [out, out.numel() // len(x)]
    parts += [0] * (6 - len(parts))
    return _product(by_panels, op, _linear(kind_of(x)), x, weight, len(weight.stored), workspace, (bias, *parts))


def _bind_gated(
    by_panels: bool, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    kernel = _linear_gated(kind_of(x), ACTIVATION_CODES[str(attrs["activation"])])
    return _product(by_panels, op, kernel, x, weight, len(weight.stored) // 2, workspace, outputs)


def _bind_logits(
    by_panels: bool, op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field
) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    own = (*outputs, float(attrs["softcap"]))
    return _product(by_panels, op, _logits(), x, weight, len(weight.stored), workspace, own)


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


def _kernel(op: str, by_panels: bool) -> Kernel:
    """Tiles keep rows apart and serve the decode side; panels are for many rows and promise no row invariance."""
    name = f"{op}.panels" if by_panels else op
    bind = functools.partial(_ALL[op], by_panels, op)
    return Kernel(op, name, bind, _refuses, 0 if by_panels else None, functools.partial(_workspace, by_panels))


KERNELS = (
    *(_kernel(op, by_panels) for op in _ALL for by_panels in (False, True)),
    Kernel("gated_activation", "gated_activation", _bind_gate, _refuses),
)
