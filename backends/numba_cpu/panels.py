"""Products of many rows with weights: the prefill side.

Owns the packing of weights into panels and their products. What always holds: a sum runs over k in order, in one
float32 accumulator, so it is not the decode side's sum bit for bit, and kernels made of it promise no row invariance;
weights are widened once for all rows of a call. (Goto and van de Geijn, "Anatomy of high-performance matrix
multiplication", 2008, gives the blocking: a panel stays in the nearest cache, rows stream past it.)
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.memory import ZERO, device, elements, floats, widen
from slotwise.backends.numba_cpu.products import CHUNK, TILE_ROWS, tile_rows
from slotwise.backends.numba_cpu.products_q import INT8, widen_quantised
from slotwise.backends.numba_cpu.threads import MAX_THREADS
from slotwise.backends.numba_cpu.vectors import ITEMSIZE, LANES, Builder, Loop, fma, int64, literals, load, store
from slotwise.core.ops.linear_q import GROUP

PANEL = 2 * LANES
"""Weights of a panel: two vectors of sums for each row."""

DEPTH = 256
"""Elements of a weight that a panel holds: with `PANEL`, half of the nearest cache."""

COLUMNS = CHUNK
"""Weights that a thread takes at a time, at most: a multiple of `PANEL`."""

PANEL_BYTES = PANEL * DEPTH * 4
_VF = ir.VectorType(ir.FloatType(), LANES)
_V8 = ir.VectorType(ir.FloatType(), 8)
_I32 = ir.IntType(32)


def packed_bytes(rows: int, width: int) -> int:
    """Scratch memory of a call: the rows in float32, and for each thread a panel, its weights, and sums of a chunk."""
    return rows * width * 4 + MAX_THREADS * own_bytes(rows)


def own_bytes(rows: int) -> int:
    """One thread's part of that memory: two chunks of sums, a panel and what it is made from."""
    return 2 * (rows * COLUMNS * 4) + 2 * PANEL_BYTES


@functools.cache
def pack_function(kind: int) -> Address:
    """Packs one tile, its rows side by side, k after k: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def pack_tile_for_panels(x: int, width: int, first: int, last: int, target: int) -> None:
        high = last - first
        into = floats(target, high * width)
        for t in range(high):
            source = elements(kind, x + (first + t) * width * item, width)
            for k in range(width):
                into[k * high + t] = widen(kind, source[k])

    return compile_kernel(pack_tile_for_panels, (types.int64,) * 5)


def _transposed(builder: Builder, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight, rows for columns: three rounds of pairwise interleaving."""
    for distance in (4, 2, 1):
        found: list[Any] = [None] * 8
        for i in range(8):
            if i & distance:
                continue
            a, b = rows[i], rows[i + distance]
            first = [_swap(lane, distance, 0) for lane in range(8)]
            second = [_swap(lane, distance, distance) for lane in range(8)]
            found[i] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), first))
            found[i + distance] = builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), second))
        rows = found
    return rows


def _swap(lane: int, distance: int, offset: int) -> int:
    """Where lane `lane` of a half-transposed row comes from: 0 to 7 are the first vector's lanes, 8 to 15 the second's."""
    base = (lane & ~distance) + offset
    return base + 8 if lane & distance else base


@intrinsic
def _transpose(typing: Any, source: Any, stride: Any, target: Any, target_stride: Any) -> Any:
    """Eight by eight float32 numbers, rows for columns; strides are in bytes."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        source, stride, target, target_stride = arguments
        rows = [load(builder, _V8, builder.add(source, builder.mul(stride, int64(i)))) for i in range(8)]
        for i, row in enumerate(_transposed(builder, rows)):
            store(builder, row, builder.add(target, builder.mul(target_stride, int64(i))))
        return context.get_dummy_value()

    return types.void(*([types.int64] * 4)), generate


@intrinsic(prefer_literal=True)
def _multiply_panel(typing: Any, rows: Any, x: Any, panel: Any, depth: Any, sums: Any, stride: Any) -> Any:
    """`sums[t, n] += x[k, t] * panel[k, n]` for k below `depth`, in order; `sums` rows are `stride` bytes apart."""
    known = literals(rows)
    if known is None:
        return None
    (n_rows,) = known

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        _, x, panel, depth, sums, stride = arguments
        targets = [builder.add(sums, builder.mul(stride, int64(t))) for t in range(n_rows)]
        first = [load(builder, _VF, target, 4 * LANES * half) for target in targets for half in range(2)]
        zeros = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        with Loop(builder, depth, 1, first) as loop:
            at = builder.add(panel, builder.mul(loop.index, int64(PANEL * 4)))
            weights = [load(builder, _VF, at, 4 * LANES * half) for half in range(2)]
            row_at = builder.add(x, builder.mul(loop.index, int64(n_rows * 4)))
            for t in range(n_rows):
                scalar = load(builder, ir.FloatType(), row_at, 4 * t)
                vector = builder.insert_element(ir.Constant(_VF, ir.Undefined), scalar, ir.Constant(_I32, 0))
                spread = builder.shuffle_vector(vector, vector, zeros)
                for half in range(2):
                    loop.next.append(fma(builder, weights[half], spread, loop.carried[2 * t + half]))
        for t, target in enumerate(targets):
            for half in range(2):
                store(builder, loop.result[2 * t + half], target, 4 * LANES * half)
        return context.get_dummy_value()

    return types.void(rows, *([types.int64] * 5)), generate


@device
def widen_weights(kind: int, weight: int, stride: int, first: int, depth: int, count: int, target: int) -> None:
    """Elements `first` on of `count` weights, as float32 rows of `DEPTH`."""
    item = 4 if kind == 0 else 2
    for n in range(count):
        source = elements(kind, weight + n * stride + first * item, depth)
        into = floats(target + n * (DEPTH * 4), depth)
        for k in range(depth):
            into[k] = widen(kind, source[k])


@device
def make_panel(wide: int, depth: int, count: int, panel: int) -> None:
    """A panel [depth, PANEL] from `count` float32 rows of `DEPTH`; weights that are not there count as 0."""
    whole = depth // 8 * 8
    into = floats(panel, depth * PANEL)
    for n in range(0, PANEL, 8):
        if n + 8 <= count:
            for k in range(0, whole, 8):
                _transpose(wide + n * (DEPTH * 4) + k * 4, DEPTH * 4, panel + (k * PANEL + n) * 4, PANEL * 4)
            for k in range(whole, depth):
                for i in range(n, n + 8):
                    into[k * PANEL + i] = floats(wide + i * (DEPTH * 4), depth)[k]
        else:
            for i in range(n, n + 8):
                for k in range(depth):
                    into[k * PANEL + i] = floats(wide + i * (DEPTH * 4), depth)[k] if i < count else ZERO


@device
def add_panel(rows: int, n_tiles: int, packed: int, width: int, first: int, depth: int, panel: int, sums: int) -> None:
    """Add the products of all rows with a panel of elements `first` on to `sums` [rows, COLUMNS]."""
    for tile in range(n_tiles):
        begin, end = tile_rows(tile, n_tiles, rows)
        high = end - begin
        x, into = packed + (begin * width + first * high) * 4, sums + begin * (COLUMNS * 4)
        if high == 6:
            _multiply_panel(6, x, panel, depth, into, COLUMNS * 4)
        elif high == 5:
            _multiply_panel(5, x, panel, depth, into, COLUMNS * 4)
        elif high == 4:
            _multiply_panel(4, x, panel, depth, into, COLUMNS * 4)
        elif high == 3:
            _multiply_panel(3, x, panel, depth, into, COLUMNS * 4)
        elif high == 2:
            _multiply_panel(2, x, panel, depth, into, COLUMNS * 4)
        else:
            _multiply_panel(1, x, panel, depth, into, COLUMNS * 4)


@functools.cache
def panels_function(kind: int, form: int) -> Address:
    """`sums[t, n]` [rows, COLUMNS] for all rows and `count` weights, at most COLUMNS.

    Arguments: rows, packed rows, weight, scale, offset, width, count, sums, this thread's scratch memory. `form` 0 is a
    weight of `kind`; else the weight is codes, to which scale and offset belong.
    """

    def panel_products(
        rows: int, packed: int, weight: int, scale: int, offset: int, width: int, count: int, sums: int, scratch: int
    ) -> None:
        n_tiles = (rows + TILE_ROWS - 1) // TILE_ROWS
        stride = width * (4 if kind == 0 else 2)
        if form != 0:
            stride = width if form == INT8 else width // 2
        scale_stride = width // GROUP * 2
        total = floats(sums, rows * COLUMNS)
        for i in range(rows * COLUMNS):
            total[i] = ZERO
        for first in range(0, width, DEPTH):
            depth = min(DEPTH, width - first)
            for n in range(0, count, PANEL):
                some = min(PANEL, count - n)
                if form == 0:
                    widen_weights(kind, weight + n * stride, stride, first, depth, some, scratch + PANEL_BYTES)
                else:
                    s, o = scale + n * scale_stride, offset + n * scale_stride
                    widen_quantised(
                        form, weight + n * stride, s, o, width, first, depth, some, DEPTH, scratch + PANEL_BYTES
                    )
                make_panel(scratch + PANEL_BYTES, depth, some, scratch)
                add_panel(rows, n_tiles, packed, width, first, depth, scratch, sums + n * 4)

    return compile_kernel(panel_products, (types.int64,) * 9)


def chunk_of(weights: int) -> int:
    """Weights of one chunk: whole panels, and several chunks for every thread where that can be."""
    return max(PANEL, min(COLUMNS, weights // 16 // PANEL * PANEL))
