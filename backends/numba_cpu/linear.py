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

from slotwise.backends.numba_cpu import octets, octets_q
from slotwise.backends.numba_cpu.activation import ACTIVATION_CODES, activate
from slotwise.backends.numba_cpu.calls import Call, Field, Part
from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.elements import given, kind_of, refuses_wide_floats
from slotwise.backends.numba_cpu.memory import (
    ZERO,
    call_5,
    call_7,
    device,
    double_of_bits,
    elements,
    floats,
    int64s,
    narrow,
    tanh,
    widen,
)
from slotwise.backends.numba_cpu.octets_q import INT4, INT4_OFFSET, INT8
from slotwise.backends.numba_cpu.products import (
    BLOCK_ROWS,
    CHUNK,
    PACKED,
    PRODUCT_FIELDS,
    ROW_BYTES,
    ROWS,
    TILES,
    WIDTH,
    X,
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
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, MAX_THREADS, next_chunk, share
from slotwise.backends.numba_cpu.vectors import ITEMSIZE
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.layouts import OCTETS
from slotwise.core.ops.linear import ACTIVATIONS
from slotwise.core.ops.linear_q import FLOAT_OPS, GROUP

_AT = FIRST_FIELD * 8

# Fields after those that products share; each kernel's own come last.
_PRIVATE, _PACKED_BYTES, _COUNT, _CHUNK, _PACK, _PRODUCTS, _OWN = range(PRODUCT_FIELDS, PRODUCT_FIELDS + 7)


def _sum_bytes(rows: int) -> int:
    """Bytes of the sums of a block of rows with a chunk of weights."""
    return min(rows, BLOCK_ROWS) * CHUNK * 4


@device
def _sums(field: Any, thread: int) -> int:
    """This thread's memory for two blocks of sums, after the packed rows."""
    rows = min(field[ROWS], BLOCK_ROWS)
    return int(field[PACKED] + field[_PACKED_BYTES] + thread * 2 * rows * (CHUNK * 4))


@device
def _prepare(field: Any, thread: int) -> int:
    """Where the packed rows are; they are packed here where each thread does that for itself."""
    packed, rows = field[PACKED], field[ROWS]
    if field[_PRIVATE] == 0:
        return int(packed)
    own = packed + thread * rows * field[ROW_BYTES]
    for tile in range(field[TILES]):
        first, last = tile_rows(tile, rows)
        call_5(field[_PACK], (field[X], field[WIDTH], first, last, own + first * field[ROW_BYTES]))
    return int(own)


@device
def _block(call: int, packed: int, first: int, last: int, begin: int, count: int, sums: int) -> None:
    """Products of a block's rows with `count` weights from `begin` on, at `sums` [rows, CHUNK]."""
    call_7(int64s(call + _AT, _OWN)[_PRODUCTS], (call + _AT, packed, first, last, begin, count, sums))


@functools.cache
def _linear(kind: int) -> Address:
    """`y = x weight^T + bias`, rounded to the dtype, in up to three parts that lie apart (q, k, v)."""
    item = ITEMSIZE[kind]

    def linear(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, _OWN + 7)
        count, chunk, bias = field[_COUNT], field[_CHUNK], field[_OWN]
        packed, place = _prepare(field, thread), _sums(field, thread)
        sums = floats(place, BLOCK_ROWS * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for first in range(0, field[ROWS], BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, field[ROWS])
                _block(call, packed, first, last, begin, some, place)
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
        count, chunk, out = field[_COUNT], field[_CHUNK], field[_OWN]
        packed, gate_at = _prepare(field, thread), _sums(field, thread)
        up_at = gate_at + min(field[ROWS], BLOCK_ROWS) * (CHUNK * 4)
        gate, up = floats(gate_at, BLOCK_ROWS * CHUNK), floats(up_at, BLOCK_ROWS * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for first in range(0, field[ROWS], BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, field[ROWS])
                _block(call, packed, first, last, begin, some, gate_at)
                _block(call, packed, first, last, count + begin, some, up_at)
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
        count, chunk, out = field[_COUNT], field[_CHUNK], field[_OWN]
        softcap = np.float32(double_of_bits(field[_OWN + 1]))
        packed, place = _prepare(field, thread), _sums(field, thread)
        sums = floats(place, BLOCK_ROWS * CHUNK)
        while True:
            begin = next_chunk(call) * chunk
            if begin >= count:
                break
            some = min(chunk, count - begin)
            for first in range(0, field[ROWS], BLOCK_ROWS):
                last = min(first + BLOCK_ROWS, field[ROWS])
                _block(call, packed, first, last, begin, some, place)
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
    if call.op in FLOAT_OPS and call.attrs["layout"] != OCTETS:
        return f"quantised weights must stand in octets, these stand in {call.attrs['layout']}"
    return refuses_wide_floats(call)


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight as a call has it: as stored, or codes with their scale and offset."""

    form: int
    layout: str
    stored: torch.Tensor
    scale: torch.Tensor | None = None
    offset: torch.Tensor | None = None


def _split(op: str, inputs: Tensors, attrs: Mapping[str, Attr]) -> tuple[torch.Tensor, _Weight, Tensors]:
    """A call's x, its weight, and what inputs are left."""
    x, weight, layout = given(inputs[0]), given(inputs[1]), str(attrs["layout"])
    if op not in FLOAT_OPS:
        return x, _Weight(0, layout, weight), inputs[2:]
    form = INT8 if attrs["bits"] == 8 else INT4 if inputs[3] is None else INT4_OFFSET
    return x, _Weight(form, layout, weight, given(inputs[2]), inputs[3]), inputs[4:]


def _row_bytes(quantised: bool, layout: str, width: int) -> int:
    """Bytes of one packed row."""
    return octets_q.row_bytes(width) if quantised else 4 * (width if layout == OCTETS else packed_width(width))


def _workspace(call: CallSpec) -> int:
    x = call.inputs[0]
    rows, width = x.sizes() if x is not None else (0, 0)
    row_bytes = _row_bytes(call.op in FLOAT_OPS, str(call.attrs["layout"]), width)
    return packed_bytes(rows, width, row_bytes) + MAX_THREADS * 2 * _sum_bytes(rows)


def _product(
    op: str, kernel: Address, x: torch.Tensor, weight: _Weight, count: int, workspace: Field, own: tuple[Field, ...]
) -> Launch:
    """The call of a product kernel, after a call that packs the rows where threads share them."""
    (rows, width), form, kind = x.shape, weight.form, kind_of(x)
    if form:
        pack, made = octets_q.quantise_function(kind), octets_q.products_function(form)
    elif weight.layout == OCTETS:
        product = octets.product_kind(kind)
        pack, made = octets.pack_function(kind, product), octets.products_function(kind, product)
    else:
        pack, made = pack_function(kind), products_function(kind)
    row_bytes, private = _row_bytes(bool(form), weight.layout, width), is_private(rows, width)
    stride = octets_q.code_bytes(form, width) if form else width * ITEMSIZE[kind]
    fields = (
        x, workspace, weight.stored, weight.scale, weight.offset, stride, width // GROUP * 2, rows, width,
        tiles(rows), row_bytes, private, packed_bytes(rows, width, row_bytes), count, chunk_of(count), pack, made, *own,
    )  # fmt: skip
    part = Part(op, kernel, fields)
    if private:
        return Call(part)
    return Call(Part(op, pack_kernel(), (x, workspace, rows, width, tiles(rows), row_bytes, pack)), part)


Outputs = tuple[torch.Tensor, ...]


def _bind_linear(op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field) -> Launch:
    x, weight, (bias,) = _split(op, inputs, attrs)
    parts: list[Field] = []
    for out in outputs:
        parts += [out, out.numel() // len(x)]
    parts += [0] * (6 - len(parts))
    return _product(op, _linear(kind_of(x)), x, weight, len(weight.stored), workspace, (bias, *parts))


def _bind_gated(op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    kernel = _linear_gated(kind_of(x), ACTIVATION_CODES[str(attrs["activation"])])
    return _product(op, kernel, x, weight, len(weight.stored) // 2, workspace, outputs)


def _bind_logits(op: str, inputs: Tensors, outputs: Outputs, attrs: Mapping[str, Attr], workspace: Field) -> Launch:
    x, weight, _ = _split(op, inputs, attrs)
    own: tuple[Field, ...] = (*outputs, float(attrs["softcap"]))
    return _product(op, _logits(), x, weight, len(weight.stored), workspace, own)


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


KERNELS = (
    *(Kernel(op, op, functools.partial(bind, op), _refuses, workspace=_workspace) for op, bind in _ALL.items()),
    Kernel("gated_activation", "gated_activation", _bind_gate, _refuses),
)
