"""Attention over paged caches, and the cache write.

Owns the kernels of `attention` and `write_slots`. What always holds: keys are visited in blocks and splits counted from
position 0, and what a row may not see adds exactly nothing, so in `attention.split` a row's bits depend on its query
and on keys and values up to its position alone: not on other rows, other sequences or which pages hold the tokens.
`attention.tiles` is for prefill (more rows a tile, no splits) and promises nothing.
Sources: Dao et al., FlashAttention, 2022; Dao et al., Flash-Decoding, 2023; Kwon et al., PagedAttention, 2023.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from slotwise.backends._gpu.kernels import Scratch, aligned_size
from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.backends.cuda_triton.linear import bounded_tanh
from slotwise.backends.cuda_triton.rotary import copy_head
from slotwise.core.backend import CallSpec
from slotwise.core.specs import DType

SPLIT = 256
"""Fewest keys of one split."""

MOST_SPLITS = 32
"""A longer page table gets longer splits."""

BLOCK_N = {2: 64, 4: 16}
"""Bytes of an element -> keys that the decode side visits at a time: not in the table of configurations, as it decides
the order of sums. f32 is multiplied without tensor cores, and more keys than 16 would not fit the registers."""


@triton.jit
def sequence_of(row, row_start, sequences, BLOCK_B: tl.constexpr):
    """The sequence that owns `row`, or `sequences` when none does."""
    b = tl.arange(0, BLOCK_B)
    ends = tl.load(row_start + 1 + b, mask=b < sequences, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


@triton.jit
def attend(
    q, k_cache, v_cache, row_start, kv_len, page_table, out, part_out, part_max, part_sum,
    sequences, columns, scale, softcap,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Up to ROWS rows of one sequence, with all query heads of one kv head, over one split of the keys (or all)."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    of_row, head = m // GROUP, kv_head * GROUP + m % GROUP
    out_at = ((row + of_row).to(tl.int64) * Q_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    b = sequence_of(row, row_start, sequences, BLOCK_B)
    if b >= sequences:
        # Padding: nothing is read for it, and the result is zero.
        if SPLITS == 1:
            zero = tl.zeros((BLOCK_M, BLOCK_D), tl.float32).to(out.dtype.element_ty)
            tl.store(out + out_at, zero, mask=(m < GROUP)[:, None] & (d < HEAD_DIM)[None, :])
        return
    first, last = tl.load(row_start + b), tl.load(row_start + b + 1)
    if (row - first) % ROWS != 0:
        return  # the tile that starts at an earlier row has this one
    position = tl.load(kv_len + b) - last + row
    valid = (of_row < ROWS) & (row + of_row < last)
    newest = position + tl.minimum(ROWS, last - row) - 1
    begin, end = split * SPLIT_SIZE, newest + 1
    if SPLITS > 1:
        end = tl.minimum(begin + SPLIT_SIZE, end)
    if WINDOW > 0:
        begin = tl.maximum(begin, tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N)
    if begin >= end:
        return
    inside = valid[:, None] & (d < HEAD_DIM)[None, :]
    query = tl.load(q + out_at, mask=inside, other=0.0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        live = key < end
        page = tl.load(page_table + b * columns + key // PAGE_SIZE, mask=live, other=0)
        slot = page.to(tl.int64) * PAGE_SIZE + key % PAGE_SIZE
        at = (slot * KV_HEADS + kv_head) * HEAD_DIM
        keys = tl.load(k_cache + at[None, :] + d[:, None], mask=live[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        if CAPPED:
            scores = bounded_tanh(scores / softcap) * softcap
        seen = live[None, :] & (key[None, :] <= (position + of_row)[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > (position + of_row)[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps -inf; subtracting that from itself would make a NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(best - base)
        mass = mass * shrink + tl.sum(weights, axis=1)
        values = tl.load(v_cache + at[:, None] + d[None, :], mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        best = higher
    if SPLITS == 1:
        tl.store(out + out_at, (acc / mass[:, None]).to(out.dtype.element_ty), mask=inside)
    else:
        part = ((row + of_row).to(tl.int64) * Q_HEADS + head) * SPLITS + split
        tl.store(part_out + part[:, None] * HEAD_DIM + d[None, :], acc, mask=inside)
        tl.store(part_max + part, best, mask=valid)
        tl.store(part_sum + part, mass, mask=valid)


@triton.jit
def combine_splits(
    row_start, kv_len, out, part_out, part_max, part_sum, sequences,
    Q_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """One head of one row: its splits, first to last, as one softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    out_at = out + (row.to(tl.int64) * Q_HEADS + head) * HEAD_DIM + d
    b = sequence_of(row, row_start, sequences, BLOCK_B)
    if b >= sequences:
        tl.store(out_at, tl.zeros((BLOCK_D,), tl.float32).to(out.dtype.element_ty), mask=d < HEAD_DIM)
        return
    position = tl.load(kv_len + b) - tl.load(row_start + b + 1) + row
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(position - WINDOW + 1, 0) // SPLIT_SIZE
    part = (row.to(tl.int64) * Q_HEADS + head) * SPLITS
    best = float("-inf")
    mass = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(oldest, position // SPLIT_SIZE + 1):
        its_best = tl.load(part_max + part + split)
        higher = tl.maximum(best, its_best)
        shrink, its_share = tl.exp(best - higher), tl.exp(its_best - higher)
        values = tl.load(part_out + (part + split) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)
        acc = acc * shrink + values * its_share
        mass = mass * shrink + tl.load(part_sum + part + split) * its_share
        best = higher
    tl.store(out_at, (acc / mass).to(out.dtype.element_ty), mask=d < HEAD_DIM)


@triton.jit
def write(k, v, k_cache, v_cache, slots, width, WIDTH: tl.constexpr):
    """Row i of k and v into slot slots[i] of the caches."""
    row = tl.program_id(0).to(tl.int64) * width
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64) * width
    copy_head(k + row, k_cache + slot, width, WIDTH)
    copy_head(v + row, v_cache + slot, width, WIDTH)


def split_size(keys: int) -> int:
    """Keys of a split for a page table that holds `keys`: what a plan fixes, so the same for all its programs."""
    return max(SPLIT, int(triton.next_power_of_2(triton.cdiv(keys, MOST_SPLITS))))


def _dims(call: CallSpec) -> dict[str, int]:
    return {n: s for n, s in call.contract.match(call.inputs, call.attrs)[0].items() if isinstance(s, int)}


def _keys(call: CallSpec) -> int:
    return _dims(call)["P"] * int(call.attrs["page_size"])


def _arrays(call: CallSpec) -> tuple[int, int, int]:
    """Bytes of the splits' outputs, of their maxima (and sums), and the number of splits."""
    dims, keys = _dims(call), _keys(call)
    splits = triton.cdiv(keys, split_size(keys))
    parts = dims["T"] * dims["Hq"] * splits
    return aligned_size(parts * dims["D"] * 4), aligned_size(parts * 4), splits


def _split(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    big, small, splits = _arrays(call)
    if splits == 1:
        return (_attend(call, generation, "attention_split", 1, {}),)
    parts: dict[str, str | Scratch | None] = {
        "part_out": Scratch(0, DType.F32),
        "part_max": Scratch(big, DType.F32),
        "part_sum": Scratch(big + small, DType.F32),
    }
    first = _attend(call, generation, "attention_split", splits, parts)
    names = {p.name for p in combine_splits.params if p.is_constexpr}
    constants = {name: value for name, value in first.constants.items() if name in names}
    dims, numbers = _dims(call), {"sequences": first.numbers["sequences"]}
    chosen = configure("combine_splits", generation)
    return first, Grid(combine_splits, (dims["T"], dims["Hq"]), chosen, numbers, constants, parts)


def _tiles(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    return (_attend(call, generation, "attention_tiles", 1, {}),)


def _attend(call: CallSpec, generation: str, table: str, splits: int, parts: dict[str, str | Scratch | None]) -> Grid:
    dims, attrs = _dims(call), call.attrs
    group = dims["Hq"] // dims["Hkv"]
    facts = {"head_dim": dims["D"], "itemsize": call.dtype.itemsize, "rows": dims["T"]}
    chosen = configure(table, generation, **facts)
    tile = max(chosen.block["BLOCK_M"], triton.next_power_of_2(group))
    constants: dict[str, int | float | str | bool] = {
        **({"BLOCK_N": BLOCK_N[call.dtype.itemsize]} if table == "attention_split" else {}),
        "Q_HEADS": dims["Hq"],
        "KV_HEADS": dims["Hkv"],
        "HEAD_DIM": dims["D"],
        "BLOCK_D": max(16, triton.next_power_of_2(dims["D"])),
        "GROUP": group,
        "PAGE_SIZE": int(attrs["page_size"]),
        "WINDOW": int(attrs["window"]),
        "CAPPED": float(attrs["softcap"]) > 0,
        "SPLIT_SIZE": split_size(_keys(call)),
        "SPLITS": splits,
        "ROWS": tile // group,
        "BLOCK_B": triton.next_power_of_2(dims["B"]),
        "BLOCK_M": tile,
    }
    numbers: dict[str, int | float] = {
        "sequences": dims["B"],
        "columns": dims["P"],
        "scale": float(attrs["scale"]),
        "softcap": float(attrs["softcap"]) or 1.0,
    }
    none: dict[str, str | Scratch | None] = {"part_out": None, "part_max": None, "part_sum": None}
    return Grid(attend, (dims["T"], dims["Hkv"], splits), chosen, numbers, constants, none | parts)


def _workspace(call: CallSpec) -> int:
    big, small, splits = _arrays(call)
    return big + 2 * small if splits > 1 else 0


def _write(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    dims = _dims(call)
    width = dims["Hkv"] * dims["D"]
    constants = {"WIDTH": triton.next_power_of_2(width)}
    return (Grid(write, (dims["T"],), configure("write_slots", generation, width=width), {"width": width}, constants),)


def _refuses(call: CallSpec) -> str | None:
    dims = _dims(call)
    if dims["Hq"] % dims["Hkv"]:
        return f"{dims['Hq']} query heads cannot share {dims['Hkv']} key and value heads evenly"
    if not 16 <= dims["D"] <= 256:
        return f"it takes heads of 16 to 256 dimensions, not {dims['D']}"
    return None


KERNELS = (
    triton_kernel("write_slots", "rows", _write),
    triton_kernel("attention", "split", _split, refuses=_refuses, workspace=_workspace),
    triton_kernel("attention", "tiles", _tiles, refuses=_refuses, invariant_rows=0),
)
