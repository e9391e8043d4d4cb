"""Normalisation and the residual stream.

Owns the kernels of `add`, `rms_norm`, `add_rms_norm` and `head_rms_norm`. What always holds: one program holds a whole
row (or head) in registers and sums its squares in float32 by a tree that the width alone decides, so no row can touch
another's bits. A row is rounded where the op's definition rounds it.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math

import triton
import triton.language as tl

from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.core.backend import CallSpec

WIDEST = 16384
"""Elements of a row that one program's registers hold."""


@triton.jit
def add_elements(a, b, out, count, BLOCK: tl.constexpr):
    """out = a + b, over all elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(a + at, mask=at < count)
    right = tl.load(b + at, mask=at < count)
    tl.store(out + at, (left.to(tl.float32) + right.to(tl.float32)).to(left.dtype), mask=at < count)


@triton.jit
def normalise(
    x,
    residual,
    weight,
    total,
    normed,
    width,
    eps,
    offset,
    ADDS: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """normed = rms_norm(x), or of total = x + residual, one row a program."""
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, WIDTH)
    inside = column < width
    values = tl.load(x + row + column, mask=inside, other=0.0)
    if ADDS:
        more = tl.load(residual + row + column, mask=inside, other=0.0)
        values = (values.to(tl.float32) + more.to(tl.float32)).to(values.dtype)
        tl.store(total + row + column, values, mask=inside)
    wide = values.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:  # noqa: SIM108 (a choice at compile time)
        result = scaled * (offset + factor)
    else:
        result = scaled.to(values.dtype).to(tl.float32) * factor
    tl.store(normed + row + column, result.to(values.dtype), mask=inside)


def _add(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    count = math.prod(call.outputs[0].sizes())
    chosen = configure("add", generation)
    return (
        Grid(add_elements, (triton.cdiv(count, chosen.block["BLOCK"]),), chosen, {"count": count}, {}, {"out": "sum"}),
    )


def _norm(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    *rows, width = call.outputs[0].sizes()
    adds, offset = call.op == "add_rms_norm", float(call.attrs["weight_offset"])
    return (
        Grid(
            normalise,
            (math.prod(rows),),
            configure("norm", generation, width=width),
            {"width": width, "eps": float(call.attrs["eps"]), "offset": offset},
            {"ADDS": adds, "OFFSET": offset != 0, "WIDTH": triton.next_power_of_2(width)},
            {} if adds else {"residual": None, "total": None},
        ),
    )


def _refuses(call: CallSpec) -> str | None:
    width = call.outputs[0].sizes()[-1]
    return f"a row of {width} elements does not fit a program's registers ({WIDEST} do)" if width > WIDEST else None


KERNELS = (
    triton_kernel("add", "flat", _add),
    *(triton_kernel(op, "rows", _norm, refuses=_refuses) for op in ("rms_norm", "add_rms_norm", "head_rms_norm")),
)
