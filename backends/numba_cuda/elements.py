"""Elements of tensors in kernels: one at a time, or packs of eight by 16-byte accesses, as float32.

Owns `elements_of` and the arithmetic of packs. What always holds: bf16 and fp16 arrive as uint16 arrays and are
converted here and nowhere else, rounding to nearest even; a pack is a tuple of eight float32; where an array's rows are
no multiple of eight elements, or its memory is not aligned to 16 bytes, a pack is read element by element and what lies
beyond its row is zero.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda import assembly
from slotwise.backends.numba_cuda.simulator import intrinsic
from slotwise.core.specs import DType

PACK = 8
"""Elements of a pack."""

ARRAYS = {
    DType.F32: np.float32,
    DType.F16: np.uint16,
    DType.BF16: np.uint16,
    DType.I32: np.int32,
    DType.I64: np.int64,
    DType.BOOL: np.uint8,
    DType.I8: np.uint8,
    DType.U8: np.uint8,
}
"""What a tensor of each dtype is to a kernel."""

ZERO = np.float32(0)
NONE = (ZERO,) * PACK
"""A pack of zeros."""
f32 = np.float32


def of_bf16(bits):
    """float32 of bf16 bits, as numpy arrays."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(value):
    """bf16 bits of float32, to nearest even, as numpy arrays."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def of_f16(bits):
    """float32 of fp16 bits, as numpy arrays."""
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def f16_bits(value):
    """fp16 bits of float32, to nearest even, as numpy arrays."""
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float32).astype(np.float16).view(np.uint16)


@intrinsic(numba=assembly.widen_bf16)
def widen_bf16(active, bits):
    """The float32 that has these bf16 bits as its upper half."""
    return of_bf16(np.asarray(bits, np.uint16))


@intrinsic(numba=assembly.round_bf16)
def round_bf16(active, value):
    """The bits of the bf16 nearest to `value`, of two the even one; 0x7FFF for a NaN (PTX: `cvt.rn.bf16.f32`)."""
    return bf16_bits(value)


@intrinsic(numba=assembly.widen_f16)
def widen_f16(active, bits):
    """The float32 equal to the fp16 with these bits."""
    return of_f16(bits)


@intrinsic(numba=assembly.round_f16)
def round_f16(active, value):
    """The bits of the fp16 nearest to `value`, of two the even one (PTX: `cvt.rn.f16.f32`)."""
    return f16_bits(value)


@intrinsic(numba=assembly.bits_of)
def bits_of(active, value):
    """The bits of a float32, as a signed number."""
    return np.ascontiguousarray(value, np.float32).view(np.int32).astype(np.int64)


@intrinsic(numba=assembly.load_8_bf16, memory="r")
def load_8_bf16(active, array, index):
    """Eight bf16 by one 16-byte load, as float32."""
    return tuple(of_bf16(part) for part in active.load_vector(array, index, PACK))


@intrinsic(numba=assembly.load_8_f16, memory="r")
def load_8_f16(active, array, index):
    """Eight fp16 by one 16-byte load, as float32."""
    return tuple(of_f16(part) for part in active.load_vector(array, index, PACK))


@intrinsic(numba=assembly.load_8_f32, memory="r")
def load_8_f32(active, array, index):
    """Eight float32 by two 16-byte loads."""
    return (*active.load_vector(array, index, 4), *active.load_vector(array, index + 4, 4))


@intrinsic(numba=assembly.load_words, memory="r")
def load_words(active, array, index):
    """16 bytes of a uint16 or uint8 array as four uint32 words, the earlier element in the lower bits."""
    parts = active.load_vector(array, index, 16 // array.itemsize)
    return tuple(np.ascontiguousarray(np.stack(parts, -1)).view(np.uint32).T)


def _bytes_of(word):
    """The four bytes of a uint32, lowest first, as numpy arrays."""
    return tuple((np.asarray(word, np.uint32) >> np.uint32(shift)) & np.uint32(255) for shift in (0, 8, 16, 24))


@intrinsic(numba=assembly.signed_codes)
def signed_codes(active, word):
    """A word's four bytes, lowest first, as signed numbers in float32."""
    return tuple(part.astype(np.uint8).view(np.int8).astype(np.float32) for part in _bytes_of(word))


@intrinsic(numba=assembly.low_codes)
def low_codes(active, word):
    """The lower halves of a word's four bytes, lowest byte first, as float32: 0 to 15."""
    return tuple((part & np.uint32(15)).astype(np.float32) for part in _bytes_of(word))


@intrinsic(numba=assembly.high_codes)
def high_codes(active, word):
    """The upper halves of a word's four bytes, lowest byte first, as float32: 0 to 15."""
    return tuple((part >> np.uint32(4)).astype(np.float32) for part in _bytes_of(word))


@intrinsic(numba=assembly.store_8_bf16, memory="w")
def store_8_bf16(active, array, index, v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight float32 rounded to bf16, by one 16-byte store."""
    active.store_vector(array, index, tuple(bf16_bits(v) for v in (v0, v1, v2, v3, v4, v5, v6, v7)))


@intrinsic(numba=assembly.store_8_f16, memory="w")
def store_8_f16(active, array, index, v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight float32 rounded to fp16, by one 16-byte store."""
    active.store_vector(array, index, tuple(f16_bits(v) for v in (v0, v1, v2, v3, v4, v5, v6, v7)))


@intrinsic(numba=assembly.store_8_f32, memory="w")
def store_8_f32(active, array, index, v0, v1, v2, v3, v4, v5, v6, v7):
    """Eight float32 by two 16-byte stores."""
    active.store_vector(array, index, (v0, v1, v2, v3))
    active.store_vector(array, index + 4, (v4, v5, v6, v7))


@dataclass(frozen=True, slots=True)
class Elements:
    """How a kernel reads and writes a tensor of one dtype.

    `widen(raw)` is an element's float32, `narrow(value)` its raw form rounded, `rounded(value)` the float32 that is
    left after rounding. `load(array, index, left)` is the pack at `index`, of which `left` elements are in its row;
    `store(array, index, left, pack)` puts it there.
    """

    widen: Any
    narrow: Any
    rounded: Any
    load: Any
    store: Any


@functools.cache
def elements_of(dtype: DType, vector: bool) -> Elements:
    """The elements of tensors of `dtype`; `vector` where packs are whole and aligned to 16 bytes."""
    if dtype is DType.F32:
        widen, narrow, rounded = _same, _same, _same
        load_8, store_8 = load_8_f32, store_8_f32
    else:
        widen, narrow = (widen_bf16, round_bf16) if dtype is DType.BF16 else (widen_f16, round_f16)
        load_8, store_8 = (load_8_bf16, store_8_bf16) if dtype is DType.BF16 else (load_8_f16, store_8_f16)

        def rounded(value):
            return widen(narrow(value))

    if vector:

        def load(array, index, left):
            return load_8(array, index)

        def store(array, index, left, pack):
            store_8(array, index, pack[0], pack[1], pack[2], pack[3], pack[4], pack[5], pack[6], pack[7])

    else:

        def load(array, index, left):
            return (
                widen(array[index]) if left > 0 else ZERO,
                widen(array[index + 1]) if left > 1 else ZERO,
                widen(array[index + 2]) if left > 2 else ZERO,
                widen(array[index + 3]) if left > 3 else ZERO,
                widen(array[index + 4]) if left > 4 else ZERO,
                widen(array[index + 5]) if left > 5 else ZERO,
                widen(array[index + 6]) if left > 6 else ZERO,
                widen(array[index + 7]) if left > 7 else ZERO,
            )

        def store(array, index, left, pack):
            if left > 0:
                array[index] = narrow(pack[0])
            if left > 1:
                array[index + 1] = narrow(pack[1])
            if left > 2:
                array[index + 2] = narrow(pack[2])
            if left > 3:
                array[index + 3] = narrow(pack[3])
            if left > 4:
                array[index + 4] = narrow(pack[4])
            if left > 5:
                array[index + 5] = narrow(pack[5])
            if left > 6:
                array[index + 6] = narrow(pack[6])
            if left > 7:
                array[index + 7] = narrow(pack[7])

    return Elements(widen, narrow, rounded, load, store)


def _same(value):
    return value


def dot(total, a, b):
    """`total` plus the products of two packs' elements, first to last."""
    total += a[0] * b[0]
    total += a[1] * b[1]
    total += a[2] * b[2]
    total += a[3] * b[3]
    total += a[4] * b[4]
    total += a[5] * b[5]
    total += a[6] * b[6]
    total += a[7] * b[7]
    return total


def add(a, b):
    """The sums of two packs' elements."""
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3], a[4] + b[4], a[5] + b[5], a[6] + b[6], a[7] + b[7])


def multiply(a, b):
    """The products of two packs' elements."""
    return (a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3], a[4] * b[4], a[5] * b[5], a[6] * b[6], a[7] * b[7])


def scale(a, s):
    """A pack times a number."""
    return (a[0] * s, a[1] * s, a[2] * s, a[3] * s, a[4] * s, a[5] * s, a[6] * s, a[7] * s)


def shift(a, s):
    """A pack plus a number."""
    return (a[0] + s, a[1] + s, a[2] + s, a[3] + s, a[4] + s, a[5] + s, a[6] + s, a[7] + s)


def keep(array, place, pack):
    """Put a pack into row `place` of a thread's own array."""
    array[place, 0] = pack[0]
    array[place, 1] = pack[1]
    array[place, 2] = pack[2]
    array[place, 3] = pack[3]
    array[place, 4] = pack[4]
    array[place, 5] = pack[5]
    array[place, 6] = pack[6]
    array[place, 7] = pack[7]


def share(array, index, pack):
    """Put a pack at `index` of a flat float32 array."""
    array[index] = pack[0]
    array[index + 1] = pack[1]
    array[index + 2] = pack[2]
    array[index + 3] = pack[3]
    array[index + 4] = pack[4]
    array[index + 5] = pack[5]
    array[index + 6] = pack[6]
    array[index + 7] = pack[7]


def kept(array, place):
    """The pack in row `place` of a thread's own array."""
    return (
        array[place, 0],
        array[place, 1],
        array[place, 2],
        array[place, 3],
        array[place, 4],
        array[place, 5],
        array[place, 6],
        array[place, 7],
    )


@functools.cache
def each(function: Any) -> Any:
    """The function on packs that applies `function` to each element."""

    def applied(a):
        return (
            function(a[0]),
            function(a[1]),
            function(a[2]),
            function(a[3]),
            function(a[4]),
            function(a[5]),
            function(a[6]),
            function(a[7]),
        )

    return applied
