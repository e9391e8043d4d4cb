"""Ragged paged attention for decode and verification, and cache writes.

Owns the kernels of `write_slots` and `attention`. What always holds: a block does one row with up to four query heads
of one kv head, over one split of the keys; splits have a size that the page table's width alone decides, keys go to
groups of lanes by their place in the row's own span, and all is summed in that order, so a row's bits are its own.
`attention.tiles` is for prefill (`attention_tiles.py`) and promises nothing.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends._gpu.kernels import Scratch, aligned_size
from slotwise.backends.numba_cuda.activation import bounded_tanh
from slotwise.backends.numba_cuda.attention_shape import Shape, sequence_of
from slotwise.backends.numba_cuda.attention_tiles import THREADS as TILE_THREADS
from slotwise.backends.numba_cuda.attention_tiles import attend_tiles, parts_for
from slotwise.backends.numba_cuda.blocks import LEAST, WARP, ZERO, lane_sum, team_max, team_sum
from slotwise.backends.numba_cuda.elements import NONE, PACK, add, dot, each, elements_of, keep, kept, share
from slotwise.backends.numba_cuda.elements import scale as times
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel, dims_of
from slotwise.backends.numba_cuda.rotary import is_last_writer
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.backends.numba_cuda.tensor_cores import HALVES
from slotwise.core.backend import CallSpec
from slotwise.core.errors import BackendError
from slotwise.core.specs import DType

SPLIT = 256
"""Fewest keys of one split."""

MOST_SPLITS = 32
"""A longer page table gets longer splits."""

THREADS = 128
WARPS = THREADS // WARP


@device
def raise_to(best, score):
    """The new greatest score, and what sums taken under the old one are multiplied by."""
    higher = score if score > best else best
    # Nothing seen yet: -inf minus itself would be a NaN.
    shrink = ZERO if best == LEAST else math.exp(best - higher)
    return higher, shrink


@functools.cache
def attend(shape: Shape, splits: int) -> Any:
    """One row, query heads of one kv head, one split of the keys."""
    of = elements_of(shape.dtype, shape.vector)
    load, narrow = of.load, of.narrow
    heads, lanes, head_dim = shape.heads, shape.lanes, shape.head_dim
    blocks = shape.group // heads  # that share a kv head
    q_heads, kv_heads, page_size, window = shape.q_heads, shape.kv_heads, shape.page_size, shape.window
    summed, capped = lane_sum(lanes), shape.capped
    teams = THREADS // lanes  # groups of lanes, each with keys of its own
    breadth = lanes * PACK
    size_of_outs = WARPS * breadth
    among_sum, among_max = team_sum(lanes), team_max(lanes)
    among_sums = each(among_sum)

    @kernel
    def attend(
        q, k_cache, v_cache, row_start, kv_len, page_table, out, part_out, part_max, part_sum,
        sequences, columns, size, scale, softcap,
    ):  # fmt: skip
        outs = cuda.shared.array(size_of_outs, np.float32)
        highs = cuda.shared.array(WARPS, np.float32)
        masses = cuda.shared.array(WARPS, np.float32)
        queries = cuda.local.array((heads, PACK), np.float32)
        acc = cuda.local.array((heads, PACK), np.float32)
        best = cuda.local.array(heads, np.float32)
        mass = cuda.local.array(heads, np.float32)
        row = cuda.blockIdx.x
        kv_head = cuda.blockIdx.y // blocks
        split = cuda.blockIdx.z
        thread = cuda.threadIdx.x
        team = thread // lanes
        d = thread % lanes * PACK
        first_head = row * q_heads + cuda.blockIdx.y * heads
        b = sequence_of(row, row_start, sequences)
        begin, end = np.int64(0), np.int64(0)
        if b < sequences:
            position = np.int64(kv_len[b]) - row_start[b + 1] + row
            begin = np.int64(split * size)
            end = min(begin + size, position + 1)
            if window > 0:
                begin = max(begin, position - window + 1)
        elif splits == 1:
            # Padding: nothing is read for it, and the result is zero.
            for at in range(thread, heads * head_dim, THREADS):
                out[first_head * head_dim + at] = narrow(ZERO)
        if begin < end:
            for j in range(heads):
                best[j] = LEAST
                mass[j] = ZERO
                values = load(q, (first_head + j) * head_dim + d, head_dim - d) if d < head_dim else NONE
                keep(queries, j, times(values, scale))
                keep(acc, j, NONE)
            for start in range(begin, end, teams):
                key = start + team
                live = key < end and d < head_dim
                keys = NONE
                values = NONE
                if live:
                    slot = page_table[b * columns + key // page_size] * page_size + key % page_size
                    at = (slot * kv_heads + kv_head) * head_dim + d
                    keys = load(k_cache, at, head_dim - d)
                    values = load(v_cache, at, head_dim - d)
                for j in range(heads):
                    score = summed(dot(ZERO, kept(queries, j), keys))
                    if capped:
                        score = bounded_tanh(score / softcap) * softcap
                    if key < end:
                        higher, shrink = raise_to(best[j], score)
                        weight = math.exp(score - higher)
                        best[j] = higher
                        mass[j] = mass[j] * shrink + weight
                        keep(acc, j, add(times(kept(acc, j), shrink), times(values, weight)))
            for j in range(heads):
                # Teams of a warp first, by shuffles; then warp after warp.
                highest = among_max(best[j])
                shrink = ZERO if best[j] == LEAST else math.exp(best[j] - highest)
                total = among_sum(mass[j] * shrink)
                values = among_sums(times(kept(acc, j), shrink))
                if thread % WARP < lanes:
                    share(outs, thread // WARP * breadth + d, values)
                    if d == 0:
                        highs[thread // WARP] = highest
                        masses[thread // WARP] = total
                cuda.syncthreads()
                highest = LEAST
                for warp in range(WARPS):
                    highest = highs[warp] if highs[warp] > highest else highest
                total = ZERO
                for warp in range(WARPS):
                    total += masses[warp] * math.exp(highs[warp] - highest)
                part = (first_head + j) * splits + split
                for at in range(thread, head_dim, THREADS):
                    value = ZERO
                    for warp in range(WARPS):
                        value += outs[warp * breadth + at] * math.exp(highs[warp] - highest)
                    if splits == 1:
                        out[(first_head + j) * head_dim + at] = narrow(value / total)
                    else:
                        part_out[part * head_dim + at] = value
                if splits > 1 and thread == 0:
                    part_max[part] = highest
                    part_sum[part] = total
                cuda.syncthreads()

    return attend


@functools.cache
def combine_splits(shape: Shape, splits: int) -> Any:
    """One head of one row: its splits, first to last, as one softmax."""
    narrow = elements_of(shape.dtype, False).narrow
    head_dim, q_heads, window = shape.head_dim, shape.q_heads, shape.window

    @kernel
    def combine_splits(row_start, kv_len, out, part_out, part_max, part_sum, sequences, size):
        row = cuda.blockIdx.x
        head = row * q_heads + cuda.blockIdx.y
        b = sequence_of(row, row_start, sequences)
        if b < sequences:
            position = np.int64(kv_len[b]) - row_start[b + 1] + row
            oldest = max(position - window + 1, 0) // size if window > 0 else np.int64(0)
            newest = position // size
            highest = LEAST
            for split in range(oldest, newest + 1):
                its = part_max[head * splits + split]
                highest = its if its > highest else highest
            total = ZERO
            for split in range(oldest, newest + 1):
                total += part_sum[head * splits + split] * math.exp(part_max[head * splits + split] - highest)
            for d in range(cuda.threadIdx.x, head_dim, THREADS):
                value = ZERO
                for split in range(oldest, newest + 1):
                    part = head * splits + split
                    value += part_out[part * head_dim + d] * math.exp(part_max[part] - highest)
                out[head * head_dim + d] = narrow(value / total)
        else:
            for d in range(cuda.threadIdx.x, head_dim, THREADS):
                out[head * head_dim + d] = narrow(ZERO)

    return combine_splits


@functools.cache
def write(vector: bool, dtype: DType, width: int) -> Any:
    """Row i of k and v into slot `slots[i]` of the caches, a pack a thread."""
    of = elements_of(dtype, vector)
    load, store = of.load, of.store

    @kernel
    def write(k, v, k_cache, v_cache, slots, rows):
        row = cuda.blockIdx.x
        at = (cuda.blockIdx.y * cuda.blockDim.x + cuda.threadIdx.x) * PACK
        writes = is_last_writer(slots, row, rows)
        if at < width and writes:
            left = width - at
            source = row * width + at
            target = slots[row] * width + at
            store(k_cache, target, left, load(k, source, left))
            store(v_cache, target, left, load(v, source, left))

    return write


def split_size(keys: int) -> int:
    """Keys of a split for a page table that holds `keys`: what a plan fixes, so the same for all its programs."""
    return max(SPLIT, 1 << max(0, math.ceil(keys / MOST_SPLITS) - 1).bit_length())


def shape_of(call: CallSpec, aligned: bool) -> Shape:
    """What the call fixes at compile time."""
    dims, attrs = dims_of(call), call.attrs
    return Shape(
        call.dtype,
        dims["Hq"],
        dims["Hkv"],
        dims["D"],
        int(attrs["page_size"]),
        int(attrs["window"]),
        float(attrs["softcap"]) > 0,
        aligned and dims["D"] % PACK == 0,
    )


def numbers_of(call: CallSpec) -> tuple[int | float, ...]:
    """Sequences, columns of the page table, keys of a split, scale and soft cap."""
    dims, attrs = dims_of(call), call.attrs
    softcap = float(attrs["softcap"]) or 1.0
    return dims["B"], dims["P"], split_size(_keys(call)), float(attrs["scale"]), softcap


def _keys(call: CallSpec) -> int:
    return dims_of(call)["P"] * int(call.attrs["page_size"])


def _arrays(call: CallSpec) -> tuple[int, int, int]:
    """Bytes of the splits' outputs, of their maxima (and sums), and the number of splits."""
    dims, keys = dims_of(call), _keys(call)
    splits = math.ceil(keys / split_size(keys))
    parts = dims["T"] * dims["Hq"] * splits
    return aligned_size(parts * dims["D"] * 4), aligned_size(parts * 4), splits


def _split(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    dims, shape, numbers = dims_of(call), shape_of(call, aligned), numbers_of(call)
    big, small, splits = _arrays(call)
    inputs = ("q", "k_cache", "v_cache", "row_start", "kv_len", "page_table", "out")
    grid = (dims["T"], dims["Hq"] // shape.heads, splits)
    if splits == 1:
        # Nothing is written in parts: an int32 array that is read anyway stands in for each.
        return (Grid(attend(shape, 1), grid, THREADS, (*inputs, "kv_len", "kv_len", "kv_len", *numbers)),)
    parts = (Scratch(0, DType.F32), Scratch(big, DType.F32), Scratch(big + small, DType.F32))
    sequences, _, size, *_ = numbers
    return (
        Grid(attend(shape, splits), grid, THREADS, (*inputs, *parts, *numbers)),
        Grid(
            combine_splits(shape, splits),
            (dims["T"], dims["Hq"]),
            min(THREADS, math.ceil(dims["D"] / WARP) * WARP),
            ("row_start", "kv_len", "out", *parts, sequences, size),
        ),
    )


def _tiles(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    dims, shape = dims_of(call), shape_of(call, aligned)
    if not shape.vector:
        # Copies into shared memory are of 16 bytes: tensors that start elsewhere take the other way.
        raise BackendError("attention.tiles needs tensors that start at a multiple of 16 bytes; take attention.split")
    sequences, columns, _, scale, softcap = numbers_of(call)
    inputs = ("q", "k_cache", "v_cache", "row_start", "kv_len", "page_table", "out")
    made = attend_tiles(shape)
    grid = (dims["T"], dims["Hq"], parts_for(dims["D"]))
    return (Grid(made, grid, TILE_THREADS, (*inputs, sequences, columns, scale / softcap, softcap)),)


def _refuses_tiles(call: CallSpec) -> str | None:
    if call.dtype not in HALVES:
        return f"tensor cores multiply bf16 and fp16, not {call.dtype.value}"
    if dims_of(call)["D"] % PACK:
        return f"it copies 16 bytes at a time, and a head of {dims_of(call)['D']} has a rest"
    return refuses(call)


def _workspace(call: CallSpec) -> int:
    big, small, splits = _arrays(call)
    return big + 2 * small if splits > 1 else 0


def _write(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    dims = dims_of(call)
    width = dims["Hkv"] * dims["D"]
    made = write(aligned and width % PACK == 0, call.dtype, width)
    grid = (dims["T"], math.ceil(width / (THREADS * PACK)))
    return (Grid(made, grid, THREADS, ("k", "v", "k_cache", "v_cache", "slots", dims["T"])),)


def refuses(call: CallSpec) -> str | None:
    """Why attention cannot take the call."""
    dims = dims_of(call)
    if dims["Hq"] % dims["Hkv"]:
        return f"{dims['Hq']} query heads cannot share {dims['Hkv']} key and value heads evenly"
    if not 16 <= dims["D"] <= 256:
        return f"it takes heads of 16 to 256 dimensions, not {dims['D']}"
    return None


KERNELS = (
    cuda_kernel("write_slots", "rows", _write),
    cuda_kernel("attention", "split", _split, refuses=refuses, workspace=_workspace),
    cuda_kernel("attention", "tiles", _tiles, refuses=_refuses_tiles, invariant_rows=0),
)
