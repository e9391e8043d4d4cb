"""Products of rows with weights that stand in octets: from one row to a whole prompt.

Owns `octet_tile` and `octet_products`. What always holds: each weight has a lane of its own and sums along k in order,
in one float32 accumulator, so no tiling, chunk, thread or number of rows changes a bit; a weight is widened once for up
to `TILE_ROWS` rows. (Octets: `core/layouts.py`. Lanes for weights and rows broadcast from the nearest caches are the
inner kernel of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; here weights stand as
its packed panels do, so nothing is packed at run time but the rows.)

A tile of packed rows is float32 [K, rows].
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.memory import device, elements, floats, widen
from slotwise.backends.numba_cpu.vectors import (
    AHEAD,
    BF16,
    F16,
    ITEMSIZE,
    Builder,
    Loop,
    fma,
    int64,
    intrinsic,
    literals,
    load,
    prefetch,
    splat,
    spread,
    store,
)
from slotwise.core.layouts import OCTET, WEIGHT_WORD

FLOATS = ir.VectorType(ir.FloatType(), OCTET)
_WORDS = ir.VectorType(ir.IntType(32), OCTET)
_I32 = ir.IntType(32)


@functools.cache
def pack_function(kind: int) -> Address:
    """Packs one tile, its rows side by side, k after k: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def pack_tile(x: int, width: int, first: int, last: int, target: int) -> None:
        high = last - first
        into = floats(target, high * width)
        for t in range(high):
            source = elements(kind, x + (first + t) * width * item, width)
            for k in range(width):
                into[k * high + t] = widen(kind, source[k])

    return compile_kernel(pack_tile, (types.int64,) * 5)


def _widened(builder: Builder, kind: int, address: Any) -> list[Any]:
    """The two elements of each of eight words, as two float32 vectors."""
    if kind == BF16:
        words = load(builder, _WORDS, address)
        return [
            builder.bitcast(builder.shl(words, splat(_WORDS, 16)), FLOATS),
            builder.bitcast(builder.and_(words, splat(_WORDS, 0xFFFF0000)), FLOATS),
        ]
    stored = ir.HalfType() if kind == F16 else ir.FloatType()
    pairs = load(builder, ir.VectorType(stored, 2 * OCTET), address)
    found = []
    for place in range(WEIGHT_WORD):
        lanes = ir.Constant(ir.VectorType(_I32, OCTET), list(range(place, 2 * OCTET, 2)))
        each = builder.shuffle_vector(pairs, pairs, lanes)
        found.append(builder.fpext(each, FLOATS) if kind == F16 else each)
    return found


@intrinsic
def octet_tile(
    typing: Any, kind: Any, octets: Any, rows: Any, weight: Any, step: Any, x: Any, width: Any, out: Any,
    out_stride: Any, out_step: Any,
) -> Any:  # fmt: skip
    """Products of a tile of `rows` packed rows with `octets` octets of weights, `step` bytes apart.

    `out[t, n]`, float32: `out_stride` bytes from t to t + 1, `out_step` from one octet to the next.
    """
    known = literals(kind, octets, rows)
    if known is None:
        return None
    stored, n_octets, n_rows = known

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        weight, step, x, width, out, out_stride, out_step = arguments[3:]
        streams = [builder.add(weight, builder.mul(step, int64(c))) for c in range(n_octets)]
        with Loop(builder, width, WEIGHT_WORD, [splat(FLOATS, 0.0)] * (n_rows * n_octets)) as loop:
            sums = list(loop.carried)
            offset = builder.mul(loop.index, int64(OCTET * ITEMSIZE[stored]))
            places = [builder.add(stream, offset) for stream in streams]
            for place in places:
                prefetch(builder, builder.add(place, int64(AHEAD)))
            weights = [_widened(builder, stored, place) for place in places]
            row_at = builder.add(x, builder.mul(loop.index, int64(4 * n_rows)))
            for k in range(WEIGHT_WORD):
                for t in range(n_rows):
                    row = spread(builder, load(builder, ir.FloatType(), row_at, 4 * (k * n_rows + t)), FLOATS)
                    for c in range(n_octets):
                        at = t * n_octets + c
                        sums[at] = fma(builder, weights[c][k], row, sums[at])
            loop.next = sums
        store_tile(builder, loop.result, n_rows, n_octets, out, out_stride, out_step)
        return context.get_dummy_value()

    return types.void(kind, octets, rows, *([types.int64] * 7)), generate


def store_tile(
    builder: Builder, sums: list[Any], n_rows: int, n_octets: int, out: Any, out_stride: Any, out_step: Any
) -> None:
    """Store the sums of a tile, row by row."""
    for t in range(n_rows):
        row = builder.add(out, builder.mul(out_stride, int64(t)))
        for c in range(n_octets):
            store(builder, sums[t * n_octets + c], builder.add(row, builder.mul(out_step, int64(c))))


@device
def _pair(
    kind: int, rows: int, weight: int, step: int, x: int, width: int, out: int, out_stride: int, out_step: int
) -> None:
    """Two octets for a tile of 1 to 6 rows."""
    if rows == 1:
        octet_tile(kind, 2, 1, weight, step, x, width, out, out_stride, out_step)
    elif rows == 2:
        octet_tile(kind, 2, 2, weight, step, x, width, out, out_stride, out_step)
    elif rows == 3:
        octet_tile(kind, 2, 3, weight, step, x, width, out, out_stride, out_step)
    elif rows == 4:
        octet_tile(kind, 2, 4, weight, step, x, width, out, out_stride, out_step)
    elif rows == 5:
        octet_tile(kind, 2, 5, weight, step, x, width, out, out_stride, out_step)
    else:
        octet_tile(kind, 2, 6, weight, step, x, width, out, out_stride, out_step)


@device
def _single(kind: int, rows: int, weight: int, x: int, width: int, out: int, out_stride: int) -> None:
    """One octet."""
    if rows == 1:
        octet_tile(kind, 1, 1, weight, 0, x, width, out, out_stride, 0)
    elif rows == 2:
        octet_tile(kind, 1, 2, weight, 0, x, width, out, out_stride, 0)
    elif rows == 3:
        octet_tile(kind, 1, 3, weight, 0, x, width, out, out_stride, 0)
    elif rows == 4:
        octet_tile(kind, 1, 4, weight, 0, x, width, out, out_stride, 0)
    elif rows == 5:
        octet_tile(kind, 1, 5, weight, 0, x, width, out, out_stride, 0)
    else:
        octet_tile(kind, 1, 6, weight, 0, x, width, out, out_stride, 0)


@functools.cache
def products_function(kind: int) -> Address:
    """`out[t, n]` for a tile of rows and `count` weights, whole octets of them.

    Arguments: rows, packed, weight, scale and offset (unused), width, count, out, out stride (bytes). Octets are read
    as two streams, four for one row.
    """
    item = ITEMSIZE[kind]

    def octet_products(
        rows: int, packed: int, weight: int, scale: int, offset: int, width: int, count: int, out: int, out_stride: int
    ) -> None:
        octets, bytes_each, done = count // OCTET, width * OCTET * item, 0
        if rows == 1 and octets >= 4:
            part = octets // 4
            for n in range(part):
                w, o = weight + n * bytes_each, out + n * (4 * OCTET)
                octet_tile(kind, 4, 1, w, part * bytes_each, packed, width, o, out_stride, part * (4 * OCTET))
            done = 4 * part
        elif octets >= 2:
            part = octets // 2
            for n in range(part):
                w, o = weight + n * bytes_each, out + n * (4 * OCTET)
                _pair(kind, rows, w, part * bytes_each, packed, width, o, out_stride, part * (4 * OCTET))
            done = 2 * part
        for n in range(done, octets):
            _single(kind, rows, weight + n * bytes_each, packed, width, out + n * (4 * OCTET), out_stride)

    return compile_kernel(octet_products, (types.int64,) * 9)
