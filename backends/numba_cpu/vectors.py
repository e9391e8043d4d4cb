"""Vector code that Numba's compiler would not find by itself, written as LLVM instructions.

Owns the intrinsics that read, widen, multiply and sum vectors. What always holds: every sum runs over `LANES` lanes in
one fixed order, whichever tile it is part of, and every multiply-add is fused: so a result has the same bits however
many rows or weights share a tile. Addresses are int64; no alignment is assumed.

An element *kind* says how a number is stored: `F32`, `BF16` or `F16`. A *block* is 2 `LANES` elements, widened to two
float32 vectors: for bf16 the even and the odd elements (a shift and a mask, no shuffle), else the first and second
half.
A *packed* row is float32 in blocks of that order, padded with zeros to whole blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from slotwise.backends.numba_cpu.machine import LANES
from slotwise.core.specs import DType

F32, BF16, F16 = 0, 1, 2
KINDS = {DType.F32: F32, DType.BF16: BF16, DType.F16: F16}
ITEMSIZE = {F32: 4, BF16: 2, F16: 2}

BLOCK = 2 * LANES
"""Elements of a block."""

AHEAD = 1024
"""Bytes by which weights are asked for before they are used: what streams fastest on the machines tried."""

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_VF = ir.VectorType(_FLOAT, LANES)
_VI = ir.VectorType(_I32, LANES)
_VH = ir.VectorType(_HALF, LANES)

Builder = Any


def intrinsic(function: Callable[..., Any]) -> Any:
    """An intrinsic that is told the values of arguments that are constants; see `literals`."""
    return numba_intrinsic(prefer_literal=True)(function)


def int64(value: int) -> ir.Constant:
    """A 64-bit constant."""
    return ir.Constant(_I64, value)


def splat(vector: ir.VectorType, value: Any) -> ir.Constant:
    """A constant with `value` in every lane."""
    return ir.Constant(vector, [value] * vector.count)


def load(builder: Builder, kind: ir.Type, address: Any, offset: int = 0) -> Any:
    """Load a `kind` from any address."""
    where = builder.add(address, int64(offset)) if offset else address
    loaded = builder.load(builder.inttoptr(where, kind.as_pointer()))
    loaded.align = 1
    return loaded


def store(builder: Builder, value: Any, address: Any, offset: int = 0) -> None:
    """Store `value` at any address."""
    where = builder.add(address, int64(offset)) if offset else address
    builder.store(value, builder.inttoptr(where, value.type.as_pointer())).align = 1


def fma(builder: Builder, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`, rounded once."""
    name = f"llvm.fma.{_suffix(a.type)}"
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(a.type, [a.type] * 3), name)
    return builder.call(function, [a, b, c])


def _suffix(kind: ir.Type) -> str:
    return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"


def load_half(builder: Builder, kind: int, address: Any, half: int) -> Any:
    """The first or second float32 vector of the block at `address`."""
    if kind == BF16:
        pairs = load(builder, _VI, address)
        if half:
            return builder.bitcast(builder.and_(pairs, splat(_VI, 0xFFFF0000)), _VF)
        return builder.bitcast(builder.shl(pairs, splat(_VI, 16)), _VF)
    if kind == F16:
        return builder.fpext(load(builder, _VH, address, 2 * LANES * half), _VF)
    return load(builder, _VF, address, 4 * LANES * half)


def spread(builder: Builder, scalar: Any, vector: ir.VectorType) -> Any:
    """`scalar` in every lane of a `vector`."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count))


def prefetch(builder: Builder, address: Any) -> None:
    """Ask for the cache line at `address` (any address is allowed)."""
    pointer = builder.inttoptr(address, _I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 0), ir.Constant(_I32, 1)])


def sum_lanes(builder: Builder, vector: Any) -> Any:
    """The sum of all lanes: halves are added until one is left."""
    width = vector.type.count
    while width > 1:
        width //= 2
        low = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
        high = ir.Constant(ir.VectorType(_I32, width), list(range(width, 2 * width)))
        vector = builder.fadd(builder.shuffle_vector(vector, vector, low), builder.shuffle_vector(vector, vector, high))
    return builder.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic
def greatest(typing: Any, source: Any, count: Any) -> Any:
    """The greatest of `count` float32, whole vectors of them; NaN if any is NaN."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        source, count = arguments

        def greater(best: Any, other: Any) -> Any:
            wins = builder.or_(builder.fcmp_ordered(">", other, best), builder.fcmp_unordered("uno", other, other))
            return builder.select(wins, other, best)

        with Loop(builder, count, LANES, [splat(_VF, -math.inf)]) as loop:
            at = builder.add(source, builder.mul(loop.index, int64(4)))
            loop.next = [greater(loop.carried[0], load(builder, _VF, at))]
        (best,) = loop.result
        lanes = [builder.extract_element(best, ir.Constant(_I32, lane)) for lane in range(LANES)]
        return functools.reduce(greater, lanes)

    return types.float32(types.int64, types.int64), generate


@intrinsic
def ask_for(typing: Any, address: Any) -> Any:
    """Ask for the cache line at `address` (any address is allowed)."""

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def literals(*given: Any) -> tuple[int, ...] | None:
    """The values of literal integer types, or None when one is not literal yet."""
    if all(isinstance(each, types.IntegerLiteral) for each in given):
        return tuple(int(each.literal_value) for each in given)
    return None


class Loop:
    """A counted loop under construction: `index` runs from 0 below `stop` by `step`, with values carried along.

    Use as `with Loop(...) as loop:`, set `loop.next` to the carried values' successors inside; afterwards `loop.result`
    has their last values. The body runs at least never: a loop of no turns gives the first values.
    """

    def __init__(self, builder: Builder, stop: Any, step: int, first: list[Any]) -> None:
        self._builder, self._stop, self._step, self._first = builder, stop, step, first
        self.next: list[Any] = []
        self.result: list[Any] = []

    def __enter__(self) -> Loop:
        b = self._builder
        before = b.block
        self._head = b.append_basic_block("loop")
        self._body = b.append_basic_block("body")
        self._done = b.append_basic_block("done")
        b.branch(self._head)
        b.position_at_end(self._head)
        self.index = b.phi(_I64)
        self.index.add_incoming(int64(0), before)
        self.carried = [b.phi(value.type) for value in self._first]
        for phi, value in zip(self.carried, self._first, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", self.index, self._stop), self._body, self._done)
        b.position_at_end(self._body)
        return self

    def __exit__(self, *raised: object) -> None:
        b = self._builder
        latch = b.block
        self.index.add_incoming(b.add(self.index, int64(self._step)), latch)
        for phi, value in zip(self.carried, self.next, strict=True):
            phi.add_incoming(value, latch)
        b.branch(self._head)
        b.position_at_end(self._done)
        self.result = list(self.carried)


def zeroed(builder: Builder, kind: ir.Type, count: int) -> Any:
    """Address of `count` elements of zeroed stack memory, zeroed anew each time this point is reached."""
    memory = cgutils.alloca_once(builder, ir.ArrayType(kind, count))
    builder.store(ir.Constant(ir.ArrayType(kind, count), None), memory)
    return builder.ptrtoint(memory, _I64)


def copy_bytes(builder: Builder, target: Any, source: Any, count: Any) -> None:
    """Copy `count` bytes, one by one: for the few at the end of a row."""
    with Loop(builder, count, 1, []) as loop:
        store(builder, load(builder, _I8, builder.add(source, loop.index)), builder.add(target, loop.index))


@intrinsic
def pack_row(typing: Any, kind: Any, source: Any, count: Any, target: Any, stride: Any) -> Any:
    """Widen the `count` elements of `kind` at `source` into blocks at `target`, `stride` bytes apart."""
    known = literals(kind)
    if known is None:
        return None
    (stored,) = known

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        _, source, count, target, stride = arguments
        item = ITEMSIZE[stored]

        def widen(source: Any, block: Any) -> None:
            into = builder.add(target, builder.mul(block, stride))
            for half in range(2):
                store(builder, load_half(builder, stored, source, half), into, 4 * LANES * half)

        blocks = builder.sdiv(count, int64(BLOCK))
        with Loop(builder, blocks, 1, []) as loop:
            widen(builder.add(source, builder.mul(loop.index, int64(BLOCK * item))), loop.index)
        rest = builder.sub(count, builder.mul(blocks, int64(BLOCK)))
        with builder.if_then(builder.icmp_signed(">", rest, int64(0))):
            edge = zeroed(builder, _I8, BLOCK * item)
            last = builder.add(source, builder.mul(blocks, int64(BLOCK * item)))
            copy_bytes(builder, edge, last, builder.mul(rest, int64(item)))
            widen(edge, blocks)
        return context.get_dummy_value()

    return types.void(kind, *([types.int64] * 4)), generate


@intrinsic
def dot_tile(
    typing: Any,
    kind: Any,
    columns: Any,
    rows: Any,
    weight: Any,
    weight_stride: Any,
    x: Any,
    count: Any,
    out: Any,
    out_stride: Any,
    out_step: Any,
) -> Any:
    """Dot products of `rows` packed rows with `columns` stored rows of `count` elements.

    `out[t, n]` = sum over k of `x[t, k]` * `weight[n, k]`, float32; strides and the step from n to n + 1 are in bytes.
    Block k of row t of `x` is at `(k * rows + t) * 8 LANES`. Every weight is read once.
    """
    known = literals(kind, columns, rows)
    if known is None:
        return None
    stored, n_columns, n_rows = known

    def generate(context: Any, builder: Builder, signature: Any, arguments: Any) -> Any:
        weight, weight_stride, x, count, out, out_stride, out_step = arguments[3:]
        item = ITEMSIZE[stored]
        weights = [builder.add(weight, builder.mul(weight_stride, int64(n))) for n in range(n_columns)]

        def multiply(sums: list[Any], sources: list[Any], x: Any) -> list[Any]:
            sums = list(sums)
            for half in range(2):
                columns = [load_half(builder, stored, source, half) for source in sources]
                for t in range(n_rows):
                    row = load(builder, _VF, x, 4 * LANES * (2 * t + half))
                    for n in range(n_columns):
                        at = t * n_columns + n
                        sums[at] = fma(builder, columns[n], row, sums[at])
            return sums

        blocks = builder.sdiv(count, int64(BLOCK))
        x_step = int64(n_rows * BLOCK * 4)
        with Loop(builder, blocks, 1, [splat(_VF, 0.0)] * (n_columns * n_rows)) as loop:
            offset = builder.mul(loop.index, int64(BLOCK * item))
            sources = [builder.add(each, offset) for each in weights]
            for each in sources:
                prefetch(builder, builder.add(each, int64(AHEAD)))
            loop.next = multiply(loop.carried, sources, builder.add(x, builder.mul(loop.index, x_step)))
        sums = loop.result
        rest = builder.sub(count, builder.mul(blocks, int64(BLOCK)))
        before = builder.block
        with builder.if_then(builder.icmp_signed(">", rest, int64(0)), likely=False):
            edges = []
            for each in weights:
                edge = zeroed(builder, _I8, BLOCK * item)
                source = builder.add(each, builder.mul(blocks, int64(BLOCK * item)))
                copy_bytes(builder, edge, source, builder.mul(rest, int64(item)))
                edges.append(edge)
            more = multiply(sums, edges, builder.add(x, builder.mul(blocks, x_step)))
            edge_block = builder.block
        for at, first in enumerate(sums):
            total = builder.phi(_VF)
            total.add_incoming(first, before)
            total.add_incoming(more[at], edge_block)
            sums[at] = total
        for t in range(n_rows):
            row = builder.add(out, builder.mul(out_stride, int64(t)))
            for n in range(n_columns):
                at = builder.add(row, builder.mul(out_step, int64(n)))
                store(builder, sum_lanes(builder, sums[t * n_columns + n]), at)
        return context.get_dummy_value()

    arguments = (kind, columns, rows, *([types.int64] * 7))
    return types.void(*arguments), generate


@intrinsic
def sum_of_squares(typing: Any, kind: Any, source: Any, count: Any) -> Any:
    """The sum of the squares of `count` elements, float32."""
    known = literals(kind)
    if known is None:
        return None
    (stored,) = known

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, count = arguments
        item = ITEMSIZE[stored]

        def add(total: Any, source: Any) -> Any:
            for half in range(2):
                vector = load_half(builder, stored, source, half)
                total = fma(builder, vector, vector, total)
            return total

        blocks = builder.sdiv(count, int64(BLOCK))
        with Loop(builder, blocks, 1, [splat(_VF, 0.0)]) as loop:
            loop.next = [add(loop.carried[0], builder.add(source, builder.mul(loop.index, int64(BLOCK * item))))]
        (total,) = loop.result
        rest = builder.sub(count, builder.mul(blocks, int64(BLOCK)))
        before = builder.block
        with builder.if_then(builder.icmp_signed(">", rest, int64(0))):
            edge = zeroed(builder, _I8, BLOCK * item)
            last = builder.add(source, builder.mul(blocks, int64(BLOCK * item)))
            copy_bytes(builder, edge, last, builder.mul(rest, int64(item)))
            more = add(total, edge)
            edge_block = builder.block
        whole = builder.phi(_VF)
        whole.add_incoming(total, before)
        whole.add_incoming(more, edge_block)
        return sum_lanes(builder, whole)

    return types.float32(kind, types.int64, types.int64), generate


@intrinsic
def mix_block(
    typing: Any,
    kind: Any,
    rows: Any,
    values: Any,
    stride: Any,
    count: Any,
    weights: Any,
    weights_stride: Any,
    sums: Any,
) -> Any:
    """Add weighted values to one block of `rows` sums: `sums[r] += weights[r, i] * values[i]`, for i below `count`.

    `values` is the block of the first of `count` stored rows, `stride` bytes apart; `weights` are float32, the next
    row's `weights_stride` bytes on; block r of `sums` is packed, at `r * 8 LANES`.
    """
    known = literals(kind, rows)
    if known is None:
        return None
    stored, n_rows = known

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, stride, count, weights, weights_stride, sums = arguments[2:]
        first = [load(builder, _VF, sums, 4 * LANES * at) for at in range(2 * n_rows)]
        sources = [builder.add(weights, builder.mul(weights_stride, int64(r))) for r in range(n_rows)]
        with Loop(builder, count, 1, first) as loop:
            value = builder.add(values, builder.mul(loop.index, stride))
            offset = builder.mul(loop.index, int64(4))
            wide = [spread(builder, load(builder, _FLOAT, builder.add(source, offset)), _VF) for source in sources]
            halves = [load_half(builder, stored, value, half) for half in range(2)]
            loop.next = [fma(builder, wide[at // 2], halves[at % 2], loop.carried[at]) for at in range(2 * n_rows)]
        for at, total in enumerate(loop.result):
            store(builder, total, sums, 4 * LANES * at)
        return context.get_dummy_value()

    return types.void(kind, rows, *([types.int64] * 6)), generate
