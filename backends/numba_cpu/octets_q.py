"""Products of rows with quantised weights that stand in octets, in whole numbers by group.

Owns the quantisation of activations, `quantised_tile` and `quantised_products`. What always holds: a row's activations
are int8 by group of 32, with one float32 scale a group; a group's product is an exact integer, whichever instructions
make it; each weight has a lane of its own, which adds its groups in order, so no tiling, chunk, thread or number of
rows changes a bit. (Integer products by group: Dettmers et al., "LLM.int8()", 2022; llama.cpp's formats have the same
groups.)

A tile of packed rows has for each group: codes int8 [rows, 32], their scales and their sums, float32 [rows] each.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import int64 as int64_type
from numba import types
from numba.core import cgutils

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.machine import HAS_AVX2, HAS_VNNI
from slotwise.backends.numba_cpu.memory import (
    ZERO,
    device,
    elements,
    float_bits,
    float_of_bits,
    floats,
    int64s,
    signed_bytes,
    widen,
)
from slotwise.backends.numba_cpu.octets import DEPTH, FLOATS, clear, places_of_sums
from slotwise.backends.numba_cpu.products import (
    CHUNK,
    OFFSET,
    PRODUCT_FIELDS,
    ROW_BYTES,
    ROWS,
    SCALE,
    SCALE_STRIDE,
    STRIDE,
    TILE_ROWS,
    WEIGHT,
    WIDTH,
    tile_rows,
    tiles_below,
)
from slotwise.backends.numba_cpu.vectors import (
    AHEAD,
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
from slotwise.core.layouts import OCTET
from slotwise.core.ops.linear_q import GROUP

INT8, INT4, INT4_OFFSET = 1, 2, 3
"""Forms of a quantised weight; 0 is a weight that is not quantised."""

PAIR_ROWS = 4
"""Rows of a tile that two octets can serve: the sums of more would not fit the registers."""

GROUP_BYTES = GROUP + 8
"""Bytes of a packed row's group: codes, a scale and a sum."""

_BYTES = ir.VectorType(ir.IntType(8), 4 * OCTET)
_PAIRS = ir.VectorType(ir.IntType(16), 2 * OCTET)
_SUMS = ir.VectorType(ir.IntType(32), OCTET)
_HALVES = ir.VectorType(ir.HalfType(), OCTET)
_FLOAT = ir.FloatType()
_I32 = ir.IntType(32)
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_MOST = np.float32(127.0)


def row_bytes(width: int) -> int:
    """Bytes of one packed row."""
    return width // GROUP * GROUP_BYTES


def code_bytes(form: int, width: int) -> int:
    """Bytes of one weight's codes."""
    return width if form == INT8 else width // 2


@functools.cache
def quantise_function(kind: int) -> Address:
    """Packs one tile as codes: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def quantise_tile(x: int, width: int, first: int, last: int, target: int) -> None:
        rows = last - first
        for t in range(rows):
            source = elements(kind, x + (first + t) * width * item, width)
            for g in range(width // GROUP):
                at = target + g * rows * GROUP_BYTES
                greatest = np.int32(0)
                for i in range(g * GROUP, g * GROUP + GROUP):
                    greatest = max(greatest, float_bits(widen(kind, source[i])) & np.int32(0x7FFFFFFF))
                most = float_of_bits(greatest)
                inverse = _MOST / most if most > ZERO else ZERO
                codes = signed_bytes(at + t * GROUP, GROUP)
                total = np.int32(0)
                for i in range(GROUP):
                    code = np.int8(float_bits(widen(kind, source[g * GROUP + i]) * inverse + _ROUNDER))
                    codes[i] = code
                    total += np.int32(code)
                scales = floats(at + rows * GROUP, 2 * rows)
                scales[t] = most / _MOST
                scales[rows + t] = np.float32(total)

    return compile_kernel(quantise_tile, (int64_type,) * 5)


def _call(builder: Builder, name: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(arguments))


class Products:
    """Sums, by lane, of products of four unsigned with four signed bytes; exact for a group of codes.

    One of three ways to make them: AVX-512's or AVX-VNNI's instruction, AVX2's pairs in 16 bits, or plain arithmetic.
    `narrow` says that unsigned bytes are below 16, so that the pairs of a whole group fit 16 bits.
    """

    def __init__(self, builder: Builder, *, narrow: bool, avx2: bool = HAS_AVX2, vnni: bool = HAS_VNNI) -> None:
        self._builder, self._vnni, self._avx2 = builder, vnni, avx2 and not vnni
        self._in_pairs = narrow and self._avx2

    def zero(self) -> Any:
        """An empty sum."""
        return ir.Constant(_PAIRS if self._in_pairs else _SUMS, None)

    def add(self, total: Any, unsigned: Any, signed: Any) -> Any:
        """`total` and the products of a word of each lane."""
        b = self._builder
        if self._vnni:
            parts = [b.bitcast(value, _SUMS) for value in (unsigned, signed)]
            return _call(b, "llvm.x86.avx512.vpdpbusd.256", _SUMS, total, *parts)
        if self._avx2:
            pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", _PAIRS, unsigned, signed)
            return b.add(total, pairs if self._in_pairs else self._sum_pairs(pairs))
        wide = ir.VectorType(_I32, 4 * OCTET)
        product = b.mul(b.zext(unsigned, wide), b.sext(signed, wide))
        for _ in range(2):
            half = product.type.count // 2
            even = ir.Constant(ir.VectorType(_I32, half), list(range(0, 2 * half, 2)))
            odd = ir.Constant(ir.VectorType(_I32, half), list(range(1, 2 * half, 2)))
            product = b.add(b.shuffle_vector(product, product, even), b.shuffle_vector(product, product, odd))
        return b.add(total, product)

    def add_signed(self, total: Any, weight: Any, x: Any) -> Any:
        """The same for signed weights, -127 to 127: their signs move over to `x`."""
        b = self._builder
        negative = b.icmp_signed("<", weight, ir.Constant(_BYTES, None))
        magnitude = b.select(negative, b.neg(weight), weight)
        if self._avx2 or self._vnni:
            return self.add(total, magnitude, _call(b, "llvm.x86.avx2.psign.b", _BYTES, x, weight))
        return self.add(total, magnitude, b.select(negative, b.neg(x), x))

    def whole(self, total: Any) -> Any:
        """The sums as eight int32."""
        return self._sum_pairs(total) if self._in_pairs else total

    def _sum_pairs(self, pairs: Any) -> Any:
        return _call(self._builder, "llvm.x86.avx2.pmadd.wd", _SUMS, pairs, splat(_PAIRS, 1))


def _codes(builder: Builder, form: int, address: Any) -> list[list[Any]]:
    """The words of a group of an octet: (number of the word, codes), together those that share bytes."""
    if form == INT8:
        return [[(j, load(builder, _BYTES, address, 32 * j))] for j in range(8)]
    found = []
    for j in range(4):
        both = load(builder, _PAIRS, address, 32 * j)
        low = builder.and_(both, splat(_PAIRS, 0x0F0F))
        high = builder.and_(builder.lshr(both, splat(_PAIRS, 4)), splat(_PAIRS, 0x0F0F))
        found.append([(j, builder.bitcast(low, _BYTES)), (j + 4, builder.bitcast(high, _BYTES))])
    return found


@intrinsic
def quantised_tile(
    typing: Any, form: Any, octets: Any, rows: Any, codes: Any, scale: Any, offset: Any, step: Any, x: Any,
    groups: Any, out: Any, out_step: Any,
) -> Any:  # fmt: skip
    """Add products of a tile of `rows` packed rows with `octets` octets of weights to `out`.

    `step` groups lie between one octet and the next. `out[t, n]`, float32: `CHUNK` elements from t to t + 1, `out_step`
    bytes from one octet to the next.
    """
    known = literals(form, octets, rows)
    if known is None:
        return None
    stored, n_octets, n_rows = known
    group_bytes = OCTET * code_bytes(stored, GROUP)

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        codes, scale, offset, step, x, groups, out, out_step = arguments[3:]

        def streams(start: Any, bytes_each: int) -> list[Any]:
            return [builder.add(start, builder.mul(step, int64(bytes_each * c))) for c in range(n_octets)]

        code_streams, scale_streams = streams(codes, group_bytes), streams(scale, 2 * OCTET)
        offset_streams = streams(offset, 2 * OCTET) if stored == INT4_OFFSET else []
        products = Products(builder, narrow=stored != INT8)
        add = products.add_signed if stored == INT8 else products.add
        sums_at = places_of_sums(builder, n_rows, n_octets, out, out_step)
        with Loop(builder, groups, 1, [load(builder, FLOATS, at) for at in sums_at]) as loop:
            row_at = builder.add(x, builder.mul(loop.index, int64(n_rows * GROUP_BYTES)))
            code_at = [builder.add(s, builder.mul(loop.index, int64(group_bytes))) for s in code_streams]
            for place in code_at:
                for line in range(0, group_bytes, 64):
                    prefetch(builder, builder.add(place, int64(AHEAD + line)))

            def factors(sources: list[Any]) -> list[Any]:
                at = builder.mul(loop.index, int64(2 * OCTET))
                return [builder.fpext(load(builder, _HALVES, builder.add(s, at)), FLOATS) for s in sources]

            def number(row: int, t: int) -> Any:
                at = n_rows * GROUP + 4 * (row * n_rows + t)
                return spread(builder, load(builder, _FLOAT, row_at, at), FLOATS)

            totals = [products.zero()] * (n_rows * n_octets)
            for words in zip(*(_codes(builder, stored, place) for place in code_at), strict=True):
                for place in range(len(words[0])):
                    j = words[0][place][0]
                    for t in range(n_rows):
                        word = load(builder, _I32, row_at, GROUP * t + 4 * j)
                        row = builder.bitcast(spread(builder, word, _SUMS), _BYTES)
                        for c in range(n_octets):
                            at = t * n_octets + c
                            totals[at] = add(totals[at], words[c][place][1], row)
            scales, offsets = factors(scale_streams), factors(offset_streams)
            sums = list(loop.carried)
            for t in range(n_rows):
                of_row, of_codes = number(0, t), number(1, t)
                for c in range(n_octets):
                    at = t * n_octets + c
                    whole = builder.sitofp(products.whole(totals[at]), FLOATS)
                    if stored == INT4:  # codes stand for -8 to 7
                        whole = fma(builder, of_codes, splat(FLOATS, -8.0), whole)
                    sums[at] = fma(builder, whole, builder.fmul(scales[c], of_row), sums[at])
                    if stored == INT4_OFFSET:
                        sums[at] = fma(builder, offsets[c], builder.fmul(of_row, of_codes), sums[at])
            loop.next = sums
        for at, total in zip(sums_at, loop.result, strict=True):
            store(builder, total, at)
        return context.get_dummy_value()

    return types.void(form, octets, rows, *([types.int64] * 8)), generate


@device
def _tile(
    form: int, pair: bool, rows: int, codes: int, scale: int, offset: int, step: int, x: int, groups: int, out: int,
    out_step: int,
) -> None:  # fmt: skip
    """Two octets for a tile of up to `PAIR_ROWS` rows, or one for up to 6."""
    if pair:
        if rows == 1:
            quantised_tile(form, 2, 1, codes, scale, offset, step, x, groups, out, out_step)
        elif rows == 2:
            quantised_tile(form, 2, 2, codes, scale, offset, step, x, groups, out, out_step)
        elif rows == 3:
            quantised_tile(form, 2, 3, codes, scale, offset, step, x, groups, out, out_step)
        else:
            quantised_tile(form, 2, 4, codes, scale, offset, step, x, groups, out, out_step)
    elif rows == 1:
        quantised_tile(form, 1, 1, codes, scale, offset, step, x, groups, out, out_step)
    elif rows == 2:
        quantised_tile(form, 1, 2, codes, scale, offset, step, x, groups, out, out_step)
    elif rows == 3:
        quantised_tile(form, 1, 3, codes, scale, offset, step, x, groups, out, out_step)
    elif rows == 4:
        quantised_tile(form, 1, 4, codes, scale, offset, step, x, groups, out, out_step)
    elif rows == 5:
        quantised_tile(form, 1, 5, codes, scale, offset, step, x, groups, out, out_step)
    else:
        quantised_tile(form, 1, 6, codes, scale, offset, step, x, groups, out, out_step)


@functools.cache
def products_function(form: int) -> Address:
    """What `products.products_function` is, for quantised weights in octets."""
    code_step, scale_step, out_step = code_bytes(form, OCTET), 2 * OCTET, 4 * OCTET

    def quantised_products(at: int, packed: int, start: int, end: int, begin: int, count: int, out: int) -> None:
        field = int64s(at, PRODUCT_FIELDS)
        rows, width, row_bytes = field[ROWS], field[WIDTH], field[ROW_BYTES]
        first, last = start // TILE_ROWS, tiles_below(end)
        clear(out, end - start, count)
        groups, octets = width // GROUP, count // OCTET
        codes = field[WEIGHT] + begin * field[STRIDE]
        scale, offset = field[SCALE] + begin * field[SCALE_STRIDE], field[OFFSET] + begin * field[SCALE_STRIDE]
        # One tile reads weights as long streams; several meet them some groups at a time, in the nearest cache.
        alone = last - first == 1
        pairs = octets // 2 if end - start <= PAIR_ROWS * (last - first) else 0
        apart, depth = pairs if alone else 1, groups if alone else DEPTH // GROUP
        for turn in range(octets - pairs):
            pair = turn < pairs
            place = turn + pairs if not pair else turn if alone else 2 * turn
            for g in range(0, groups, depth):
                some, k = min(depth, groups - g), place * groups + g
                c, s, o = codes + k * GROUP * code_step, scale + k * scale_step, offset + k * scale_step
                for tile in range(first, last):
                    low, top = tile_rows(tile, rows)
                    x = packed + low * row_bytes + g * (top - low) * GROUP_BYTES
                    into = out + place * out_step + (low - start) * (CHUNK * 4)
                    _tile(form, pair, top - low, c, s, o, apart * groups, x, some, into, apart * out_step)

    return compile_kernel(quantised_products, (int64_type,) * 7)
