"""Products of rows with weights that stand in octets: from one row to a whole prompt.

Owns `octet_tile` and the products made of it. What always holds: each weight has a lane of its own and sums along k in
order, in one float32 accumulator, so no tiling, chunk, thread or number of rows changes a bit; a weight is widened once
for up to `TILE_ROWS` rows. (Octets: `core/layouts.py`. Lanes for weights and rows broadcast from the nearest caches are
the inner kernel of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; here weights stand
as its packed panels do, so nothing is packed at run time but the rows.)

A tile of packed rows is float32 [K, rows].
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.memory import ZERO, device, elements, floats, int64s, widen
from slotwise.backends.numba_cpu.products import (
    CHUNK,
    PRODUCT_FIELDS,
    ROW_BYTES,
    ROWS,
    TILE_ROWS,
    WEIGHT,
    WIDTH,
    tile_rows,
    tiles_below,
)
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

DEPTH = 256
"""Elements of a weight that several tiles meet before they go on: two octets of them stay in the nearest cache."""

_OCTET_BYTES = 4 * OCTET
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
    typing: Any, kind: Any, octets: Any, rows: Any, weight: Any, step: Any, ahead: Any, x: Any, width: Any, out: Any,
    out_step: Any,
) -> Any:  # fmt: skip
    """Add products of a tile of `rows` packed rows with `octets` octets of weights, `step` bytes apart, to `out`.

    `out[t, n]`, float32: `CHUNK` elements from t to t + 1, `out_step` bytes from one octet to the next. Weights `ahead`
    bytes on are asked for.
    """
    known = literals(kind, octets, rows)
    if known is None:
        return None
    stored, n_octets, n_rows = known

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        weight, step, ahead, x, width, out, out_step = arguments[3:]
        streams = [builder.add(weight, builder.mul(step, int64(c))) for c in range(n_octets)]
        sums_at = places_of_sums(builder, n_rows, n_octets, out, out_step)
        with Loop(builder, width, WEIGHT_WORD, [load(builder, FLOATS, at) for at in sums_at]) as loop:
            sums = list(loop.carried)
            offset = builder.mul(loop.index, int64(OCTET * ITEMSIZE[stored]))
            places = [builder.add(stream, offset) for stream in streams]
            for place in places:
                prefetch(builder, builder.add(place, ahead))
            weights = [_widened(builder, stored, place) for place in places]
            row_at = builder.add(x, builder.mul(loop.index, int64(4 * n_rows)))
            for k in range(WEIGHT_WORD):
                for t in range(n_rows):
                    row = spread(builder, load(builder, ir.FloatType(), row_at, 4 * (k * n_rows + t)), FLOATS)
                    for c in range(n_octets):
                        at = t * n_octets + c
                        sums[at] = fma(builder, weights[c][k], row, sums[at])
            loop.next = sums
        for at, total in zip(sums_at, loop.result, strict=True):
            store(builder, total, at)
        return context.get_dummy_value()

    return types.void(kind, octets, rows, *([types.int64] * 7)), generate


def places_of_sums(builder: Builder, n_rows: int, n_octets: int, out: Any, out_step: Any) -> list[Any]:
    """Addresses of a tile's sums, row by row."""
    octets = [builder.add(out, builder.mul(out_step, int64(c))) for c in range(n_octets)]
    return [builder.add(at, int64(4 * CHUNK * t)) for t in range(n_rows) for at in octets]


@device
def _tile(
    kind: int, pair: bool, rows: int, weight: int, step: int, ahead: int, x: int, width: int, out: int, out_step: int
) -> None:
    """Two octets, or one, for a tile of 1 to 6 rows."""
    if pair:
        if rows == 1:
            octet_tile(kind, 2, 1, weight, step, ahead, x, width, out, out_step)
        elif rows == 2:
            octet_tile(kind, 2, 2, weight, step, ahead, x, width, out, out_step)
        elif rows == 3:
            octet_tile(kind, 2, 3, weight, step, ahead, x, width, out, out_step)
        elif rows == 4:
            octet_tile(kind, 2, 4, weight, step, ahead, x, width, out, out_step)
        elif rows == 5:
            octet_tile(kind, 2, 5, weight, step, ahead, x, width, out, out_step)
        else:
            octet_tile(kind, 2, 6, weight, step, ahead, x, width, out, out_step)
    elif rows == 1:
        octet_tile(kind, 1, 1, weight, step, ahead, x, width, out, out_step)
    elif rows == 2:
        octet_tile(kind, 1, 2, weight, step, ahead, x, width, out, out_step)
    elif rows == 3:
        octet_tile(kind, 1, 3, weight, step, ahead, x, width, out, out_step)
    elif rows == 4:
        octet_tile(kind, 1, 4, weight, step, ahead, x, width, out, out_step)
    elif rows == 5:
        octet_tile(kind, 1, 5, weight, step, ahead, x, width, out, out_step)
    else:
        octet_tile(kind, 1, 6, weight, step, ahead, x, width, out, out_step)


@functools.cache
def products_function(kind: int) -> Address:
    """What `products.products_function` is, for weights in octets.

    One tile reads them as two long streams, four for one row. Several tiles meet two octets at a time, `DEPTH` elements
    of them: all but the first find those in the nearest cache, and ask for the next.
    """
    item = ITEMSIZE[kind]

    def octet_products(at: int, packed: int, start: int, end: int, begin: int, count: int, out: int) -> None:
        field = int64s(at, PRODUCT_FIELDS)
        rows, width, row_bytes = field[ROWS], field[WIDTH], field[ROW_BYTES]
        first, last = start // TILE_ROWS, tiles_below(end)
        clear(out, end - start, count)
        weight, each, octets = field[WEIGHT] + begin * width * item, width * OCTET * item, count // OCTET
        done, alone = 0, last - first == 1
        if rows == 1:
            quarter = octets // 4
            for n in range(quarter):
                w, into = weight + n * each, out + n * _OCTET_BYTES
                octet_tile(kind, 4, 1, w, quarter * each, AHEAD, packed, width, into, quarter * _OCTET_BYTES)
            done = 4 * quarter
        pairs = (octets - done) // 2
        apart, depth = pairs if alone else 1, width if alone else DEPTH
        for turn in range(octets - done - pairs):
            pair = turn < pairs
            n = done + (turn + pairs if not pair else turn if alone else 2 * turn)
            for k in range(0, width, depth):
                some, w = min(depth, width - k), weight + n * each + k * (OCTET * item)
                for tile in range(first, last):
                    low, top = tile_rows(tile, rows)
                    x = packed + low * row_bytes + k * (top - low) * 4
                    into = out + n * _OCTET_BYTES + (low - start) * (CHUNK * 4)
                    ahead = AHEAD if tile == first else DEPTH * OCTET * item
                    _tile(kind, pair, top - low, w, apart * each, ahead, x, some, into, apart * _OCTET_BYTES)

    return compile_kernel(octet_products, (types.int64,) * 7)


@device
def clear(out: int, rows: int, count: int) -> None:
    """Set sums to 0."""
    for t in range(rows):
        row = floats(out + t * (CHUNK * 4), count)
        for n in range(count):
            row[n] = ZERO
