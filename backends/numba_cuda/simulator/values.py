"""Arithmetic as Numba-CUDA types it.

Owns the operators, casts and functions of numbers. What always holds: a number is a numpy scalar (the same in all
threads) or an array with one element a thread, never a Python number; whole numbers of up to 64 bits compute in 64 bits
and are signed where either side is; float32 with float32 stays float32; float32 with a whole number of 32 bits or more,
or with a literal, is float64. Source of the rules: Numba enhancement proposal 1, "Changes in integer typing".
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from .faults import UnsupportedKernel

Value = Any
"""A numpy scalar or an array of one element a thread."""

_KINDS = list(map(np.dtype, "?bBhHiIlLqQefd"))
"""All types of numbers; `l` and `q` are the same on most systems, and numpy keeps them apart."""


def _arithmetic(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    if a.kind in "biu" and b.kind in "biu":
        return np.dtype(np.uint64 if a.kind == b.kind == "u" else np.int64)
    if {a, b} == {np.dtype(np.uint16), np.dtype(np.float32)}:
        return np.dtype(np.float64)  # so Numba has it, though numpy has not
    return np.result_type(a, b)


def _bitwise(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    return a if a.kind == b.kind == "b" else _arithmetic(a, b)


def _table(
    rule: Callable[[np.dtype[Any], np.dtype[Any]], np.dtype[Any]],
) -> dict[tuple[int, int], np.dtype[Any] | None]:
    """(type number, type number) -> what both must become first; None when they are that already."""
    found: dict[tuple[int, int], np.dtype[Any] | None] = {}
    for a in _KINDS:
        for b in _KINDS:
            both = rule(a, b)
            found[a.num, b.num] = None if a == b == both else both
    return found


_ARITHMETIC, _BITWISE = _table(_arithmetic), _table(_bitwise)


def _binary(
    apply: Callable[[Any, Any], Any], table: dict[tuple[int, int], np.dtype[Any] | None]
) -> Callable[..., Value]:
    def operate(a: Value, b: Value) -> Value:
        both = table[a.dtype.num, b.dtype.num]
        if both is not None:
            a, b = a.astype(both), b.astype(both)
        return apply(a, b)

    return operate


add = _binary(operator.add, _ARITHMETIC)
subtract = _binary(operator.sub, _ARITHMETIC)
multiply = _binary(operator.mul, _ARITHMETIC)
divide = _binary(operator.truediv, _ARITHMETIC)
floor_divide = _binary(operator.floordiv, _ARITHMETIC)
remainder = _binary(operator.mod, _ARITHMETIC)
power = _binary(operator.pow, _ARITHMETIC)
bit_and = _binary(operator.and_, _BITWISE)
bit_or = _binary(operator.or_, _BITWISE)
bit_xor = _binary(operator.xor, _BITWISE)


def _shift(apply: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def operate(a: Value, b: Value) -> Value:
        wide = np.uint64 if a.dtype.kind == "u" else np.int64
        return apply(a.astype(wide), b.astype(wide))

    return operate


shift_left, shift_right = _shift(operator.lshift), _shift(operator.rshift)


def _widened(a: Value) -> Value:
    return a.astype(_arithmetic(a.dtype, a.dtype)) if a.dtype.kind in "biu" else a


def negative(a: Value) -> Value:
    """-a, computed in a's own width and widened then."""
    return _widened(-(a.astype(np.int64) if a.dtype.kind == "b" else a))


def positive(a: Value) -> Value:
    """+a."""
    return +_widened(a)


def invert(a: Value) -> Value:
    """~a, computed in a's own width and widened then, as Numba has it: ~uint32(0) is uint64(0xFFFFFFFF)."""
    return ~a if a.dtype.kind == "b" else _widened(~a)


def truth(a: Value) -> Value:
    """Whether it counts as true."""
    if isinstance(a, (np.ndarray, np.generic)):
        return a if a.dtype.kind == "b" else a != 0
    return np.bool_(bool(a))


def logical_not(a: Value) -> Value:
    """Not a."""
    return ~truth(a)


def both(a: Value, b: Value) -> Value:
    """`a and b` of two truths without side effects."""
    return truth(a) & truth(b)


def either(a: Value, b: Value) -> Value:
    """`a or b` of two truths without side effects."""
    return truth(a) | truth(b)


def cast_to(dtype: Any, value: Value) -> Value:
    """`x.dtype.type(value)`."""
    return value.astype(dtype)


@functools.cache
def cast(dtype: Any) -> Callable[[Value], Value]:
    """The function that `np.float32` and kin are in a kernel."""
    kind = np.dtype(dtype)

    def convert(value: Value) -> Value:
        return value.astype(kind)

    return convert


def _same_type(a: Value, b: Value) -> tuple[Value, Value]:
    if a.dtype == b.dtype:
        return a, b
    together = np.result_type(a, b)
    return a.astype(together), b.astype(together)


def _extreme(whole: Any, floating: Any) -> Callable[..., Value]:
    def choose(first: Value, *others: Value) -> Value:
        """Of numbers, or of one tuple of them; a NaN loses against a number, as fminf and fmaxf have it."""
        if isinstance(first, tuple):
            first, *rest = first
            others = tuple(rest)
        for other in others:
            a, b = _same_type(first, other)
            first = floating(a, b) if a.dtype.kind == "f" else whole(a, b)
        return first

    return choose


minimum, maximum = _extreme(np.minimum, np.fmin), _extreme(np.maximum, np.fmax)


def absolute(a: Value) -> Value:
    """abs(a), of a's own type."""
    return np.abs(a)


def _real(function: Callable[..., Any]) -> Callable[..., Value]:
    """A function of floating-point numbers; whole ones become float64."""

    def apply(*arguments: Value) -> Value:
        if any(a.dtype.kind != "f" for a in arguments):
            arguments = tuple(a if a.dtype.kind == "f" else a.astype(np.float64) for a in arguments)
        if len(arguments) == 2:
            arguments = _same_type(*arguments)
        return function(*arguments)

    return apply


def _whole(function: Callable[[Any], Any]) -> Callable[[Value], Value]:
    def apply(a: Value) -> Value:
        return function(a).astype(np.int64) if a.dtype.kind == "f" else _widened(a)

    return apply


def _erf(kind: Callable[[float], float]) -> Callable[[Any], Any]:
    apply = np.frompyfunc(kind, 1, 1)
    return lambda a: np.asarray(apply(a), np.float64).astype(a.dtype)[()]


def fma(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once (float32: by way of float64)."""
    a, b = _same_type(a, b)
    a, c = _same_type(a, c)
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(np.float32)
    return a * b + c


def _reciprocal_root(a: Any) -> Any:
    return (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype)


EXP, LOG, SQRT, TANH = _real(np.exp), _real(np.log), _real(np.sqrt), _real(np.tanh)
MATH: dict[Any, Callable[..., Value]] = {
    math.exp: EXP, math.log: LOG, math.sqrt: SQRT, math.tanh: TANH,
    math.expm1: _real(np.expm1), math.log1p: _real(np.log1p), math.log2: _real(np.log2), math.log10: _real(np.log10),
    math.sin: _real(np.sin), math.cos: _real(np.cos), math.tan: _real(np.tan), math.asin: _real(np.arcsin),
    math.acos: _real(np.arccos), math.atan: _real(np.arctan), math.atan2: _real(np.arctan2), math.sinh: _real(np.sinh),
    math.cosh: _real(np.cosh), math.pow: _real(np.power), math.fabs: _real(np.abs), math.fmod: _real(np.fmod),
    math.hypot: _real(np.hypot), math.copysign: _real(np.copysign), math.isnan: _real(np.isnan),
    math.isinf: _real(np.isinf), math.isfinite: _real(np.isfinite), math.floor: _whole(np.floor),
    math.ceil: _whole(np.ceil), math.trunc: _whole(np.trunc), math.erf: _real(_erf(math.erf)),
    math.erfc: _real(_erf(math.erfc)), math.ldexp: lambda a, b: np.ldexp(a, b).astype(a.dtype),
    **({math.exp2: _real(np.exp2)} if hasattr(math, "exp2") else {}),
    np.exp: EXP, np.log: LOG, np.sqrt: SQRT, np.tanh: TANH,
    min: minimum, max: maximum, abs: absolute, bool: truth, int: cast(np.int64), float: cast(np.float64),
    round: _whole(np.rint),
}  # fmt: skip
"""What kernels call by these names outside `cuda`."""

_DIVIDED = _real(lambda a, b: a / b)
LIBDEVICE: dict[str, Callable[..., Value]] = {
    "exp": EXP, "log": LOG, "sqrt": SQRT, "tanh": TANH, "exp2": _real(np.exp2),
    "exp10": _real(lambda a: np.power(a.dtype.type(10), a)),
    "log2": _real(np.log2), "log10": _real(np.log10), "sin": _real(np.sin), "cos": _real(np.cos),
    "rsqrt": _real(_reciprocal_root),
    "pow": _real(np.power), "fdivide": _DIVIDED, "fma": fma, "fmin": minimum, "fmax": maximum, "fabs": absolute,
    "rcp": _real(lambda a: 1 / a), "floor": _real(np.floor), "ceil": _real(np.ceil), "rint": _real(np.rint),
    "trunc": _real(np.trunc), "erf": MATH[math.erf],
}  # fmt: skip
_LIBDEVICE_KINDS = {
    "float_as_int": np.int32, "int_as_float": np.float32, "float_as_uint": np.uint32, "uint_as_float": np.float32,
    "double_as_longlong": np.int64, "longlong_as_double": np.float64,
}  # fmt: skip


def libdevice(name: str) -> Callable[..., Value]:
    """The function `cuda.libdevice.<name>`: float32's ends in f; `fast_` and rounding modes make no difference here."""
    if name in _LIBDEVICE_KINDS:
        kind = np.dtype(_LIBDEVICE_KINDS[name])
        source = np.dtype(_SOURCES[name])
        return lambda a: a.astype(source).view(kind)
    plain = name.removeprefix("fast_")
    for ending in ("_rn", "_rz", "_ru", "_rd"):
        plain = plain.removesuffix(ending)
    single = (plain not in LIBDEVICE and plain.removesuffix("f") in LIBDEVICE) or plain.endswith("ff")
    plain = plain if plain in LIBDEVICE else plain.removesuffix("f")
    if plain not in LIBDEVICE:
        raise UnsupportedKernel(f"cuda.libdevice.{name} is not known here; known are {', '.join(sorted(LIBDEVICE))}")
    function, kind = LIBDEVICE[plain], np.dtype(np.float32 if single else np.float64)
    return lambda *arguments: function(*(a.astype(kind) for a in arguments))


_SOURCES = {
    "float_as_int": np.float32, "int_as_float": np.int32, "float_as_uint": np.float32, "uint_as_float": np.uint32,
    "double_as_longlong": np.float64, "longlong_as_double": np.int64,
}  # fmt: skip


def _bits(a: Value) -> tuple[Value, int]:
    """The same bits as an unsigned number, and how many."""
    size = a.dtype.itemsize
    return a.astype(a.dtype, copy=False).view(f"u{size}"), 8 * size


def popcount(a: Value) -> Value:
    """How many bits are set: `cuda.popc`."""
    return np.bitwise_count(_bits(a)[0]).astype(np.int32)


def leading_zeros(a: Value) -> Value:
    """`cuda.clz`."""
    bits, size = _bits(a)
    for step in (1, 2, 4, 8, 16, 32):
        if step < size:
            bits = bits | (bits >> bits.dtype.type(step))
    return (size - np.bitwise_count(bits).astype(np.int32)).astype(np.int32)


def first_set(a: Value) -> Value:
    """1 + the place of the lowest bit that is set, 0 when none is: `cuda.ffs`."""
    bits, _ = _bits(a)
    lowest = bits & (~bits + bits.dtype.type(1))
    return np.where(bits == 0, 0, np.bitwise_count(lowest - bits.dtype.type(1)) + 1).astype(np.int32)[()]


def reversed_bits(a: Value) -> Value:
    """`cuda.brev`."""
    bits, size = _bits(a)
    found = np.zeros_like(bits)
    one = bits.dtype.type(1)
    for place in range(size):
        found = found | (((bits >> bits.dtype.type(place)) & one) << bits.dtype.type(size - 1 - place))
    return found


def reinterpret(a: Value, dtype: Any) -> Value:
    """`a.view(dtype)`: the same bits as another type of the same size."""
    kind = np.dtype(dtype)
    if kind.itemsize != a.dtype.itemsize:
        raise UnsupportedKernel(f".view from {a.dtype} to {kind}: their sizes differ")
    return a.view(kind)


def typed(value: Any) -> Any:
    """A Python number, or a tuple of them, as Numba types it; other things as they are."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int64(value) if -(2**63) <= value < 2**63 else np.uint64(value)
    if isinstance(value, float):
        return np.float64(value)
    return tuple(map(typed, value)) if isinstance(value, tuple) else value
