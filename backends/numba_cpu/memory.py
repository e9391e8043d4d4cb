"""Numbers at addresses, and the arithmetic of single numbers.

Owns the intrinsics that turn addresses into arrays, widen and round elements, and the functions that a compiler can
vectorise: `exp`, `tanh`. What always holds: every function here is a fixed sequence of correctly rounded float32
operations without branches, so a loop over it gives the same bits in its vector part and in its remainder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils

from slotwise.backends.numba_cpu.vectors import BF16, F16, F32, fma, intrinsic, literals

Function = TypeVar("Function", bound=Callable[..., Any])

_ELEMENT = {F32: types.float32, BF16: types.uint16, F16: types.uint16}
_LOG2_E = np.float32(1.44269504)
_ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_EXP_HIGH, _EXP_LOW = np.float32(88.0), np.float32(-87.0)
_C5, _C4, _C3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C2, _C1, _C0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
ZERO, ONE, TWO, HALF = np.float32(0.0), np.float32(1.0), np.float32(2.0), np.float32(0.5)


def device(function: Function) -> Function:
    """A function that kernels call; inlined by the compiler where that pays."""
    return cast(Function, njit(function, nogil=True, error_model="numpy"))


def _pointer_to(element: types.Type) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_float_pointer, _int32_pointer, _int64_pointer = (_pointer_to(t) for t in (types.float32, types.int32, types.int64))
_byte_pointer, _signed_pointer = _pointer_to(types.uint8), _pointer_to(types.int8)


def _as_int64(value: Any) -> Any:
    return np.int64(value)


as_int64: Any = device(_as_int64)
"""An int32 as the int64 that addresses and counts are."""


@device
def floats(address: int, count: int) -> Any:
    """The float32 array at `address`."""
    return carray(_float_pointer(address), count)


@device
def int32s(address: int, count: int) -> Any:
    """The int32 array at `address`."""
    return carray(_int32_pointer(address), count)


@device
def int64s(address: int, count: int) -> Any:
    """The int64 array at `address`."""
    return carray(_int64_pointer(address), count)


@device
def bytes_at(address: int, count: int) -> Any:
    """The uint8 array at `address`."""
    return carray(_byte_pointer(address), count)


@device
def signed_bytes(address: int, count: int) -> Any:
    """The int8 array at `address`."""
    return carray(_signed_pointer(address), count)


@intrinsic
def _element_pointer(typing: Any, kind: Any, address: Any) -> Any:
    known = literals(kind)
    if known is None:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(signature.return_type))

    return types.CPointer(_ELEMENT[known[0]])(kind, types.int64), generate


@device
def elements(kind: int, address: int, count: int) -> Any:
    """The array of elements of `kind` at `address`, as stored: bf16 and fp16 as uint16."""
    return carray(_element_pointer(kind, address), count)


@intrinsic
def widen(typing: Any, kind: Any, stored: Any) -> Any:
    """The float32 value of one stored element."""
    known = literals(kind)
    if known is None:
        return None
    (kind_value,) = known

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if kind_value == BF16:
            wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
            return builder.bitcast(wide, ir.FloatType())
        if kind_value == F16:
            return builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
        return value

    return types.float32(kind, _ELEMENT[kind_value]), generate


@intrinsic
def narrow(typing: Any, kind: Any, value: Any) -> Any:
    """A float32 value as a stored element, rounded to nearest even; NaN stays NaN."""
    known = literals(kind)
    if known is None:
        return None
    (kind_value,) = known

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[1]
        if kind_value == F16:
            return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
        if kind_value == F32:
            return value
        word = ir.IntType(32)
        bits = builder.bitcast(value, word)
        last = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.lshr(builder.add(bits, builder.add(last, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        quiet = builder.or_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 0x40))
        chosen = builder.select(builder.fcmp_unordered("uno", value, value), quiet, rounded)
        return builder.trunc(chosen, ir.IntType(16))

    return _ELEMENT[kind_value](kind, types.float32), generate


def _same_bits(source: types.Type, target: types.Type) -> Any:
    @intrinsic
    def convert(typing: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

        return target(source), generate

    return convert


float_bits = _same_bits(types.float32, types.int32)
"""The bits of a float32 as an int32."""
float_of_bits = _same_bits(types.int32, types.float32)
"""The float32 with these bits."""
double_of_bits = _same_bits(types.int64, types.float64)
"""The float64 with these bits: how a call's record holds a number that is not whole."""


@intrinsic
def multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` in float32, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return fma(builder, *arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def stack_memory(typing: Any, count: Any) -> Any:
    """Address of `count` bytes of the caller's stack, uninitialised."""
    known = literals(count)
    if known is None:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        memory = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(8), known[0]))
        memory.align = 64
        return builder.ptrtoint(memory, ir.IntType(64))

    return types.int64(count), generate


def _caller(count: int) -> Any:
    @intrinsic
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.VoidType(), [word] * count)
            unpacked = cgutils.unpack_tuple(builder, values[1])
            builder.call(builder.inttoptr(values[0], kind.as_pointer()), unpacked)
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, count)), generate

    return call


call_3, call_5, call_7, call_8 = (_caller(count) for count in (3, 5, 7, 8))
"""Call the compiled function at an address with that many int64, given as a tuple: so a big one is compiled once."""


@device
def exp(x: np.float32) -> np.float32:
    """e**x to about a unit in the last place; 0 below -87, NaN for NaN (as Cephes' expf: reduced range, polynomial)."""
    inside = min(x, _EXP_HIGH)
    shifted = multiply_add(inside, _LOG2_E, _ROUNDER)
    n = shifted - _ROUNDER
    r = multiply_add(-n, _LN2_LOW, multiply_add(-n, _LN2_HIGH, inside))
    p = multiply_add(_C5, r, _C4)
    p = multiply_add(p, r, _C3)
    p = multiply_add(p, r, _C2)
    p = multiply_add(p, r, _C1)
    p = multiply_add(p, r, _C0)
    y = multiply_add(p, r * r, r) + ONE
    power = float_of_bits((float_bits(shifted) << np.int32(23)) + np.int32(0x3F800000))
    value = y * power
    return ZERO if x < _EXP_LOW else value


@device
def tanh(x: np.float32) -> np.float32:
    """The hyperbolic tangent, to about 1e-7 absolutely."""
    return ONE - TWO / (exp(TWO * x) + ONE)
