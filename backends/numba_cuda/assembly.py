"""What the intrinsics are on a GPU: LLVM instructions and inline PTX.

Owns one function for each intrinsic, made by `intrinsics.py` when it is first compiled; importing this module needs no
Numba-CUDA. What always holds: the meaning stands beside the simulated side (`elements.py`, `tensor_cores.py`), and the
texts here are PTX as its manual has it (NVIDIA, "Parallel Thread Execution ISA"), for sm_80 and newer.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from slotwise.backends.numba_cuda.intrinsics import (
    access,
    global_address,
    inline_ptx,
    numba_parts,
    operation,
    statement,
    with_arity,
)

# Conversions.


@functools.cache
def widen_bf16() -> Any:
    """Bits moved up by 16, seen as a float."""

    def build(ir, builder, bits):
        wide = builder.shl(builder.zext(bits, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return operation("u16", "f32", build)


@functools.cache
def round_bf16() -> Any:
    """`cvt.rn.bf16.f32`."""
    return operation(
        "f32", "u16", lambda ir, b, x: inline_ptx(ir, b, "cvt.rn.bf16.f32 $0, $1;", "=h,f", [ir.IntType(16)], [x])
    )


@functools.cache
def widen_f16() -> Any:
    """`cvt.f32.f16`."""
    return operation(
        "u16", "f32", lambda ir, b, x: inline_ptx(ir, b, "cvt.f32.f16 $0, $1;", "=f,h", [ir.FloatType()], [x])
    )


@functools.cache
def round_f16() -> Any:
    """`cvt.rn.f16.f32`."""
    return operation(
        "f32", "u16", lambda ir, b, x: inline_ptx(ir, b, "cvt.rn.f16.f32 $0, $1;", "=h,f", [ir.IntType(16)], [x])
    )


def _codes(prepare: Callable[..., Any], zero: float) -> Any:
    """Four bytes as floats, less `zero`: `prmt.b32` puts each below the exponent of 2^23, where a unit is one.

    It costs two instructions of the common kind a byte; conversions of whole numbers run at a fraction of their rate.
    """
    origin = float(1 << 23) + zero

    def build(ir, builder, word):
        word = prepare(ir, builder, word)
        made = []
        for place in range(4):
            text = f"prmt.b32 $0, $1, 0x4B000000, 0x744{place};"
            bits = inline_ptx(ir, builder, text, "=r,r", [ir.IntType(32)], [word])
            value = builder.bitcast(bits, ir.FloatType())
            made.append(builder.fsub(value, ir.Constant(ir.FloatType(), origin)))
        return made

    return operation("u32", "f32*4", build)


@functools.cache
def signed_codes() -> Any:
    """With its sign bit turned, a signed byte is itself plus 128."""
    return _codes(lambda ir, b, word: b.xor(word, ir.Constant(ir.IntType(32), 0x80808080)), 128)


@functools.cache
def low_codes() -> Any:
    """`and`, then `_codes`."""
    return _codes(lambda ir, b, word: b.and_(word, ir.Constant(ir.IntType(32), 0x0F0F0F0F)), 0)


@functools.cache
def high_codes() -> Any:
    """`shr` and `and`, then `_codes`."""

    def prepare(ir, builder, word):
        down = builder.lshr(word, ir.Constant(ir.IntType(32), 4))
        return builder.and_(down, ir.Constant(ir.IntType(32), 0x0F0F0F0F))

    return _codes(prepare, 0)


@functools.cache
def bits_of() -> Any:
    """The same register, seen as a signed number."""
    return operation("f32", "i64", lambda ir, b, x: b.sext(b.bitcast(x, ir.IntType(32)), ir.IntType(64)))


# Wide accesses. Loads go past L1's allocation where a kernel reads a byte once (weights, K and V): `streaming`.


_LOAD = "ld.global.v4.u32 {$0, $1, $2, $3}, [$4];"
_STORE = "st.global.v4.u32 [$0], {$1, $2, $3, $4};"


def _load_words(ir, builder, address):
    """Four 32-bit words. A side effect, so that it stays behind the barriers that order it."""
    return inline_ptx(ir, builder, _LOAD, "=r,=r,=r,=r,l,~{memory}", [ir.IntType(32)] * 4, [address], side_effect=True)


def _store_words(ir, builder, address, words):
    inline_ptx(ir, builder, _STORE, "l,r,r,r,r,~{memory}", [], [address, *words], side_effect=True)


@functools.cache
def load_words() -> Any:
    """`ld.global.v4.u32`."""
    return access("", "u32*4", _load_words)


@functools.cache
def load_8_f32() -> Any:
    """Two `ld.global.v4.u32`, seen as floats."""

    def build(ir, builder, address):
        second = builder.add(address, ir.Constant(ir.IntType(64), 16))
        words = [*_load_words(ir, builder, address), *_load_words(ir, builder, second)]
        return [builder.bitcast(word, ir.FloatType()) for word in words]

    return access("", "f32*8", build)


@functools.cache
def load_8_bf16() -> Any:
    """`ld.global.v4.u32`; of each word the lower half is moved up, the upper half left in its place."""

    def build(ir, builder, address):
        made = []
        for word in _load_words(ir, builder, address):
            low = builder.shl(word, ir.Constant(ir.IntType(32), 16))
            high = builder.and_(word, ir.Constant(ir.IntType(32), 0xFFFF0000))
            made += [builder.bitcast(low, ir.FloatType()), builder.bitcast(high, ir.FloatType())]
        return made

    return access("", "f32*8", build)


@functools.cache
def load_8_f16() -> Any:
    """`ld.global.v4.u32`, and `cvt.f32.f16` of each half."""

    def build(ir, builder, address):
        text = "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2; cvt.f32.f16 $0, lo; cvt.f32.f16 $1, hi; }"
        made = []
        for word in _load_words(ir, builder, address):
            made += inline_ptx(ir, builder, text, "=f,=f,r", [ir.FloatType()] * 2, [word])
        return made

    return access("", "f32*8", build)


_EIGHT = " ".join(["f32"] * 8)


def _store_halves(conversion: str) -> Any:
    """Pairs rounded by one instruction (the first source goes to the upper half), stored by `st.global.v4.u32`."""

    def build(ir, builder, address, *values):
        words = [
            inline_ptx(ir, builder, f"{conversion} $0, $1, $2;", "=r,f,f", [ir.IntType(32)], [values[i + 1], values[i]])
            for i in range(0, 8, 2)
        ]
        _store_words(ir, builder, address, words)

    return access(_EIGHT, "()", build)


@functools.cache
def store_8_bf16() -> Any:
    """`cvt.rn.bf16x2.f32` and `st.global.v4.u32`."""
    return _store_halves("cvt.rn.bf16x2.f32")


@functools.cache
def store_8_f16() -> Any:
    """`cvt.rn.f16x2.f32` and `st.global.v4.u32`."""
    return _store_halves("cvt.rn.f16x2.f32")


@functools.cache
def store_8_f32() -> Any:
    """Two `st.global.v4.u32`."""

    def build(ir, builder, address, *values):
        words = [builder.bitcast(value, ir.IntType(32)) for value in values]
        _store_words(ir, builder, address, words[:4])
        _store_words(ir, builder, builder.add(address, ir.Constant(ir.IntType(64), 16)), words[4:])

    return access(_EIGHT, "()", build)


# Tensor cores and asynchronous copies.


def _product(kind: str) -> Any:
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )

    def build(ir, builder, *values):
        return inline_ptx(
            ir, builder, text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [ir.FloatType()] * 4, values, side_effect=True
        )

    return operation(" ".join(["u32"] * 6 + ["f32"] * 4), "f32*4", build)


@functools.cache
def mma_bf16() -> Any:
    """`mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`."""
    return _product("bf16")


@functools.cache
def mma_f16() -> Any:
    """`mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32`."""
    return _product("f16")


_SHARED = "{ .reg .u64 wide; .reg .u32 at; cvta.to.shared.u64 wide, $%d; cvt.u32.u64 at, wide; %s }"
"""Numba's shared arrays have generic addresses; these instructions want the one within shared memory."""


def _matrices(modifier: str) -> Any:
    text = _SHARED % (4, f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{$0, $1, $2, $3}}, [at];")

    def build(ir, builder, address):
        return inline_ptx(
            ir, builder, text, "=r,=r,=r,=r,l,~{memory}", [ir.IntType(32)] * 4, [address], side_effect=True
        )

    return access("", "u32*4", build)


@functools.cache
def load_matrices() -> Any:
    """`ldmatrix.sync.aligned.m8n8.x4.shared.b16`."""
    return _matrices("")


@functools.cache
def load_matrices_transposed() -> Any:
    """`ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16`."""
    return _matrices(".trans")


@functools.cache
def copy_16() -> Any:
    """`cp.async.cg.shared.global` of 16 bytes, of which 16 or none are read and the rest are zero."""
    intrinsic, types, cgutils, ir = numba_parts()
    text = _SHARED % (0, "cp.async.cg.shared.global [at], [$1], 16, $2;")

    def code(context, builder, signature, values):
        target = global_address(ir, cgutils, context, builder, signature.args[0], values[0], values[1])
        source = global_address(ir, cgutils, context, builder, signature.args[2], values[2], values[3])
        live = builder.zext(values[4], ir.IntType(32))
        size = builder.shl(live, ir.Constant(ir.IntType(32), 4))
        inline_ptx(ir, builder, text, "l,l,r,~{memory}", [], [target, source, size], side_effect=True)
        return context.get_dummy_value()

    def typed(target, at, source, index, live):
        return types.void(target, types.int64, source, types.int64, types.boolean), code

    return with_arity(intrinsic, 5, typed)


@functools.cache
def commit_copies() -> Any:
    """`cp.async.commit_group`."""
    return statement("cp.async.commit_group;")


@functools.cache
def copies_done() -> Any:
    """`cp.async.wait_group 1`."""
    return statement("cp.async.wait_group 1;")


@functools.cache
def all_copies_done() -> Any:
    """`cp.async.wait_all`."""
    return statement("cp.async.wait_all;")


def _packing(conversion: str) -> Any:
    """The first source goes to the upper half."""

    def build(ir, builder, low, high):
        return inline_ptx(ir, builder, f"{conversion} $0, $1, $2;", "=r,f,f", [ir.IntType(32)], [high, low])

    return operation("f32 f32", "u32", build)


@functools.cache
def pack_bf16() -> Any:
    """`cvt.rn.bf16x2.f32`."""
    return _packing("cvt.rn.bf16x2.f32")


@functools.cache
def pack_f16() -> Any:
    """`cvt.rn.f16x2.f32`."""
    return _packing("cvt.rn.f16x2.f32")
