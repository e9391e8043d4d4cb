"""Products of rows with weights that stand row after row; and how rows are cut into tiles and weights into chunks.

Owns the packing of rows and `products`, which serves weights that do not divide into octets (`octets.py`). What always
holds: rows stand in tiles of up to `TILE_ROWS`, a tile's rows
interleaved block by block, so that one pass over a weight serves them all; a sum's order depends on its row and weight
alone (`vectors.py`), so no tiling, chunk or thread changes a bit.
"""

from __future__ import annotations

import functools

from numba import int64

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.memory import call_5, device, int64s
from slotwise.backends.numba_cpu.threads import FIRST_FIELD, MAX_THREADS, share
from slotwise.backends.numba_cpu.vectors import BLOCK, ITEMSIZE, dot_tile, pack_row
from slotwise.core.layouts import OCTET

_AT = FIRST_FIELD * 8

TILE_ROWS = 6
"""Rows of a full tile: with two weights at a time, twelve sums, which fit sixteen registers with the rest."""

CHUNK = 64
"""Weights that a thread takes at a time, at most: a multiple of the streams that it reads."""

_PAIR = 2 * OCTET

BLOCK_TILES = 8
"""Tiles whose sums are made together: a weight that is in the nearest cache meets them all."""

BLOCK_ROWS = BLOCK_TILES * TILE_ROWS

# Fields of a product's record that the functions below read; those that only the linear kernels know come after.
X, PACKED, WEIGHT, SCALE, OFFSET, STRIDE, SCALE_STRIDE, ROWS, WIDTH, TILES, ROW_BYTES = range(11)
PRODUCT_FIELDS = 11

PRIVATE = 8192
"""Elements of packed rows up to which each thread packs its own copy: cheaper than waiting for each other."""


def tiles(rows: int) -> int:
    """Tiles that `rows` rows are cut into."""
    return -(-rows // TILE_ROWS)


def packed_width(width: int) -> int:
    """Elements of a packed row: whole blocks."""
    return -(-width // BLOCK) * BLOCK


def is_private(rows: int, width: int) -> bool:
    """Whether each thread packs the rows for itself."""
    return rows * packed_width(width) <= PRIVATE


def packed_bytes(rows: int, width: int, row_bytes: int) -> int:
    """Scratch memory for packed rows of `row_bytes` each."""
    return (MAX_THREADS if is_private(rows, width) else 1) * rows * row_bytes


def chunk_of(weights: int) -> int:
    """Weights of one chunk: whole pairs of octets, and several chunks for every thread where there are enough."""
    return max(_PAIR, min(CHUNK, weights // 16) // _PAIR * _PAIR)


@device
def tile_rows(tile: int, rows: int) -> tuple[int, int]:
    """A tile's rows: (first, last + 1). Blocks are full but for the last, whose tiles share its rows evenly."""
    start = tile // BLOCK_TILES * BLOCK_ROWS
    left, place = min(rows - start, BLOCK_ROWS), tile % BLOCK_TILES
    there = (left + TILE_ROWS - 1) // TILE_ROWS
    return start + place * left // there, start + (place + 1) * left // there


@device
def tiles_below(row: int) -> int:
    """Tiles of the rows before `row`, which is where a block ends."""
    return (row + TILE_ROWS - 1) // TILE_ROWS


@functools.cache
def pack_function(kind: int) -> Address:
    """Packs one tile of floats: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def pack_tile(x: int, width: int, first: int, last: int, target: int) -> None:
        rows = last - first
        for t in range(rows):
            source = x + (first + t) * width * item
            pack_row(kind, source, width, target + t * (BLOCK * 4), rows * (BLOCK * 4))

    return compile_kernel(pack_tile, (int64,) * 5)


@functools.cache
def pack_kernel() -> Address:
    """Packs all rows, each thread some of the tiles.

    Fields: x, target, rows, width, tiles, bytes of a packed row, the function that packs a tile.
    """

    def pack_rows(call: int, thread: int, threads: int) -> None:
        field = int64s(call + _AT, 7)
        x, target, rows, width, tiles, row_bytes = field[0], field[1], field[2], field[3], field[4], field[5]
        begin, end = share(tiles, thread, threads)
        for tile in range(begin, end):
            first, last = tile_rows(tile, rows)
            call_5(field[6], (x, width, first, last, target + first * row_bytes))

    return compile_kernel(pack_rows)


@device
def _tile(
    kind: int, rows: int, packed: int, weight: int, stride: int, width: int, out: int, out_stride: int, step: int
) -> None:
    """Two weights, `stride` bytes apart, their results `step` bytes apart."""
    if rows == 1:
        dot_tile(kind, 2, 1, weight, stride, packed, width, out, out_stride, step)
    elif rows == 2:
        dot_tile(kind, 2, 2, weight, stride, packed, width, out, out_stride, step)
    elif rows == 3:
        dot_tile(kind, 2, 3, weight, stride, packed, width, out, out_stride, step)
    elif rows == 4:
        dot_tile(kind, 2, 4, weight, stride, packed, width, out, out_stride, step)
    elif rows == 5:
        dot_tile(kind, 2, 5, weight, stride, packed, width, out, out_stride, step)
    else:
        dot_tile(kind, 2, 6, weight, stride, packed, width, out, out_stride, step)


@device
def _single(kind: int, rows: int, packed: int, weight: int, width: int, out: int, out_stride: int) -> None:
    """One weight."""
    if rows == 1:
        dot_tile(kind, 1, 1, weight, 0, packed, width, out, out_stride, 0)
    elif rows == 2:
        dot_tile(kind, 1, 2, weight, 0, packed, width, out, out_stride, 0)
    elif rows == 3:
        dot_tile(kind, 1, 3, weight, 0, packed, width, out, out_stride, 0)
    elif rows == 4:
        dot_tile(kind, 1, 4, weight, 0, packed, width, out, out_stride, 0)
    elif rows == 5:
        dot_tile(kind, 1, 5, weight, 0, packed, width, out, out_stride, 0)
    else:
        dot_tile(kind, 1, 6, weight, 0, packed, width, out, out_stride, 0)


@device
def _products(
    kind: int, rows: int, packed: int, weight: int, stride: int, width: int, count: int, out: int, out_stride: int
) -> None:
    done = 0
    if rows == 1 and count >= 4:
        part = count // 4
        for n in range(part):
            w, o = weight + n * stride, out + n * 4
            dot_tile(kind, 4, 1, w, part * stride, packed, width, o, out_stride, part * 4)
        done = 4 * part
    elif count >= 2:
        part = count // 2
        for n in range(part):
            w, o = weight + n * stride, out + n * 4
            _tile(kind, rows, packed, w, part * stride, width, o, out_stride, part * 4)
        done = 2 * part
    for n in range(done, count):
        _single(kind, rows, packed, weight + n * stride, width, out + n * 4, out_stride)


@functools.cache
def strided_products_function(kind: int) -> Address:
    """`out[t, n]` for a tile and `count` weights: (rows, packed, weight, stride, width, count, out, out stride).

    The weights are read as two streams (four for one row), each of neighbours: processors fetch ahead along a few long
    streams far better than along many short ones.
    """

    def strided_products(
        rows: int, packed: int, weight: int, stride: int, width: int, count: int, out: int, out_stride: int
    ) -> None:
        _products(kind, rows, packed, weight, stride, width, count, out, out_stride)

    return compile_kernel(strided_products, (int64,) * 8)


@functools.cache
def products_function(kind: int) -> Address:
    """`out[t, n]` [rows, CHUNK], for the rows of a block, `start` to `end` - 1, and `count` weights from `begin` on.

    Arguments: the record's fields, the packed rows, start, end, begin, count, out. `octets.py` and `octets_q.py` have
    functions of the same form for weights in octets.
    """

    def products(at: int, packed: int, start: int, end: int, begin: int, count: int, out: int) -> None:
        field = int64s(at, PRODUCT_FIELDS)
        rows, stride, width = field[ROWS], field[STRIDE], field[WIDTH]
        for tile in range(start // TILE_ROWS, tiles_below(end)):
            low, high = tile_rows(tile, rows)
            rows_at, into = packed + low * field[ROW_BYTES], out + (low - start) * (CHUNK * 4)
            weight = field[WEIGHT] + begin * stride
            _products(kind, high - low, rows_at, weight, stride, width, count, into, CHUNK * 4)

    return compile_kernel(products, (int64,) * 7)
