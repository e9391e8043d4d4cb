"""Temperature, top-k, top-p and min-p on the device.

Owns the kernel `filter_rows`. What always holds: nothing is sorted; the k-th greatest value, and the least value that
top-p keeps, are found bit by bit (floats compare as their bits do, once the sign is turned), each bit with one pass
that counts tokens or sums their mass: in whole numbers, as core/ops/nucleus.py defines it, so no order decides what is
kept. A block does a row. A NaN stays what it is, so that whoever draws from the row sees it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.blocks import LEAST, NOWHERE, WARP, ZERO, block_best, block_max, block_sum
from slotwise.backends.numba_cuda.elements import bits_of
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.core.ops.nucleus import CURVE, FRACTION, LOG2_E, REACH, SHARE, SLACK, STEPS, UNIT

THREADS = 1024
WARPS = THREADS // WARP
TOP_BIT = 0x80000000
ONE = np.float32(1)
NAN = np.float32(np.nan)
NEAR, STEP, SHARE_UNITS = np.float32(REACH), np.float32(STEPS), np.float32(2.0**SHARE)
C1, C2, C3, C4, C5 = CURVE
WHOLE, FRACTION_MASK, SHARE_MASK = 1 << FRACTION, (1 << FRACTION) - 1, (1 << SHARE) - 1

total_count = block_sum(THREADS, whole=True)
highest_of_block = block_max(THREADS)
best_of_block = block_best(THREADS)


@device
def ordered(value):
    """A whole number from 0 to 2**32 that compares as the float does; -0 and 0 are equal."""
    bits = bits_of(ZERO if value == ZERO else value)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) + TOP_BIT


@device
def count_from(scores, row, size, threshold, counts):
    """How many values of a row are at least `threshold`, in `ordered` numbers."""
    count = np.int64(0)
    for token in range(cuda.threadIdx.x, size, THREADS):
        if ordered(scores[row + token]) >= threshold:
            count += 1
    return total_count(count, counts)


@device
def weight_of(distance):
    """`weights` of core/ops/nucleus.py, for a score that much less than the greatest."""
    if not distance < NEAR:
        return np.int64(0)
    exponent = np.int64(distance * STEP) * LOG2_E
    part = (exponent >> (56 - FRACTION)) & FRACTION_MASK
    power = C4 - ((part * C5) >> FRACTION)
    power = C3 - ((part * power) >> FRACTION)
    power = C2 - ((part * power) >> FRACTION)
    power = C1 - ((part * power) >> FRACTION)
    power = WHOLE - ((part * power) >> FRACTION)
    return (power << (UNIT - FRACTION)) >> (exponent >> 56)


@device
def wanted_mass(total, share):
    """`wanted_mass` of core/ops/nucleus.py."""
    cut = max(np.int64(share * SHARE_UNITS) - SLACK, np.int64(0))
    return max((total >> SHARE) * cut + (((total & SHARE_MASK) * cut) >> SHARE), np.int64(1))


@device
def mass_from(scores, row, size, threshold, highest, counts):
    """The sum of weights over values that are at least `threshold`, in `ordered` numbers."""
    mass = np.int64(0)
    for token in range(cuda.threadIdx.x, size, THREADS):
        value = scores[row + token]
        if ordered(value) >= threshold:
            mass += weight_of(highest - value)
    return total_count(mass, counts)


@device
def keep_one(logits, scores, row, size, sums, counts):
    """Temperature 0: zero at the first of the greatest, -inf elsewhere; NaN instead of zero for a row that has one."""
    best = LEAST
    token = np.int64(NOWHERE)
    broken = np.int64(0)
    for place in range(cuda.threadIdx.x, size, THREADS):
        value = logits[row + place]
        if value != value:
            broken += 1
        elif value > best or token == NOWHERE:
            best = value
            token = np.int64(place)
    best, token = best_of_block(best, token, sums, counts)
    broken = total_count(broken, counts)
    mark = NAN if broken > 0 else best * ZERO
    for place in range(cuda.threadIdx.x, size, THREADS):
        scores[row + place] = mark if place == token else LEAST


@device
def limit_count(scores, row, size, keep, counts):
    """Top-k: what is less than the k-th greatest becomes -inf."""
    threshold = np.int64(0)
    bit = np.int64(TOP_BIT)
    for _ in range(32):
        if count_from(scores, row, size, threshold | bit, counts) >= keep:
            threshold |= bit
        bit >>= 1
    for token in range(cuda.threadIdx.x, size, THREADS):
        value = scores[row + token]
        if value == value and ordered(value) < threshold:
            scores[row + token] = LEAST


@device
def equals_before(equal, counts):
    """Of the block's earlier threads, how many have `equal` set; and how many threads have in all."""
    votes = cuda.ballot_sync(0xFFFFFFFF, equal)
    thread = cuda.threadIdx.x
    lane = thread % WARP
    before = np.int64(cuda.popc(votes & ((1 << lane) - 1)))
    if lane == 0:
        counts[thread // WARP] = cuda.popc(votes)
    cuda.syncthreads()
    in_all = np.int64(0)
    for warp in range(WARPS):
        if warp < thread // WARP:
            before += counts[warp]
        in_all += counts[warp]
    cuda.syncthreads()
    return before, in_all


@device
def limit_mass(scores, row, size, highest, share, counts):
    """Top-p: what stands after the wanted mass becomes -inf; of equals the lower tokens stand first."""
    wanted = wanted_mass(mass_from(scores, row, size, 0, highest, counts), share)
    last = np.int64(0)  # the greatest number from which on the mass is what is wanted
    bit = np.int64(TOP_BIT)
    for _ in range(32):
        if mass_from(scores, row, size, last | bit, highest, counts) >= wanted:
            last |= bit
        bit >>= 1
    above = mass_from(scores, row, size, last + 1, highest, counts)
    equals = np.int64(0)
    for start in range(0, size, THREADS):
        token = start + cuda.threadIdx.x
        value = scores[row + token] if token < size else NAN
        number = ordered(value)
        equal = value == value and number == last
        before, more = equals_before(equal, counts)
        fits = above + (equals + before) * weight_of(highest - value) < wanted
        if value == value and not (number > last or (equal and fits)):
            scores[row + token] = LEAST
        equals += more


@functools.cache
def filter_rows() -> Any:
    """The scores of a row, a block each."""

    @kernel
    def filter_rows(logits, temperature, top_k, top_p, min_p, scores, size):
        sums = cuda.shared.array(WARPS, np.float32)
        counts = cuda.shared.array(WARPS, np.int64)
        at = cuda.blockIdx.x
        row = at * size
        heat = temperature[at]
        if heat == ZERO:
            keep_one(logits, scores, row, size, sums, counts)
        else:
            highest = LEAST
            for token in range(cuda.threadIdx.x, size, THREADS):
                value = logits[row + token] / heat
                scores[row + token] = value
                if value > highest:
                    highest = value
            highest = highest_of_block(highest, sums)
            keep = top_k[at]
            if keep > 0 and keep < size:
                limit_count(scores, row, size, keep, counts)
            if top_p[at] < ONE:
                limit_mass(scores, row, size, highest, top_p[at], counts)
            if min_p[at] > ZERO:
                floor = highest + math.log(min_p[at])
                for token in range(cuda.threadIdx.x, size, THREADS):
                    if scores[row + token] < floor:
                        scores[row + token] = LEAST

    return filter_rows
