"""Matrix products with quantised weights.

Owns the kernels of `linear_q`, `linear_heads_q`, `linear_qkv_q`, `linear_gated_q` and `logits_q`. What always holds:
codes are read 16 bytes a thread and become weights in registers: scale * code + offset in float32, rounded to the
activations' dtype; activations are never rounded. `<op>.rows` sums each output over K in one order that N, K and the
dtype decide (`BLOCK_BYTES`, `parts_of`), so a row's bits do not depend on the others'; `<op>.tiles` promises nothing.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from slotwise.backends.cuda_triton.launch import Grid
from slotwise.backends.cuda_triton.linear import cut_of, finish_or_keep, product_grids, product_kernels
from slotwise.core.backend import CallSpec
from slotwise.core.ops.linear_q import FLOAT_OPS, GROUP

BLOCK_BYTES: Mapping[int, int] = {2: 128, 4: 32}
"""Bytes of an activation -> bytes of codes of one weight that the decode side reads at a time. Not in the table of
configurations: of four-bit codes, the low halves of a block are summed before the high ones."""


@triton.jit
def spread_over_groups(source, column, groups, first, last, inside, BLOCK: tl.constexpr, PER: tl.constexpr,
                       BLOCK_N: tl.constexpr):  # fmt: skip
    """A number a group, from `source` [N, groups], for each of BLOCK bytes of codes: float32 [BLOCK, N]."""
    group = first // PER + tl.arange(0, BLOCK // PER)
    kept = (group < last // PER)[:, None] & inside[None, :]
    found = tl.load(source + column[None, :] * groups + group[:, None], mask=kept, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(found[:, None, :], (BLOCK // PER, PER, BLOCK_N)), (BLOCK, BLOCK_N))


@triton.jit
def add_product(
    acc, low, high, codes, scale, offset, column, inside, row_bytes, groups, first, last,
    BITS: tl.constexpr, SHIFTED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """acc + activations times the weights `column`, over bytes `first .. first + BLOCK` of their codes, `last` at most.

    Four bits: `low` are the activations of the bytes' low halves, `high` those of their high halves.
    """
    PER: tl.constexpr = 32 if BITS == 8 else 16
    byte = first + tl.arange(0, BLOCK)
    kept = (byte < last)[:, None] & inside[None, :]
    raw = tl.load(codes + column[None, :] * row_bytes + byte[:, None], mask=kept, other=0)
    factor = spread_over_groups(scale, column, groups, first, last, inside, BLOCK, PER, BLOCK_N)
    if BITS == 8:
        weight = raw.to(tl.float32) * factor
        acc = tl.dot(low, weight.to(low.dtype), acc, input_precision="ieee")
    else:
        if SHIFTED:
            shift = spread_over_groups(offset, column, groups, first, last, inside, BLOCK, PER, BLOCK_N)
        else:
            shift = factor * -8.0
        weight = (raw & 15).to(tl.float32) * factor + shift
        acc = tl.dot(low, weight.to(low.dtype), acc, input_precision="ieee")
        weight = (raw >> 4).to(tl.float32) * factor + shift
        acc = tl.dot(high, weight.to(high.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def quantised_product(
    x, codes, scale, offset, bias, out, second, third, partial,
    rows, outputs, inner, row_bytes, groups, part_bytes, first_width, other_width, softcap,
    BITS: tl.constexpr, SHIFTED: tl.constexpr,
    MODE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of x [T, K] times the quantised weight [N, K] transposed, over all of K or one part of it."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    if PARTS == 1:
        begin, end = 0, row_bytes
    else:
        begin = part * part_bytes
        end = tl.minimum(begin + part_bytes, row_bytes)
    long = tl.full((), 1, tl.int64)  # sizes that are 1 come as constants, which have no dtype to change
    x_row = x + row.to(tl.int64)[:, None] * inner
    wide, fits = column.to(tl.int64), column < outputs
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    for start in range(begin, end, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        kept = (row < rows)[:, None] & (byte < end)[None, :]
        if BITS == 8:
            low = tl.load(x_row + byte[None, :], mask=kept, other=0.0)
            high = low
        else:
            element = byte // 16 * 32 + byte % 16
            low = tl.load(x_row + element[None, :], mask=kept, other=0.0)
            high = tl.load(x_row + element[None, :] + 16, mask=kept, other=0.0)
        acc = add_product(
            acc, low, high, codes, scale, offset, wide, fits, row_bytes, groups, start, end, BITS, SHIFTED, BLOCK,
            BLOCK_N,
        )  # fmt: skip
        if MODE == 2:
            acc_up = add_product(
                acc_up, low, high, codes, scale, offset, wide + long * outputs, fits, row_bytes, groups, start, end,
                BITS, SHIFTED, BLOCK, BLOCK_N,
            )  # fmt: skip
    finish_or_keep(
        acc, acc_up, row, column, part, bias, out, second, third, partial, rows, outputs, first_width, other_width,
        softcap, MODE, BIASED, CAPPED, ACTIVATION, PARTS,
    )  # fmt: skip


def _grids(call: CallSpec, generation: str, kind: str) -> tuple[Grid, ...]:
    cut, bits, shifted = cut_of(call, kind), int(call.attrs["bits"]), call.inputs[3] is not None
    numbers = {
        "inner": cut.inner,
        "row_bytes": cut.inner * bits // 8,
        "groups": cut.inner // GROUP,
        "part_bytes": cut.part_size * bits // 8,
    }
    constants = {"BITS": bits, "SHIFTED": shifted}
    if kind == "rows":
        constants["BLOCK"] = BLOCK_BYTES[call.dtype.itemsize]
    tensors = {} if shifted else {"offset": None}
    return product_grids(call, generation, kind, quantised_product, numbers, constants, tensors)


KERNELS = tuple(kernel for op in FLOAT_OPS for kernel in product_kernels(op, _grids))
