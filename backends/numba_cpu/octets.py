"""Products of rows with weights that stand in octets: from one row to a whole prompt.

Owns `octet_tile` and the products made of it. What always holds: each weight has a lane of its own and sums along k in
order, in one float32 accumulator, so no tiling, chunk, thread or number of rows changes a bit; a weight is widened once
for up to `TILE_ROWS` rows. (Octets: `core/layouts.py`. Lanes for weights and rows broadcast from the nearest caches are
the inner kernel of Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008; here weights stand
as its packed panels do, so nothing is packed at run time but the rows.)

A tile of packed rows is float32 [K, rows]. Where the processor multiplies bf16 by pairs, it is bf16 [K / 2, rows, 2]:
a word of an octet is such a pair, so an instruction takes both as they stand. Where its vectors hold two octets, tiles
are of four octets, two to a vector; each weight still has a lane of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.machine import HAS_AVX512, HAS_BF16_PAIRS
from slotwise.backends.numba_cpu.memory import ZERO, device, elements, floats, int32s, int64s, widen
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
"""Elements of a weight that several tiles meet before they go on: the octets of a tile stay in the nearest cache."""

PAIRED, EMULATED = 3, 4
"""Kinds beside those of `vectors.py`: bf16 multiplied by pairs, and that without the instruction for it, for tests."""

_OCTET_BYTES = 4 * OCTET
FLOATS = ir.VectorType(ir.FloatType(), OCTET)
_WORDS = ir.VectorType(ir.IntType(32), OCTET)
_I32 = ir.IntType(32)
_STORED = {PAIRED: BF16, EMULATED: BF16}


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's `bfloat`, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def product_kind(kind: int) -> int:
    """How elements of a kind are multiplied on this machine."""
    return PAIRED if kind == BF16 and HAS_BF16_PAIRS else kind


@functools.cache
def pack_function(kind: int, product: int) -> Address:
    """Packs one tile, its rows side by side, k after k: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def pack_tile(x: int, width: int, first: int, last: int, target: int) -> None:
        high = last - first
        into = floats(target, high * width)
        for t in range(high):
            source = elements(kind, x + (first + t) * width * item, width)
            for k in range(width):
                into[k * high + t] = widen(kind, source[k])

    def pack_pairs(x: int, width: int, first: int, last: int, target: int) -> None:
        high, words = last - first, width // WEIGHT_WORD
        into = int32s(target, high * words)
        for t in range(high):
            source = int32s(x + (first + t) * width * item, words)
            for k in range(words):
                into[k * high + t] = source[k]

    return compile_kernel(pack_pairs if product in _STORED else pack_tile, (types.int64,) * 5)


def _widened(builder: Builder, kind: int, words: Any, lanes: int) -> list[Any]:
    """The two elements of each word, for so many lanes, as two float32 vectors."""
    wide = ir.VectorType(ir.FloatType(), lanes)
    if kind == BF16:
        return [
            builder.bitcast(builder.shl(words, splat(words.type, 16)), wide),
            builder.bitcast(builder.and_(words, splat(words.type, 0xFFFF0000)), wide),
        ]
    stored = ir.HalfType() if kind == F16 else ir.FloatType()
    pairs = builder.bitcast(words, ir.VectorType(stored, 2 * lanes))
    found = []
    for place in range(WEIGHT_WORD):
        chosen = ir.Constant(ir.VectorType(_I32, lanes), list(range(place, 2 * lanes, 2)))
        each = builder.shuffle_vector(pairs, pairs, chosen)
        found.append(builder.fpext(each, wide) if kind == F16 else each)
    return found


def _side_by_side(builder: Builder, kind: ir.Type, addresses: list[Any]) -> Any:
    """The vectors of a `kind` at one or two addresses, as one."""
    parts = [load(builder, kind, address) for address in addresses]
    if len(parts) == 1:
        return parts[0]
    lanes = ir.Constant(ir.VectorType(_I32, 2 * kind.count), list(range(2 * kind.count)))
    return builder.shuffle_vector(*parts, lanes)


def _add_pairs(builder: Builder, product: int, total: Any, weights: Any, row: Any) -> Any:
    """`total` and the products of a pair of bf16 of each lane, the second of each first, as the instruction does it."""
    if product == EMULATED:
        (low, high), (x_low, x_high) = (_widened(builder, BF16, words, total.type.count) for words in (weights, row))
        return fma(builder, low, x_low, fma(builder, high, x_high, total))
    lanes = total.type.count
    pairs = ir.VectorType(_BFloat(), 2 * lanes)
    kind = ir.FunctionType(total.type, [total.type, pairs, pairs])
    name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * lanes}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [total, builder.bitcast(weights, pairs), builder.bitcast(row, pairs)])


@intrinsic
def octet_tile(
    typing: Any, product: Any, wide: Any, octets: Any, rows: Any, weight: Any, step: Any, ahead: Any, x: Any,
    width: Any, out: Any, out_step: Any,
) -> Any:  # fmt: skip
    """Add products of a tile of `rows` packed rows with `octets` octets of weights, `step` bytes apart, to `out`.

    `out[t, n]`, float32: `CHUNK` elements from t to t + 1, `out_step` bytes from one octet to the next. Weights `ahead`
    bytes on are asked for. `wide` (1 or 0): a vector holds two octets, of which there must be an even number then.
    """
    known = literals(product, wide, octets, rows)
    if known is None:
        return None
    how, is_wide, n_octets, n_rows = known
    stored, together = _STORED.get(how, how), 2 if is_wide and n_octets % 2 == 0 else 1

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        weight, step, ahead, x, width, out, out_step = arguments[4:]
        streams = [builder.add(weight, builder.mul(step, int64(c))) for c in range(n_octets)]
        sums_at = places_of_sums(builder, n_rows, n_octets, out, out_step)
        vectors = [sums_at[at : at + together] for at in range(0, len(sums_at), together)]
        with Loop(builder, width, WEIGHT_WORD, [_side_by_side(builder, FLOATS, at) for at in vectors]) as loop:
            sums = list(loop.carried)
            kind, groups = sums[0].type, n_octets // together
            offset = builder.mul(loop.index, int64(OCTET * ITEMSIZE[stored]))
            places = [builder.add(stream, offset) for stream in streams]
            for place in places:
                prefetch(builder, builder.add(place, ahead))
            word = _WORDS if ITEMSIZE[stored] == 2 else ir.VectorType(_I32, 2 * OCTET)
            words = [_side_by_side(builder, word, places[c : c + together]) for c in range(0, n_octets, together)]
            if how in _STORED:
                row_at = builder.add(x, builder.mul(loop.index, int64(2 * n_rows)))
                for t in range(n_rows):
                    row = spread(builder, load(builder, _I32, row_at, 4 * t), ir.VectorType(_I32, kind.count))
                    for c in range(groups):
                        sums[t * groups + c] = _add_pairs(builder, how, sums[t * groups + c], words[c], row)
            else:
                weights = [_widened(builder, stored, each, kind.count) for each in words]
                row_at = builder.add(x, builder.mul(loop.index, int64(4 * n_rows)))
                for k in range(WEIGHT_WORD):
                    for t in range(n_rows):
                        row = spread(builder, load(builder, ir.FloatType(), row_at, 4 * (k * n_rows + t)), kind)
                        for c in range(groups):
                            sums[t * groups + c] = fma(builder, weights[c][k], row, sums[t * groups + c])
            loop.next = sums
        for at, total in zip(vectors, loop.result, strict=True):
            for part, place in enumerate(at):
                lanes = ir.Constant(ir.VectorType(_I32, OCTET), list(range(part * OCTET, part * OCTET + OCTET)))
                store(builder, builder.shuffle_vector(total, total, lanes) if together > 1 else total, place)
        return context.get_dummy_value()

    return types.void(product, wide, octets, rows, *([types.int64] * 7)), generate


def places_of_sums(builder: Builder, n_rows: int, n_octets: int, out: Any, out_step: Any) -> list[Any]:
    """Addresses of a tile's sums, row by row."""
    octets = [builder.add(out, builder.mul(out_step, int64(c))) for c in range(n_octets)]
    return [builder.add(at, int64(4 * CHUNK * t)) for t in range(n_rows) for at in octets]


@device
def _tile(
    product: int, wide: int, octets: int, rows: int, weight: int, step: int, ahead: int, x: int, width: int, out: int,
    out_step: int,
) -> None:  # fmt: skip
    """So many octets for a tile of 1 to 6 rows."""
    if rows == 1:
        octet_tile(product, wide, octets, 1, weight, step, ahead, x, width, out, out_step)
    elif rows == 2:
        octet_tile(product, wide, octets, 2, weight, step, ahead, x, width, out, out_step)
    elif rows == 3:
        octet_tile(product, wide, octets, 3, weight, step, ahead, x, width, out, out_step)
    elif rows == 4:
        octet_tile(product, wide, octets, 4, weight, step, ahead, x, width, out, out_step)
    elif rows == 5:
        octet_tile(product, wide, octets, 5, weight, step, ahead, x, width, out, out_step)
    else:
        octet_tile(product, wide, octets, 6, weight, step, ahead, x, width, out, out_step)


@functools.cache
def products_function(kind: int, product: int, wide: int = int(HAS_AVX512)) -> Address:
    """What `products.products_function` is, for weights in octets, multiplied as `product_kind` says.

    One tile reads them as two long streams, four for one row or where vectors hold two octets. Several tiles meet as
    many octets at a time, `DEPTH` elements of them: all but the first find those in the nearest cache, and ask for the
    next.
    """
    item, x_item, beside = ITEMSIZE[kind], 2 if product in _STORED else 4, 4 if wide else 2

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
                octet_tile(product, wide, 4, 1, w, quarter * each, AHEAD, packed, width, into, quarter * _OCTET_BYTES)
            done = 4 * quarter
        groups = (octets - done) // beside
        apart, depth = groups if alone else 1, width if alone else DEPTH
        singles = octets - done - groups * beside
        for turn in range(groups + singles):
            grouped = turn < groups
            n = done + (turn - groups + groups * beside if not grouped else turn if alone else beside * turn)
            for k in range(0, width, depth):
                some, w = min(depth, width - k), weight + n * each + k * (OCTET * item)
                for tile in range(first, last):
                    low, top = tile_rows(tile, rows)
                    x = packed + low * row_bytes + k * (top - low) * x_item
                    into = out + n * _OCTET_BYTES + (low - start) * (CHUNK * 4)
                    ahead, to_next = AHEAD if tile == first else DEPTH * OCTET * item, apart * _OCTET_BYTES
                    if grouped:
                        _tile(product, wide, beside, top - low, w, apart * each, ahead, x, some, into, to_next)
                    else:
                        _tile(product, wide, 1, top - low, w, apart * each, ahead, x, some, into, to_next)

    return compile_kernel(octet_products, (types.int64,) * 7)


@device
def clear(out: int, rows: int, count: int) -> None:
    """Set sums to 0."""
    for t in range(rows):
        row = floats(out + t * (CHUNK * 4), count)
        for n in range(count):
            row[n] = ZERO
