"""Temperature, top-k, top-p and min-p on the device.

Owns `filter_rows`. What always holds: nothing is sorted; the k-th greatest value, and the least value that top-p keeps,
are found bit by bit (floats compare as their bits do, once the sign is turned), each bit with one pass that counts
tokens or sums their mass: in whole numbers, as core/ops/nucleus.py defines it, so no order decides what is kept. A NaN
stays what it is, so that whoever draws from the row sees it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from slotwise.core.ops import nucleus

REACH, STEPS = tl.constexpr(nucleus.REACH), tl.constexpr(nucleus.STEPS)
LOG2_E, UNIT = tl.constexpr(nucleus.LOG2_E), tl.constexpr(nucleus.UNIT)
C1, C2, C3, C4, C5 = (tl.constexpr(coefficient) for coefficient in nucleus.CURVE)
FRACTION, ONE = tl.constexpr(nucleus.FRACTION), tl.constexpr(1 << nucleus.FRACTION)
FRACTION_MASK = tl.constexpr((1 << nucleus.FRACTION) - 1)
SHARE, SLACK = tl.constexpr(nucleus.SHARE), tl.constexpr(nucleus.SLACK)
SHARE_UNITS, SHARE_MASK = tl.constexpr(2.0**nucleus.SHARE), tl.constexpr((1 << nucleus.SHARE) - 1)


@triton.jit
def ordered(values):
    """uint32 numbers that compare as the floats do; -0 and 0 are equal."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    turned = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return turned.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def row_block(scores, first, size, BLOCK: tl.constexpr):
    """A block of a row, -inf beyond its end."""
    index = first + tl.arange(0, BLOCK)
    return tl.load(scores + index, mask=index < size, other=float("-inf"))


@triton.jit
def highest_of(scores, size, BLOCK: tl.constexpr):
    """The greatest value of a row that is no NaN."""
    highest = float("-inf")
    for first in range(0, size, BLOCK):
        values = row_block(scores, first, size, BLOCK)
        highest = tl.maximum(highest, tl.max(tl.where(values == values, values, float("-inf")), axis=0))
    return highest


@triton.jit
def keep_one(logits, scores, size, BLOCK: tl.constexpr):
    """Temperature 0: zero at the first of the greatest, -inf elsewhere; NaN instead of zero for a row that has one."""
    highest = highest_of(logits, size, BLOCK)
    token = size
    broken = 0
    for first in range(0, size, BLOCK):
        values = row_block(logits, first, size, BLOCK)
        index = first + tl.arange(0, BLOCK)
        broken += tl.sum((values != values).to(tl.int32), axis=0)
        token = tl.minimum(token, tl.min(tl.where((values == highest) & (index < size), index, size), axis=0))
    mark = tl.where(broken > 0, float("nan"), highest * 0.0)
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        tl.store(scores + index, tl.where(index == token, mark, float("-inf")), mask=index < size)


@triton.jit
def count_from(scores, threshold, size, BLOCK: tl.constexpr):
    """How many values of a row are at least `threshold` (in `ordered` numbers)."""
    count = 0
    for first in range(0, size, BLOCK):
        values = row_block(scores, first, size, BLOCK)
        index = first + tl.arange(0, BLOCK)
        count += tl.sum(((ordered(values) >= threshold) & (index < size)).to(tl.int32), axis=0)
    return count


@triton.jit
def weights(distance):
    """`weights` of core/ops/nucleus.py, for scores that much less than the greatest."""
    near = distance < REACH
    exponent = (tl.where(near, distance, 0.0) * STEPS).to(tl.int64) * LOG2_E
    part = (exponent >> (56 - FRACTION)) & FRACTION_MASK
    power = C4 - ((part * C5) >> FRACTION)
    power = C3 - ((part * power) >> FRACTION)
    power = C2 - ((part * power) >> FRACTION)
    power = C1 - ((part * power) >> FRACTION)
    power = ONE - ((part * power) >> FRACTION)
    return tl.where(near, (power << (UNIT - FRACTION)) >> (exponent >> 56), 0)


@triton.jit
def wanted_mass(total, share):
    """`wanted_mass` of core/ops/nucleus.py."""
    cut = tl.maximum((share * SHARE_UNITS).to(tl.int64) - SLACK, 0)
    return tl.maximum((total >> SHARE) * cut + (((total & SHARE_MASK) * cut) >> SHARE), 1)


@triton.jit
def mass_from(scores, threshold, highest, size, BLOCK: tl.constexpr):
    """The sum of weights over values that are at least `threshold` (in `ordered` numbers)."""
    mass = tl.full((), 0, tl.int64)
    for first in range(0, size, BLOCK):
        values = row_block(scores, first, size, BLOCK)
        mass += tl.sum(tl.where(ordered(values) >= threshold, weights(highest - values), 0), axis=0)
    return mass


@triton.jit
def limit_count(scores, keep, size, BLOCK: tl.constexpr):
    """Top-k: what is less than the k-th greatest becomes -inf."""
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = threshold | bit
        threshold = tl.where(count_from(scores, candidate, size, BLOCK) >= keep, candidate, threshold)
        bit = bit >> 1
    for first in range(0, size, BLOCK):
        values = row_block(scores, first, size, BLOCK)
        index = first + tl.arange(0, BLOCK)
        kept = (ordered(values) >= threshold) | (values != values)
        tl.store(scores + index, tl.where(kept, values, float("-inf")), mask=index < size)


@triton.jit
def limit_mass(scores, highest, share, size, BLOCK: tl.constexpr):
    """Top-p: what stands after the wanted mass becomes -inf; of equals the lower tokens stand first."""
    wanted = wanted_mass(mass_from(scores, tl.full((), 0, tl.uint32), highest, size, BLOCK), share)
    last = tl.full((), 0, tl.uint32)  # the greatest number from which on the mass is what is wanted
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        candidate = last | bit
        last = tl.where(mass_from(scores, candidate, highest, size, BLOCK) >= wanted, candidate, last)
        bit = bit >> 1
    above = mass_from(scores, last + 1, highest, size, BLOCK)
    for first in range(0, size, BLOCK):
        values = row_block(scores, first, size, BLOCK)
        index = first + tl.arange(0, BLOCK)
        number = ordered(values)
        mass = tl.where(number == last, weights(highest - values), 0)
        before = above + tl.cumsum(mass, axis=0) - mass
        kept = (number > last) | ((number == last) & (before < wanted)) | (values != values)
        tl.store(scores + index, tl.where(kept, values, float("-inf")), mask=index < size)
        above += tl.sum(mass, axis=0)


@triton.jit
def filter_rows(logits, temperature, top_k, top_p, min_p, scores, size, BLOCK: tl.constexpr):
    """The scores of one row."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * size
    scores += row.to(tl.int64) * size
    heat = tl.load(temperature + row)
    if heat == 0.0:
        keep_one(logits, scores, size, BLOCK)
    else:
        for first in range(0, size, BLOCK):
            values = row_block(logits, first, size, BLOCK)
            index = first + tl.arange(0, BLOCK)
            tl.store(scores + index, tl.div_rn(values, heat + tl.zeros_like(values)), mask=index < size)
        tl.debug_barrier()  # from here on, threads read what others wrote
        highest = highest_of(scores, size, BLOCK)
        keep, share, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        if (keep > 0) & (keep < size):
            limit_count(scores, keep, size, BLOCK)
            tl.debug_barrier()
        if share < 1.0:
            limit_mass(scores, highest, share, size, BLOCK)
            tl.debug_barrier()
        if least > 0.0:
            floor = highest + tl.log(least)
            for first in range(0, size, BLOCK):
                values = row_block(scores, first, size, BLOCK)
                index = first + tl.arange(0, BLOCK)
                tl.store(scores + index, tl.where(values < floor, float("-inf"), values), mask=index < size)
