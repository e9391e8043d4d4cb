"""Products of a few rows with quantised weights, in whole numbers by group.

Owns the quantisation of activations, `quantised_tile` and `quantised_products`. What always holds: a row's activations
are int8 by group of 32, with one float32 scale a group; a group's product is an exact integer, whichever instructions
make it; groups are added in order in eight lanes, so no tiling, chunk or thread changes a bit. (Integer products by
group: Dettmers et al., "LLM.int8()", 2022; llama.cpp's formats have the same groups.)

A tile of packed rows is codes [G, rows, 32], then float32 scales [rows, H] and float32 sums [rows, H] (scale times the
sum of the codes), with H the groups in whole octets, and at least one more; what is beyond G is
0, so that the last octet can be read whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
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
    signed_bytes,
    widen,
)
from slotwise.backends.numba_cpu.products import PRIVATE
from slotwise.backends.numba_cpu.threads import MAX_THREADS
from slotwise.backends.numba_cpu.vectors import (
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
    store,
    sum_lanes,
)
from slotwise.core.ops.linear_q import GROUP

INT8, INT4, INT4_OFFSET = 1, 2, 3
"""Forms of a quantised weight; 0 is a weight that is not quantised."""

OCTET = 8
"""Groups whose scales are read at once."""

AHEAD = 1024
"""Bytes by which codes are asked for before they are used; scales, an eighth of their bytes or less, by a quarter."""

_CODES = ir.VectorType(ir.IntType(8), GROUP)
_PACKED = ir.VectorType(ir.IntType(8), GROUP // 2)
_WORDS = ir.VectorType(ir.IntType(16), GROUP // 2)
_INTEGERS = ir.VectorType(ir.IntType(32), 8)
_F8 = ir.VectorType(ir.FloatType(), 8)
_H8 = ir.VectorType(ir.HalfType(), 8)
_FLOAT = ir.FloatType()
_I32 = ir.IntType(32)
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_MOST = np.float32(127.0)


def octets(width: int) -> int:
    """Groups of a packed row: whole octets, the last of which has at least one group that is not there."""
    return (width // (GROUP * OCTET) + 1) * OCTET


def row_bytes(width: int) -> int:
    """Bytes of one packed row."""
    return width + 8 * octets(width)


def is_private(rows: int, width: int) -> bool:
    """Whether each thread packs the rows for itself."""
    return rows * width <= PRIVATE


def packed_bytes(rows: int, width: int) -> int:
    """Scratch memory for packed rows."""
    return (MAX_THREADS if is_private(rows, width) else 1) * rows * row_bytes(width)


def code_bytes(form: int, width: int) -> int:
    """Bytes of one weight's codes."""
    return width if form == INT8 else width // 2


@functools.cache
def quantise_function(kind: int) -> Address:
    """Packs one tile as codes: (x, width, first row, last + 1, target)."""
    item = ITEMSIZE[kind]

    def quantise_tile(x: int, width: int, first: int, last: int, target: int) -> None:
        rows, groups = last - first, width // GROUP
        high = (groups // OCTET + 1) * OCTET
        for t in range(rows):
            source = elements(kind, x + (first + t) * width * item, width)
            scales = floats(target + rows * width + t * high * 4, high)
            sums = floats(target + rows * width + (rows + t) * high * 4, high)
            for g in range(groups):
                greatest = np.int32(0)
                for i in range(g * GROUP, g * GROUP + GROUP):
                    greatest = max(greatest, float_bits(widen(kind, source[i])) & np.int32(0x7FFFFFFF))
                most = float_of_bits(greatest)
                inverse = _MOST / most if most > ZERO else ZERO
                codes = signed_bytes(target + (g * rows + t) * GROUP, GROUP)
                total = np.int32(0)
                for i in range(GROUP):
                    code = np.int8(float_bits(widen(kind, source[g * GROUP + i]) * inverse + _ROUNDER))
                    codes[i] = code
                    total += np.int32(code)
                scales[g] = most / _MOST
                sums[g] = scales[g] * np.float32(total)
            for g in range(groups, high):
                scales[g], sums[g] = ZERO, ZERO

    return compile_kernel(quantise_tile, (int64_type,) * 5)


def _call(builder: Builder, name: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(arguments))


def sum_of_fours(builder: Builder, unsigned: Any, signed: Any, *, portable: bool = not HAS_AVX2) -> Any:
    """Eight int32: the sums of four neighbouring products of 32 unsigned and 32 signed bytes; exact for codes.

    Products of two neighbours must fit 16 bits, as those of codes up to 127 do.
    """
    if portable:
        wide = ir.VectorType(_I32, GROUP)
        product = builder.mul(builder.zext(unsigned, wide), builder.sext(signed, wide))
        for _ in range(2):
            half = product.type.count // 2
            even = ir.Constant(ir.VectorType(_I32, half), list(range(0, 2 * half, 2)))
            odd = ir.Constant(ir.VectorType(_I32, half), list(range(1, 2 * half, 2)))
            product = builder.add(
                builder.shuffle_vector(product, product, even), builder.shuffle_vector(product, product, odd)
            )
        return product
    if HAS_VNNI:
        zero = ir.Constant(_INTEGERS, None)
        parts = [builder.bitcast(value, _INTEGERS) for value in (unsigned, signed)]
        return _call(builder, "llvm.x86.avx512.vpdpbusd.256", _INTEGERS, zero, *parts)
    pairs = _call(builder, "llvm.x86.avx2.pmadd.ub.sw", _WORDS, unsigned, signed)
    return _call(builder, "llvm.x86.avx2.pmadd.wd", _INTEGERS, pairs, splat(_WORDS, 1))


def product_of_codes(builder: Builder, weight: Any, x: Any, *, portable: bool = not HAS_AVX2) -> Any:
    """`sum_of_fours` of two vectors of signed codes: the weight's signs move over to the activations."""
    negative = builder.icmp_signed("<", weight, ir.Constant(_CODES, [0] * GROUP))
    magnitude = builder.select(negative, builder.neg(weight), weight)
    if HAS_AVX2 and not portable:
        moved = _call(builder, "llvm.x86.avx2.psign.b", _CODES, x, weight)
    else:
        moved = builder.select(negative, builder.neg(x), x)
    return sum_of_fours(builder, magnitude, moved, portable=portable)


def _codes_of_group(builder: Builder, form: int, address: Any) -> Any:
    """The 32 codes of a group: signed for int8, 0 to 15 for int4."""
    if form == INT8:
        return load(builder, _CODES, address)
    both = load(builder, _PACKED, address)
    low = builder.and_(both, ir.Constant(_PACKED, [15] * (GROUP // 2)))
    high = builder.lshr(both, ir.Constant(_PACKED, [4] * (GROUP // 2)))
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, GROUP), list(range(GROUP))))


@intrinsic
def quantised_tile(
    typing: Any,
    form: Any,
    columns: Any,
    rows: Any,
    codes: Any,
    scale: Any,
    offset: Any,
    step: Any,
    x: Any,
    groups: Any,
    out: Any,
    out_stride: Any,
) -> Any:
    """Products of a tile of `rows` packed rows at `x` with `columns` weights, `step` rows of codes and scales apart.

    `out[t, n]`, float32, `out_stride` bytes from t to t + 1 and 4 `step` bytes from n to n + 1.
    """
    known = literals(form, columns, rows)
    if known is None:
        return None
    stored, n_columns, n_rows = known
    group_bytes = GROUP if stored == INT8 else GROUP // 2
    # Groups whose products of scales are made ahead, and groups a turn: what was fastest for few rows and for many.
    batch_size, unrolled = (64, 2) if n_rows <= 2 else (OCTET, OCTET)

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        codes, scale, offset, step, x, groups, out, out_stride = arguments[3:]
        code_step = builder.mul(step, builder.mul(groups, int64(group_bytes)))
        scale_step = builder.mul(step, builder.mul(groups, int64(2)))
        weights = [builder.add(codes, builder.mul(code_step, int64(n))) for n in range(n_columns)]
        factors = [builder.add(scale, builder.mul(scale_step, int64(n))) for n in range(n_columns)]
        shifts = [builder.add(offset, builder.mul(scale_step, int64(n))) for n in range(n_columns)]
        high = builder.add(builder.and_(groups, int64(-OCTET)), int64(OCTET))
        scales_at = builder.add(x, builder.mul(groups, int64(n_rows * GROUP)))
        sums_at = builder.add(scales_at, builder.mul(high, int64(n_rows * 4)))
        products = cgutils.alloca_once(builder, ir.ArrayType(_F8, n_rows * n_columns * batch_size // OCTET))
        products.align = 32
        products_at = builder.ptrtoint(products, ir.IntType(64))

        def octet(first: Any, factors: list[Any], place: Any) -> None:
            """Products of weights' and activations' scales for eight groups, onto the stack from `place` on."""
            wide = [builder.fpext(load(builder, _H8, factor), _F8) for factor in factors]
            for t in range(n_rows):
                at = builder.add(scales_at, builder.mul(builder.add(builder.mul(high, int64(t)), first), int64(4)))
                activation = load(builder, _F8, at)
                for n in range(n_columns):
                    product = builder.fmul(wide[n], activation)
                    into = builder.add(products_at, builder.mul(place, int64(4)))
                    store(builder, product, into, 4 * batch_size * (t * n_columns + n))

        def add_group(sums: list[Any], group: Any, scale_of: Callable[[int, int], Any]) -> list[Any]:
            """Add the products of one group; `scale_of(t, n)` is the product of its scales."""
            found = list(sums)
            row_at = builder.add(x, builder.mul(group, int64(n_rows * GROUP)))
            rows = [load(builder, _CODES, row_at, GROUP * t) for t in range(n_rows)]
            zeros = ir.Constant(_INTEGERS, [0] * 8)
            for n in range(n_columns):
                weight = _codes_of_group(
                    builder, stored, builder.add(weights[n], builder.mul(group, int64(group_bytes)))
                )
                for t in range(n_rows):
                    product = product_of_codes if stored == INT8 else sum_of_fours
                    whole = builder.sitofp(product(builder, weight, rows[t]), _F8)
                    scalar = scale_of(t, n)
                    vector = builder.insert_element(ir.Constant(_F8, ir.Undefined), scalar, ir.Constant(_I32, 0))
                    spread = builder.shuffle_vector(vector, vector, zeros)
                    found[t * n_columns + n] = fma(builder, whole, spread, found[t * n_columns + n])
            return found

        def at_group(sources: list[Any], group: Any) -> list[Any]:
            return [builder.add(source, builder.mul(group, int64(2))) for source in sources]

        def made_ahead(place: Any) -> Callable[[int, int], Any]:
            """Products of scales from the stack, at `place` (in bytes) of the batch."""

            def scale_of(t: int, n: int) -> Any:
                at = builder.add(builder.add(products_at, place), int64(4 * batch_size * (t * n_columns + n)))
                return load(builder, _FLOAT, at)

            return scale_of

        def row_number(start: Any, t: int, group: Any) -> Any:
            """The float32 number of row t for a group, in the array at `start`."""
            at = builder.add(start, builder.mul(builder.add(builder.mul(high, int64(t)), group), int64(4)))
            return load(builder, _FLOAT, at)

        whole = builder.and_(groups, int64(-OCTET))
        rest = builder.sub(groups, whole)
        pairs = [(t, n) for t in range(n_rows) for n in range(n_columns)]
        nothing = [splat(_F8, 0.0)] * len(pairs)
        with Loop(builder, whole, batch_size, nothing) as batch:
            left = builder.sub(whole, batch.index)
            some = builder.select(builder.icmp_signed("<", left, int64(batch_size)), left, int64(batch_size))
            with Loop(builder, some, OCTET, []) as octets:
                first = builder.add(batch.index, octets.index)
                octet(first, at_group(factors, first), octets.index)
            with Loop(builder, some, unrolled, batch.carried) as loop:
                sums = loop.carried
                first = builder.add(batch.index, loop.index)
                for n in range(n_columns):
                    ahead = builder.add(weights[n], builder.mul(first, int64(group_bytes)))
                    for line in range(0, unrolled * group_bytes, 64):
                        prefetch(builder, builder.add(ahead, int64(AHEAD + line)))
                for place in range(unrolled):
                    at = builder.mul(builder.add(loop.index, int64(place)), int64(4))
                    sums = add_group(sums, builder.add(first, int64(place)), made_ahead(at))
                loop.next = sums
            batch.next = loop.result
        # What the codes are off by, group by group: -8 times the scale, or the offset; eight groups at once.
        sources = shifts if stored == INT4_OFFSET else factors
        times = 1.0 if stored == INT4_OFFSET else -8.0
        more = nothing
        if stored != INT8:
            with Loop(builder, whole, OCTET, nothing) as loop:
                wide = [
                    builder.fmul(builder.fpext(load(builder, _H8, source), _F8), splat(_F8, times))
                    for source in at_group(sources, loop.index)
                ]
                for (t, n), total in zip(pairs, loop.carried, strict=True):
                    at = builder.add(builder.mul(high, int64(t)), loop.index)
                    row = load(builder, _F8, builder.add(sums_at, builder.mul(at, int64(4))))
                    loop.next.append(fma(builder, wide[n], row, total))
            more = loop.result
        # The groups of a last, unfinished octet, one by one.
        zero = ir.Constant(_FLOAT, 0.0)
        with Loop(builder, rest, 1, [*batch.result, *([zero] * len(pairs))]) as tail:
            group = builder.add(whole, tail.index)
            factor = [builder.fpext(load(builder, ir.HalfType(), at), _FLOAT) for at in at_group(factors, group)]
            sums = add_group(
                tail.carried[: len(pairs)],
                group,
                lambda t, n: builder.fmul(factor[n], row_number(scales_at, t, group)),
            )
            off = tail.carried[len(pairs) :]
            if stored != INT8:
                shift = [
                    builder.fmul(builder.fpext(load(builder, ir.HalfType(), at), _FLOAT), ir.Constant(_FLOAT, times))
                    for at in at_group(sources, group)
                ]
                off = [
                    fma(builder, shift[n], row_number(sums_at, t, group), total)
                    for (t, n), total in zip(pairs, off, strict=True)
                ]
            tail.next = [*sums, *off]
        totals = [sum_lanes(builder, each) for each in tail.result[: len(pairs)]]
        if stored != INT8:
            totals = [
                builder.fadd(builder.fadd(total, sum_lanes(builder, eights)), ones)
                for total, eights, ones in zip(totals, more, tail.result[len(pairs) :], strict=True)
            ]
        for t in range(n_rows):
            row = builder.add(out, builder.mul(out_stride, int64(t)))
            for n in range(n_columns):
                at = builder.add(row, builder.mul(step, int64(4 * n)))
                store(builder, totals[t * n_columns + n], at)
        return context.get_dummy_value()

    return types.void(form, columns, rows, *([types.int64] * 8)), generate


@device
def _columns(
    form: int, pair: bool, rows: int, codes: int, scale: int, offset: int, step: int, x: int, groups: int, out: int,
    out_stride: int,
) -> None:  # fmt: skip
    """Two weights, or one, for a tile of 1 to 6 rows."""
    if pair:
        if rows == 1:
            quantised_tile(form, 2, 1, codes, scale, offset, step, x, groups, out, out_stride)
        elif rows == 2:
            quantised_tile(form, 2, 2, codes, scale, offset, step, x, groups, out, out_stride)
        elif rows == 3:
            quantised_tile(form, 2, 3, codes, scale, offset, step, x, groups, out, out_stride)
        elif rows == 4:
            quantised_tile(form, 2, 4, codes, scale, offset, step, x, groups, out, out_stride)
        elif rows == 5:
            quantised_tile(form, 2, 5, codes, scale, offset, step, x, groups, out, out_stride)
        else:
            quantised_tile(form, 2, 6, codes, scale, offset, step, x, groups, out, out_stride)
    elif rows == 1:
        quantised_tile(form, 1, 1, codes, scale, offset, step, x, groups, out, out_stride)
    elif rows == 2:
        quantised_tile(form, 1, 2, codes, scale, offset, step, x, groups, out, out_stride)
    elif rows == 3:
        quantised_tile(form, 1, 3, codes, scale, offset, step, x, groups, out, out_stride)
    elif rows == 4:
        quantised_tile(form, 1, 4, codes, scale, offset, step, x, groups, out, out_stride)
    elif rows == 5:
        quantised_tile(form, 1, 5, codes, scale, offset, step, x, groups, out, out_stride)
    else:
        quantised_tile(form, 1, 6, codes, scale, offset, step, x, groups, out, out_stride)


@functools.cache
def quantised_function(form: int) -> Address:
    """`out[t, n]` for a tile of rows and `count` weights, read as a few long streams.

    Arguments: rows, packed, codes, scale, offset, width, count, out, out stride (bytes).
    """

    def quantised_products(
        rows: int, packed: int, codes: int, scale: int, offset: int, width: int, count: int, out: int, out_stride: int
    ) -> None:
        groups = width // GROUP
        code_stride, scale_stride = width if form == INT8 else width // 2, groups * 2
        done, part = 0, 0
        if rows == 1 and count >= 4:
            part = count // 4
            for n in range(part):
                c, s, o = codes + n * code_stride, scale + n * scale_stride, offset + n * scale_stride
                quantised_tile(form, 4, 1, c, s, o, part, packed, groups, out + n * 4, out_stride)
            done = 4 * part
        elif count >= 2:
            part = count // 2
            for n in range(part):
                c, s, o = codes + n * code_stride, scale + n * scale_stride, offset + n * scale_stride
                _columns(form, True, rows, c, s, o, part, packed, groups, out + n * 4, out_stride)
            done = 2 * part
        for n in range(done, count):
            c, s, o = codes + n * code_stride, scale + n * scale_stride, offset + n * scale_stride
            _columns(form, False, rows, c, s, o, 0, packed, groups, out + n * 4, out_stride)

    return compile_kernel(quantised_products, (int64_type,) * 9)


@device
def widen_quantised(
    form: int,
    codes: int,
    scale: int,
    offset: int,
    width: int,
    first: int,
    depth: int,
    count: int,
    row: int,
    target: int,
) -> None:
    """Elements `first` on (a multiple of a group) of `count` weights, as float32 rows of `row` elements."""
    groups = width // GROUP
    code_stride = width if form == INT8 else width // 2
    for n in range(count):
        factors = elements(2, scale + n * groups * 2, groups)
        for g in range(first // GROUP, (first + depth) // GROUP):
            factor = widen(2, factors[g])
            into = floats(target + n * (row * 4) + (g * GROUP - first) * 4, GROUP)
            if form == INT8:
                source = signed_bytes(codes + n * code_stride + g * GROUP, GROUP)
                for i in range(GROUP):
                    into[i] = np.float32(source[i]) * factor
            else:
                shift = np.float32(-8.0) * factor
                if form == INT4_OFFSET:
                    shift = widen(2, elements(2, offset + n * groups * 2, groups)[g])
                both = signed_bytes(codes + n * code_stride + g * (GROUP // 2), GROUP // 2)
                for i in range(GROUP // 2):
                    into[i] = np.float32(np.int32(both[i]) & np.int32(15)) * factor + shift
                for i in range(GROUP // 2):
                    code = (np.int32(both[i]) >> np.int32(4)) & np.int32(15)
                    into[GROUP // 2 + i] = np.float32(code) * factor + shift
