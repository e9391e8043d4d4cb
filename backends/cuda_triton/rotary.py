"""Rotary position embedding, alone and fused with the cache write, and the cache write alone.

Owns the kernels of `rotary` and `rotary_write`. What always holds: a program rotates one head of one row, element by
element in float32, and rounds once; a value is copied. Rows that share a slot (padding, in the scratch page) may write
in any order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.core.backend import CallSpec


@triton.jit
def rotate_head(
    source, target, cos, sin, position, width, HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, REST: tl.constexpr
):
    """target = source rotated to `position`: dimension i pairs with i + width; beyond 2 width it is copied."""
    i = tl.arange(0, BLOCK_W)
    inside = i < width
    c = tl.load(cos + position * width + i, mask=inside, other=0.0)
    s = tl.load(sin + position * width + i, mask=inside, other=0.0)
    first = tl.load(source + i, mask=inside, other=0.0)
    second = tl.load(source + width + i, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    tl.store(target + i, (a * c - b * s).to(first.dtype), mask=inside)
    tl.store(target + width + i, (b * c + a * s).to(first.dtype), mask=inside)
    if REST > 0:
        copy_head(source + 2 * width, target + 2 * width, HEAD_DIM - 2 * width, REST)


@triton.jit
def copy_head(source, target, size, BLOCK: tl.constexpr):
    """target = source, `size` elements."""
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, mask=i < size), mask=i < size)


@triton.jit
def rotate(
    q, k, positions, cos, sin, rotated_q, rotated_k, width,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one row of q or k."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    if head < Q_HEADS:
        at = (row.to(tl.int64) * Q_HEADS + head) * HEAD_DIM
        rotate_head(q + at, rotated_q + at, cos, sin, position, width, HEAD_DIM, BLOCK_W, REST)
    else:
        at = (row.to(tl.int64) * KV_HEADS + head - Q_HEADS) * HEAD_DIM
        rotate_head(k + at, rotated_k + at, cos, sin, position, width, HEAD_DIM, BLOCK_W, REST)


@triton.jit
def rotate_and_write(
    q, k, v, positions, cos, sin, k_cache, v_cache, slots, rotated_q, width,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_W: tl.constexpr, REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rotate one head of q, or rotate one of k or copy one of v into the row's slot."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if head < Q_HEADS:
        at = (row.to(tl.int64) * Q_HEADS + head) * HEAD_DIM
        rotate_head(q + at, rotated_q + at, cos, sin, position, width, HEAD_DIM, BLOCK_W, REST)
    else:
        kv_head = (head - Q_HEADS) % KV_HEADS
        source = (row.to(tl.int64) * KV_HEADS + kv_head) * HEAD_DIM
        target = (slot * KV_HEADS + kv_head) * HEAD_DIM
        if head < Q_HEADS + KV_HEADS:
            rotate_head(k + source, k_cache + target, cos, sin, position, width, HEAD_DIM, BLOCK_W, REST)
        else:
            copy_head(v + source, v_cache + target, HEAD_DIM, BLOCK_D)


def _rotary(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    dims = {name: int(size) for name, size in call.contract.match(call.inputs, call.attrs)[0].items()}
    rest, writes = dims["D"] - 2 * dims["W"], call.op == "rotary_write"
    constants = {
        "Q_HEADS": dims["Hq"],
        "KV_HEADS": dims["Hkv"],
        "HEAD_DIM": dims["D"],
        "BLOCK_W": triton.next_power_of_2(dims["W"]),
        "REST": triton.next_power_of_2(rest) if rest else 0,
    }
    if writes:
        constants["BLOCK_D"] = triton.next_power_of_2(dims["D"])
    grid = (dims["T"], dims["Hq"] + (2 if writes else 1) * dims["Hkv"])
    function = rotate_and_write if writes else rotate
    return (Grid(function, grid, configure("rotary", generation), {"width": dims["W"]}, constants),)


def _refuses(call: CallSpec) -> str | None:
    dims = call.contract.match(call.inputs, call.attrs)[0]
    head_dim, width = dims["D"], dims["W"]
    if isinstance(head_dim, int) and isinstance(width, int) and 2 * width > head_dim:
        return f"tables of width {width} rotate {2 * width} dimensions, but a head has {head_dim}"
    return None


KERNELS = tuple(triton_kernel(op, "heads", _rotary, refuses=_refuses) for op in ("rotary", "rotary_write"))
