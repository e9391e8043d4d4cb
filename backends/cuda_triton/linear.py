"""Matrix products with weights, and the gate between them.

Owns the kernels of `linear`, `linear_heads`, `linear_qkv`, `linear_gated`, `logits` and `gated_activation`. What always
holds: `<op>.rows` sums each output over K in one order that N and K alone decide, in tiles of 16 or 32 rows that the
same tensor-core instruction multiplies, so a row's bits do not depend on the others'; where N is small, K is cut into
parts (`parts_of`) that a second launch adds up in order. `<op>.tiles` is for prefill and promises nothing. What follows
a sum, and the launches that make a product, are the same for quantised weights (`linear_q.py`).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from slotwise.backends._gpu.kernels import Scratch
from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.core.backend import CallSpec, Kernel
from slotwise.core.ops.linear import ACTIVATIONS
from slotwise.core.specs import DType

PLAIN, QKV, GATED, LOGITS = 0, 1, 2, 3

PROGRAMS = 256
"""Fewer programs than this leave much of a large GPU's memory bandwidth unused."""

SMALLEST_PART = 1024
"""Elements of K below which a part is not worth the launch that adds parts up."""

PART_UNIT = 512
"""Parts start at multiples of this, so that no block size changes which elements a part has."""


@triton.jit
def bounded_tanh(x):
    """tanh by the logistic function: exact to rounding at both ends, and defined for every float."""
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """`silu`, `gelu_tanh` or `gelu` of float32 values."""
    if ACTIVATION == "silu":
        result = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu_tanh":
        result = 0.5 * x * (1.0 + bounded_tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    else:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return result


@triton.jit
def finish(
    acc, acc_up, row, column, inside, bias, out, second, third, outputs, first_width, other_width, softcap,
    MODE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """What follows the sum: bias, gate or cap, rounding, and the store, for `row` [M, 1] and `column` [1, N]."""
    if BIASED:
        acc += tl.load(bias + column, mask=column < outputs, other=0.0).to(tl.float32)
    if CAPPED:
        acc = bounded_tanh(acc / softcap) * softcap
    if MODE == 2:
        acc = activate(acc, ACTIVATION) * acc_up
    values = acc.to(out.dtype.element_ty)
    if MODE == 1:
        kept = inside & (column < first_width)
        tl.store(out + row * first_width + column, values, mask=kept)
        kept = inside & (column >= first_width) & (column < first_width + other_width)
        tl.store(second + row * other_width + column - first_width, values, mask=kept)
        kept = inside & (column >= first_width + other_width)
        tl.store(third + row * other_width + column - first_width - other_width, values, mask=kept)
    else:
        tl.store(out + row * outputs + column, values, mask=inside)


@triton.jit
def finish_or_keep(
    acc, acc_up, row, column, part, bias, out, second, third, partial, rows, outputs, first_width, other_width, softcap,
    MODE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """A tile's sums, `row` [M] by `column` [N]: finished where they are over all of K, else kept for `add_parts`."""
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    long = tl.full((), 1, tl.int64)  # sizes that are 1 come as constants, which have no dtype to change
    long_row, wide_column = row.to(tl.int64)[:, None], column[None, :]
    if PARTS == 1:
        finish(
            acc, acc_up, long_row, wide_column, inside, bias, out, second, third, outputs, first_width, other_width,
            softcap, MODE, BIASED, CAPPED, ACTIVATION,
        )  # fmt: skip
    else:
        kinds: tl.constexpr = 2 if MODE == 2 else 1
        at = (long * part * kinds * rows + long_row) * outputs + wide_column
        tl.store(partial + at, acc, mask=inside)
        if MODE == 2:
            tl.store(partial + at + long * rows * outputs, acc_up, mask=inside)


@triton.jit
def product(
    x, weight, bias, out, second, third, partial, rows, outputs, inner, part_size, first_width, other_width, softcap,
    MODE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of x [T, K] times weight [N, K] transposed, over all of K or one part of it."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    if PARTS == 1:
        begin, end = 0, inner
    else:
        begin = part * part_size
        end = tl.minimum(begin + part_size, inner)
    k = tl.arange(0, BLOCK_K)
    long = tl.full((), 1, tl.int64)  # sizes that are 1 come as constants, which have no dtype to change
    x_at = x + row.to(tl.int64)[:, None] * inner + k[None, :]
    weight_at = weight + column.to(tl.int64)[None, :] * inner + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_up = acc
    for start in range(begin, end, BLOCK_K):
        left = k + start < end
        a = tl.load(x_at + start, mask=(row < rows)[:, None] & left[None, :], other=0.0)
        b = tl.load(weight_at + start, mask=(column < outputs)[None, :] & left[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if MODE == 2:
            up_at = weight_at + long * outputs * inner + start
            b = tl.load(up_at, mask=(column < outputs)[None, :] & left[:, None], other=0.0)
            acc_up = tl.dot(a, b, acc_up, input_precision="ieee")
    finish_or_keep(
        acc, acc_up, row, column, part, bias, out, second, third, partial, rows, outputs, first_width, other_width,
        softcap, MODE, BIASED, CAPPED, ACTIVATION, PARTS,
    )  # fmt: skip


@triton.jit
def add_parts(
    partial, bias, out, second, third, rows, outputs, first_width, other_width, softcap,
    MODE: tl.constexpr, BIASED: tl.constexpr, CAPPED: tl.constexpr, ACTIVATION: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the parts of one row up, first to last, and finish."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros((1, 1), tl.int64)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = column < outputs
    kinds: tl.constexpr = 2 if MODE == 2 else 1
    size = tl.full((), 1, tl.int64) * rows * outputs
    acc = tl.zeros((1, BLOCK), tl.float32)
    acc_up = acc
    for part in tl.static_range(PARTS):
        at = partial + part * kinds * size + row * outputs + column
        acc += tl.load(at, mask=inside, other=0.0)
        if MODE == 2:
            acc_up += tl.load(at + size, mask=inside, other=0.0)
    finish(
        acc, acc_up, row, column, inside, bias, out, second, third, outputs, first_width, other_width, softcap,
        MODE, BIASED, CAPPED, ACTIVATION,
    )  # fmt: skip


@triton.jit
def gate_elements(gate, up, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """y = activation(gate) * up, over all elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    left = tl.load(gate + at, mask=at < count, other=0.0)
    right = tl.load(up + at, mask=at < count, other=0.0)
    result = activate(left.to(tl.float32), ACTIVATION) * right.to(tl.float32)
    tl.store(y + at, result.to(left.dtype), mask=at < count)


def parts_of(outputs: int, inner: int) -> int:
    """Into how many parts K is cut: more while there would be too few programs, and parts stay long enough."""
    parts, tiles = 1, math.ceil(outputs / 16)
    while tiles * parts < PROGRAMS and inner >= 2 * parts * SMALLEST_PART:
        parts *= 2
    return parts


@dataclass(frozen=True, slots=True)
class Cut:
    """A product's sizes, and into how many parts K is cut."""

    op: str  # with quantised weights, what it means
    rows: int
    outputs: int  # of one of gate and up
    inner: int
    parts: int

    @property
    def part_size(self) -> int:
        """Elements of K of each part but the last."""
        return math.ceil(self.inner / self.parts / PART_UNIT) * PART_UNIT

    @property
    def workspace(self) -> int:
        """Bytes of the parts' sums."""
        sums = self.parts * (2 if self.op == "linear_gated" else 1) * self.rows * self.outputs
        return sums * DType.F32.itemsize if self.parts > 1 else 0


def cut_of(call: CallSpec, kind: str) -> Cut:
    """How `<op>.<kind>` cuts a call, whose second input is the weight or its codes."""
    op = call.op.removesuffix("_q")
    x, weight = call.inputs[:2]
    assert x is not None
    assert weight is not None
    rows, inner = x.sizes()
    outputs = weight.sizes()[0] // (2 if op == "linear_gated" else 1)
    return Cut(op, rows, outputs, inner, parts_of(outputs, inner) if kind == "rows" else 1)


_OUTPUTS = {
    "linear": ("y", None, None),
    "linear_heads": ("y", None, None),
    "linear_qkv": ("q", "k", "v"),
    "linear_gated": ("y", None, None),
    "logits": ("logits", None, None),
}
_MODES = {"linear_qkv": QKV, "linear_gated": GATED, "logits": LOGITS}


def _finishing(call: CallSpec, cut: Cut) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What `finish_or_keep` and `add_parts` are given: numbers, constants and tensors."""
    biased = call.contract.inputs[-1].name == "bias" and call.inputs[-1] is not None
    softcap = float(call.attrs.get("softcap", 0.0))
    head_dim = int(call.attrs.get("head_dim", 1))
    numbers = {
        "rows": cut.rows,
        "outputs": cut.outputs,
        "first_width": int(call.attrs.get("q_heads", 1)) * head_dim,
        "other_width": int(call.attrs.get("kv_heads", 1)) * head_dim,
        "softcap": softcap or 1.0,
    }
    constants = {
        "MODE": _MODES.get(cut.op, PLAIN),
        "BIASED": biased,
        "CAPPED": softcap > 0,
        "ACTIVATION": str(call.attrs.get("activation", "")),
        "PARTS": cut.parts,
    }
    tensors: dict[str, str | Scratch | None] = dict(zip(("out", "second", "third"), _OUTPUTS[cut.op], strict=True))
    tensors |= {"partial": Scratch(0, DType.F32) if cut.parts > 1 else None} | ({} if biased else {"bias": None})
    return numbers, constants, tensors


def product_grids(
    call: CallSpec, generation: str, kind: str, function: JITFunction[Any],
    numbers: dict[str, int], constants: dict[str, int], tensors: dict[str, None],
) -> tuple[Grid, ...]:  # fmt: skip
    """The product by `function`, given its own numbers, constants and tensors; then its parts' sum, where K is cut."""
    cut = cut_of(call, kind)
    shared_numbers, shared_constants, shared_tensors = _finishing(call, cut)
    table = f"{'gated' if cut.op == 'linear_gated' else 'linear'}{'_q' if call.op.endswith('_q') else ''}_{kind}"
    facts = {"rows": cut.rows, "outputs": cut.outputs, "itemsize": call.dtype.itemsize}
    chosen = configure(table, generation, **facts, bits=int(call.attrs.get("bits", 0)))
    grid = (math.ceil(cut.rows / chosen.block["BLOCK_M"]), math.ceil(cut.outputs / chosen.block["BLOCK_N"]), cut.parts)
    given = (shared_numbers | numbers, shared_constants | constants, shared_tensors | tensors)
    first = Grid(function, grid, chosen, *given)
    if cut.parts == 1:
        return (first,)
    adding = configure("add_parts", generation)
    grid = (cut.rows, math.ceil(cut.outputs / adding.block["BLOCK"]), 1)
    return first, Grid(add_parts, grid, adding, shared_numbers, shared_constants, shared_tensors)


def _grids(call: CallSpec, generation: str, kind: str) -> tuple[Grid, ...]:
    cut = cut_of(call, kind)
    return product_grids(call, generation, kind, product, {"inner": cut.inner, "part_size": cut.part_size}, {}, {})


def _gate(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    count = math.prod(call.outputs[0].sizes())
    chosen = configure("add", generation)
    grid = (triton.cdiv(count, chosen.block["BLOCK"]),)
    return (Grid(gate_elements, grid, chosen, {"count": count}, {"ACTIVATION": str(call.attrs["activation"])}),)


def refuses(call: CallSpec) -> str | None:
    """Why a product is not taken: an activation that `activate` does not know."""
    activation = call.attrs.get("activation")
    if activation is not None and activation not in ACTIVATIONS:
        return f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}"
    return None


def product_kernels(op: str, grids: Callable[[CallSpec, str, str], tuple[Grid, ...]]) -> tuple[Kernel, Kernel]:
    """`<op>.rows` and `<op>.tiles`, whose launches `grids(call, generation, kind)` gives."""
    return (
        triton_kernel(
            op,
            "rows",
            lambda c, g: grids(c, g, "rows"),
            refuses=refuses,
            workspace=lambda c: cut_of(c, "rows").workspace,
        ),
        triton_kernel(op, "tiles", lambda c, g: grids(c, g, "tiles"), refuses=refuses, invariant_rows=0),
    )


KERNELS = (
    *(kernel for op in _OUTPUTS for kernel in product_kernels(op, _grids)),
    triton_kernel("gated_activation", "flat", _gate, refuses=refuses),
)
