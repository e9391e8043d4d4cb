"""Matrix products with quantised weights.

Owns the kernels of `linear_q`, `linear_heads_q`, `linear_qkv_q`, `linear_gated_q` and `logits_q`. What always holds: a
lane reads 16 bytes of codes at a time, which lie within one group, and they become weights in registers: scale * code +
offset in float32, rounded to the activations' dtype where tensor cores multiply; activations are never rounded. There
is one kernel an op, `<op>.rows`, for decoding and prompts: each output is summed over K in one order that N, K, the
bits and the dtype decide, so a row's bits do not depend on the others'.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import elements
from slotwise.backends.numba_cuda.blocks import WARP, ZERO
from slotwise.backends.numba_cuda.elements import (
    PACK,
    elements_of,
    high_codes,
    load_words,
    low_codes,
    signed_codes,
    widen_f16,
)
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel
from slotwise.backends.numba_cuda.linear import (
    MOST_ROWS,
    THREADS,
    lanes_to_outputs,
    refuses,
)
from slotwise.backends.numba_cuda.linear_rows import (
    COLUMNS,
    TILE,
    product_pair,
    sums_to_outputs,
    tiles_for,
    warps_for,
    words_of,
)
from slotwise.backends.numba_cuda.products import RESULTS, Product, product_of
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import HALVES, tensor_core_of
from slotwise.core.backend import CallSpec
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.core.quantise import GROUP
from slotwise.core.specs import DType

SPANS = {8: 16, 4: 32}
"""Bits of a code -> elements whose codes a lane reads at a time: 16 bytes, and no more than a group."""

LANES = 4
"""Lanes that share 16 bytes each of a weight's row, where tensor cores multiply."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """What a quantised product fixes at compile time: the product, bits of a code, whether there are offsets."""

    of: Product
    bits: int
    shifted: bool

    @property
    def span(self) -> int:
        """Elements whose codes a lane reads at a time."""
        return SPANS[self.bits]

    @property
    def chunk(self) -> int:
        """Elements of K that a warp reads at a time for tensor cores: two spans a lane."""
        return 2 * LANES * self.span

    @property
    def row_bytes(self) -> int:
        """Bytes of a weight's codes."""
        return self.of.inner * self.bits // 8


@functools.cache
def group_numbers(q: Quantised) -> Any:
    """`numbers(scale, offset, row, rows, k)`: the factor of a code and what is added, of the group that holds `k`."""
    inner, groups, shifted = q.of.inner, q.of.inner // GROUP, q.shifted
    zero = np.float32(-8 if q.bits == 4 else 0)  # what stands for 0, less its code

    @device
    def numbers(scale, offset, row, rows, k):
        if row < rows and k < inner:
            at = row * groups + k // GROUP
            factor = widen_f16(scale[at])
            return (factor, widen_f16(offset[at]) if shifted else factor * zero)
        return (ZERO, ZERO)

    return numbers


def scaled(a, b, factor, shift):
    """The eight weights of two words' codes."""
    return (
        a[0] * factor + shift,
        a[1] * factor + shift,
        a[2] * factor + shift,
        a[3] * factor + shift,
        b[0] * factor + shift,
        b[1] * factor + shift,
        b[2] * factor + shift,
        b[3] * factor + shift,
    )


@functools.cache
def rounded_weights(dtype: DType) -> Any:
    """`weights(a, b, numbers)`: eight weights rounded to `dtype`, in the registers that a product takes."""
    _, pack = tensor_core_of(dtype)

    @device
    def weights(a, b, numbers):
        w = scaled(a, b, numbers[0], numbers[1])
        return (pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]))

    return weights


@functools.cache
def piece_adder(q: Quantised, tiles: int, unpack: Any) -> Any:
    """`add_piece(...)`: the products with eight elements of K, for all rows of x.

    `a` and `b` are a word each of two weights' codes, and of their ups', which `unpack` takes apart; `numbers` their
    factors and shifts.
    """
    multiply, weights, gated, inner = product_pair(q.of.dtype), rounded_weights(q.of.dtype), q.of.gated, q.of.inner

    @device
    def add_piece(acc, ups, x, row, count, k, a, b, numbers):
        low = weights(unpack(a[0]), unpack(b[0]), numbers[0])
        high = weights(unpack(a[1]), unpack(b[1]), numbers[1])
        if gated:
            up_low = weights(unpack(a[2]), unpack(b[2]), numbers[2])
            up_high = weights(unpack(a[3]), unpack(b[3]), numbers[3])
        for r in range(tiles):
            values = words_of(x, row + r * COLUMNS, count, k, inner)
            multiply(acc, r, low, high, values)
            if gated:
                multiply(ups, r, up_low, up_high, values)

    return add_piece


@functools.cache
def span_adder(q: Quantised, tiles: int) -> Any:
    """`add_span(...)`: the products with a lane's 16 bytes of codes of weight `column` and of the one 8 below it."""
    outputs, gated, eight, numbers_of = q.of.outputs, q.of.gated, q.bits == 8, group_numbers(q)
    first = piece_adder(q, tiles, signed_codes if eight else low_codes)
    last = piece_adder(q, tiles, signed_codes if eight else high_codes)

    @device
    def add_span(acc, ups, x, scale, offset, row, count, column, k, low, high, up_low, up_high):
        low_numbers = numbers_of(scale, offset, column, outputs, k)
        high_numbers = numbers_of(scale, offset, column + 8, outputs, k)
        if gated:
            up_low_numbers = numbers_of(scale, offset, column + outputs, 2 * outputs, k)
            up_high_numbers = numbers_of(scale, offset, column + 8 + outputs, 2 * outputs, k)
        else:
            up_low_numbers, up_high_numbers = low_numbers, high_numbers  # not looked at
        numbers = (low_numbers, high_numbers, up_low_numbers, up_high_numbers)
        w_0 = (low[0], high[0], up_low[0], up_high[0])
        w_1 = (low[1], high[1], up_low[1], up_high[1])
        w_2 = (low[2], high[2], up_low[2], up_high[2])
        w_3 = (low[3], high[3], up_low[3], up_high[3])
        first(acc, ups, x, row, count, k, w_0, w_1, numbers)
        first(acc, ups, x, row, count, k + 8, w_2, w_3, numbers)
        if not eight:
            last(acc, ups, x, row, count, k + 16, w_0, w_1, numbers)
            last(acc, ups, x, row, count, k + 24, w_2, w_3, numbers)

    return add_span


@functools.cache
def multiply_rows_q_on_tensor_cores(q: Quantised, tiles: int) -> Any:
    """Up to 8 `tiles` rows of x [T, K] times 16 rows of codes [N, K] (of gate and of up, where there are two)."""
    outputs, inner, gated, row_bytes = q.of.outputs, q.of.inner, q.of.gated, q.row_bytes
    warps, span, chunk, a_byte = warps_for(outputs, inner, q.chunk), q.span, q.chunk, 8 // q.bits
    step, size = warps * chunk, warps * TILE * COLUMNS
    up_size, up_tiles = (size, tiles) if gated else (1, 1)
    add_span = span_adder(q, tiles)
    finish_tiles = sums_to_outputs(q.of, tiles, warps)

    @kernel
    def multiply_rows_q_on_tensor_cores(x, codes, scale, offset, bias, out, second, third, count):
        parts = cuda.shared.array(size, np.float32)
        up_parts = cuda.shared.array(up_size, np.float32)
        acc = cuda.local.array((tiles, 4), np.float32)
        ups = cuda.local.array((up_tiles, 4), np.float32)
        lane = cuda.threadIdx.x % WARP
        warp = cuda.threadIdx.x // WARP
        column = cuda.blockIdx.x * TILE + lane // 4
        row = cuda.blockIdx.y * (tiles * COLUMNS) + lane // 4
        for r in range(tiles):
            for i in range(4):
                acc[r, i] = ZERO
                if gated:
                    ups[r, i] = ZERO
        for start in range(warp * chunk, inner, step):
            near = start + lane % 4 * span
            far = near + LANES * span
            low_0 = words_of(codes, column, outputs, near // a_byte, row_bytes)
            high_0 = words_of(codes, column + 8, outputs, near // a_byte, row_bytes)
            low_1 = words_of(codes, column, outputs, far // a_byte, row_bytes)
            high_1 = words_of(codes, column + 8, outputs, far // a_byte, row_bytes)
            if gated:
                up_low_0 = words_of(codes, column + outputs, 2 * outputs, near // a_byte, row_bytes)
                up_high_0 = words_of(codes, column + 8 + outputs, 2 * outputs, near // a_byte, row_bytes)
                up_low_1 = words_of(codes, column + outputs, 2 * outputs, far // a_byte, row_bytes)
                up_high_1 = words_of(codes, column + 8 + outputs, 2 * outputs, far // a_byte, row_bytes)
            else:
                up_low_0, up_high_0, up_low_1, up_high_1 = low_0, high_0, low_1, high_1  # not looked at
            add_span(acc, ups, x, scale, offset, row, count, column, near, low_0, high_0, up_low_0, up_high_0)
            add_span(acc, ups, x, scale, offset, row, count, column, far, low_1, high_1, up_low_1, up_high_1)
        finish_tiles(parts, up_parts, acc, ups, bias, out, second, third, count)

    return multiply_rows_q_on_tensor_cores


@functools.cache
def span_reader(q: Quantised) -> Any:
    """`read_span(weights, ...)`: what 16 bytes of `row`'s codes from `k` on stand for, a pack a row of `weights`."""
    row_bytes, vector, eight, a_byte = q.row_bytes, q.of.vector, q.bits == 8, 8 // q.bits
    numbers_of, keep = group_numbers(q), elements.keep

    @device
    def read_span(weights, codes, scale, offset, row, k):
        factor, shift = numbers_of(scale, offset, row, row + 1, k)
        at = row * row_bytes + k // a_byte
        if vector and eight:
            w = load_words(codes, at)
            keep(weights, 0, scaled(signed_codes(w[0]), signed_codes(w[1]), factor, shift))
            keep(weights, 1, scaled(signed_codes(w[2]), signed_codes(w[3]), factor, shift))
        elif vector:
            w = load_words(codes, at)
            keep(weights, 0, scaled(low_codes(w[0]), low_codes(w[1]), factor, shift))
            keep(weights, 1, scaled(low_codes(w[2]), low_codes(w[3]), factor, shift))
            keep(weights, 2, scaled(high_codes(w[0]), high_codes(w[1]), factor, shift))
            keep(weights, 3, scaled(high_codes(w[2]), high_codes(w[3]), factor, shift))
        else:
            for j in range(16):
                code = codes[at + j]
                if eight:
                    weights[j // PACK, j % PACK] = np.float32((code ^ 128) - 128) * factor + shift
                else:
                    weights[j // PACK, j % PACK] = np.float32(code & 15) * factor + shift
                    weights[2 + j // PACK, j % PACK] = np.float32(code >> 4) * factor + shift

    return read_span


@functools.cache
def multiply_rows_q(q: Quantised, rows: int) -> Any:
    """`rows` rows of x [T, K] times codes [N, K] transposed: a group of lanes sums one output of each row."""
    load, dot, kept = elements_of(q.of.dtype, q.of.vector).load, elements.dot, elements.kept
    lanes, span, pieces = q_lanes(q), q.span, q.span // PACK
    read_span, finish_lanes, groups = span_reader(q), lanes_to_outputs(q.of, rows, lanes), THREADS // lanes
    inner, outputs, gated, step = q.of.inner, q.of.outputs, q.of.gated, lanes * q.span

    @kernel
    def multiply_rows_q(x, codes, scale, offset, bias, out, second, third, count):
        sums = cuda.local.array(rows, np.float32)
        ups = cuda.local.array(rows, np.float32)
        weights = cuda.local.array((pieces, PACK), np.float32)
        more = cuda.local.array((pieces, PACK), np.float32)
        lane = cuda.threadIdx.x % lanes
        column = cuda.blockIdx.x * groups + cuda.threadIdx.x // lanes
        first = cuda.blockIdx.y * rows
        for r in range(rows):
            sums[r] = ZERO
            ups[r] = ZERO
        if column < outputs:
            for k in range(lane * span, inner, step):
                read_span(weights, codes, scale, offset, column, k)
                if gated:
                    read_span(more, codes, scale, offset, column + outputs, k)
                for r in range(rows):
                    if first + r < count:
                        for p in range(pieces):
                            values = load(x, (first + r) * inner + k + p * PACK, PACK)
                            sums[r] = dot(sums[r], values, kept(weights, p))
                            if gated:
                                ups[r] = dot(ups[r], values, kept(more, p))
        finish_lanes(sums, ups, first, column, bias, out, second, third, count)

    return multiply_rows_q


def q_lanes(q: Quantised) -> int:
    """Lanes that share an output's sum: a warp's, or fewer where K has fewer spans."""
    return min(WARP, 1 << max(0, math.ceil(q.of.inner / q.span) - 1).bit_length())


def _rows(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rows, of = product_of(call, aligned)
    q = Quantised(of, int(call.attrs["bits"]), call.inputs[3] is not None)
    names = ("x", "codes", "scale", "offset" if q.shifted else "scale", "bias" if of.biased else "scale")
    arguments = (*names, *RESULTS[of.op], rows)
    if of.vector and of.dtype in HALVES:
        tiles = tiles_for(rows, of.gated)
        grid = (math.ceil(of.outputs / TILE), math.ceil(rows / (tiles * COLUMNS)))
        threads = WARP * warps_for(of.outputs, of.inner, q.chunk)
        return (Grid(multiply_rows_q_on_tensor_cores(q, tiles), grid, threads, arguments),)
    tile = min(MOST_ROWS, 1 << max(0, rows - 1).bit_length())
    grid = (math.ceil(of.outputs / (THREADS // q_lanes(q))), math.ceil(rows / tile))
    return (Grid(multiply_rows_q(q, tile), grid, THREADS, arguments),)


KERNELS = tuple(cuda_kernel(op, "rows", _rows, refuses=refuses) for op in FLOAT_OPS)
