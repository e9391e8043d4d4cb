"""Matrix products with quantised weights.

Owns `linear_q`, `linear_heads_q`, `linear_qkv_q`, `linear_gated_q` and `logits_q`, made from the float ops: each has
`codes`, `scale` and `offset` in place of its op's weight [N, K], and the attribute `bits`. What always holds: the
meaning is the dequantised weight in the float op, in float32 or wider; a kernel may round activations to int8 by group
for its dot products, which the tolerance allows, and no more.

Groups are 32 consecutive elements along K. `scale` and `offset` are f16 [N, K / 32]; a scale may be negative or 0. In
the layout `octets`, a word is 4 bytes of codes, or one scale or offset.

- `bits` 8: `codes` i8 [N, K], -127 .. 127; the weight is scale * code, and there is no offset.
- `bits` 4: `codes` u8 [N, K / 2]; of a group's 16 bytes, byte j holds the code (0 .. 15) of element j in its low half
  and of element j + 16 in its high half. The weight is scale * (code - 8), with an offset scale * code + offset.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from slotwise.core.contract import Argument, Case, CaseMaker, Cost, OpContract
from slotwise.core.errors import GraphError
from slotwise.core.graph import Attr
from slotwise.core.layouts import CODES_WORD, GROUP_WORD, LAYOUTS, OCTET, ROWS, in_rows, laid_out
from slotwise.core.ops import linear
from slotwise.core.ops.tolerances import INT8_ACTIVATIONS
from slotwise.core.quantise import GROUP as GROUP
from slotwise.core.quantise import dequantise, pack
from slotwise.core.specs import DType, TensorSpec

Operands = tuple[torch.Tensor | None, ...]


def weight_for(
    x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, bits: int, layout: str
) -> torch.Tensor:
    """The weight [N, K], row after row, for a product with `x`: float64 where `x` is, else float32."""
    codes, scale = in_rows(codes, CODES_WORD, layout), in_rows(scale, GROUP_WORD, layout)
    offset = None if offset is None else in_rows(offset, GROUP_WORD, layout)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return dequantise(codes, scale, offset, bits=bits, dtype=wide)


def with_weight(
    op: OpContract, x: torch.Tensor, weight: torch.Tensor, *rest: torch.Tensor | None, **attrs: Attr
) -> Any:
    """The float op `op` in the dtype of `weight`; results have the dtype of `x`, or the one that the op fixes."""
    wide = (None if value is None else value.to(weight.dtype) for value in (x, weight, *rest))
    results = op.function(*wide, layout=ROWS, **attrs)
    if isinstance(op.outputs[0].dtype, DType):
        return results
    return tuple(y.to(x.dtype) for y in results) if isinstance(results, tuple) else results.to(x.dtype)


def _quantised(op: OpContract, cases: CaseMaker) -> OpContract:
    """The contract of `op` with its weight quantised."""
    x, weight, *rest = op.inputs
    rows, columns = weight.dims

    def function(
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        offset: torch.Tensor | None,
        *rest: torch.Tensor | None,
        bits: int,
        layout: str = ROWS,
        **attrs: Attr,
    ) -> Any:
        return with_weight(op, x, weight_for(x, codes, scale, offset, bits, layout), *rest, **attrs)

    def fits(specs: Sequence[TensorSpec | None], attrs: Mapping[str, Attr]) -> None:
        _check_parts(f"{op.name}_q", specs, int(attrs["bits"]))

    def cost(d: Mapping[str, int], item: int, attrs: Mapping[str, Attr]) -> Cost:
        plain = op.cost(d, item, attrs)
        per_row = d["C"] + (d["G"] + d.get("Z", 0)) * DType.F16.itemsize
        return replace(plain, bytes=plain.bytes + d[str(rows)] * (per_row - d[str(columns)] * item))

    return replace(
        op,
        name=f"{op.name}_q",
        function=function,
        inputs=(
            x,
            Argument("codes", (rows, "C"), (DType.I8, DType.U8), word=CODES_WORD, joined=weight.joined),
            Argument("scale", (rows, "G"), DType.F16, word=GROUP_WORD, joined=weight.joined),
            Argument("offset", (rows, "Z"), DType.F16, optional=True, word=GROUP_WORD, joined=weight.joined),
            *rest,
        ),
        cost=cost,
        cases=cases,
        tolerance=INT8_ACTIVATIONS,
        required=(*op.required, "bits"),
        output_dims=None if op.output_dims is None else _OUTPUT_DIMS[op.name],
        fits=fits,
    )


_OUTPUT_DIMS = {
    "linear_heads": functools.partial(linear.heads_dims, "linear_heads_q"),
    "linear_qkv": functools.partial(linear.qkv_dims, "linear_qkv_q"),
    "linear_gated": functools.partial(linear.gated_dims, "linear_gated_q"),
}


def _check_parts(op: str, specs: Sequence[TensorSpec | None], bits: int) -> None:
    """Codes, scale and offset have the shapes and dtypes that `bits` and K ask for."""
    x, codes, scale, offset = specs[:4]
    if x is None or codes is None or scale is None:
        raise GraphError(f"op {op}: x, codes and scale must all be given")
    k = x.shape[1]
    if not isinstance(k, int) or k % GROUP:
        raise GraphError(f"op {op}: the columns of x must be a multiple of {GROUP}, is {x}")
    dtype, columns = (DType.I8, k) if bits == 8 else (DType.U8, k // 2)
    if codes.dtype is not dtype or codes.shape[1] != columns:
        expected = f"{dtype.value} with {columns} columns"
        raise GraphError(f"op {op}: with {bits} bits and x {x}, codes must be {expected}, is {codes}")
    for name, spec in (("scale", scale), ("offset", offset)):
        if spec is not None and spec.shape[1] != k // GROUP:
            raise GraphError(f"op {op}: {name} must have {k // GROUP} columns for x {x}, is {spec}")
    if bits == 8 and offset is not None:
        raise GraphError(f"op {op}: 8 bits are symmetric and take no offset, but one is given: {offset}")


# Cases: each shape in each form and layout. Activations and dequantised weights make outputs near unit variance; what
# is awkward for a kernel is in them: an odd number of groups and of rows, negative scales, a row of zero scales, a
# group of activations that are all 0, codes at their extremes.
_FORMS = ("int8", "int4", "int4 with offset")
_SHAPES = (
    ("one row", 1, 32, 40),
    ("k + 1 rows", 6, 96, 101),
    ("odd sizes", 7, 992, 33),
    ("a bucket of 64", 64, 256, 72),
    ("many rows", 130, 64, 48),
)


def _activations(rng: torch.Generator, t: int, k: int) -> torch.Tensor:
    x = torch.randn(t, k, generator=rng, dtype=torch.float64)
    if t > 1:
        x[-1, :GROUP] = 0
    return x


def _weight(
    rng: torch.Generator, n: int, k: int, form: str, layout: str, *, extreme: bool = False, gain: float = 1.0
) -> tuple[Operands, dict[str, Attr]]:
    """Codes, scale and offset, and the attributes that say what they are; outputs have the variance gain^2."""
    bits = 8 if form == "int8" else 4
    low, high = (-127, 127) if bits == 8 else (0, 15)
    codes = torch.randint(low, high + 1, (n, k), generator=rng)
    if extreme:
        codes = torch.where(codes < (low + high) / 2, low, high)
    spread = (high - low) / (2 if extreme else math.sqrt(12))
    scale = (0.5 + torch.rand(n, k // GROUP, generator=rng, dtype=torch.float64)) * gain / (spread * math.sqrt(k))
    scale[0] = 0
    offset = None
    if form == "int4 with offset":
        # Never close to -8 scale, which no offset at all would stand for.
        offset = -(2 + 3 * torch.rand(scale.shape, generator=rng, dtype=torch.float64)) * scale
    elif bits == 4:
        scale = torch.where(torch.rand(scale.shape, generator=rng) < 0.5, -scale, scale)
    packed = codes.to(torch.int8) if bits == 8 else pack(codes)
    parts = (
        laid_out(packed, CODES_WORD, layout),
        laid_out(scale, GROUP_WORD, layout),
        None if offset is None else laid_out(offset, GROUP_WORD, layout),
    )
    return parts, {"bits": bits, "layout": layout}


def _weights(
    rng: torch.Generator, n: int, k: int, *, joined: int = 1, extreme: bool = False, gain: float = 1.0
) -> Iterator[tuple[str, int, Operands, dict[str, Attr]]]:
    """A weight in each form and layout: (label, rows, parts, attributes); in octets, rows are `n` or a few more."""
    for layout in LAYOUTS:
        unit = 1 if layout == ROWS else OCTET * joined
        rows = -(-n // unit) * unit
        for form in _FORMS:
            parts, attrs = _weight(rng, rows, k, form, layout, extreme=extreme, gain=gain)
            yield f"{form}, {layout}", rows, parts, attrs


def _linear_cases(rng: torch.Generator) -> Iterator[Case]:
    for name, t, k, n in _SHAPES:
        for place, (label, rows, parts, attrs) in enumerate(_weights(rng, n, k)):
            has_bias = (place + t) % 2 == 1
            bias = torch.randn(rows, generator=rng, dtype=torch.float64) if has_bias else None
            title = f"{name}, {label}{', bias' if has_bias else ''}"
            yield Case(title, (_activations(rng, t, k), *parts, bias), attrs)
    for label, _, parts, attrs in _weights(rng, 19, 160, extreme=True):
        yield Case(f"extreme codes, {label}", (_activations(rng, 3, 160), *parts, None), attrs)


def _heads_cases(rng: torch.Generator) -> Iterator[Case]:
    for name, t, k, heads, d in (("one row, heads of 24", 1, 96, 3, 24), ("many rows", 70, 32, 2, 16)):
        for label, _, parts, attrs in _weights(rng, heads * d, k):
            own = {**attrs, "heads": heads, "head_dim": d}
            yield Case(f"{name}, {label}", (_activations(rng, t, k), *parts, None), own)


def _qkv_cases(rng: torch.Generator) -> Iterator[Case]:
    for name, t, k, hq, hkv, d, has_bias in (
        ("one row, heads of 24", 1, 96, 6, 2, 24, True),
        ("no groups", 6, 64, 4, 4, 16, False),
        ("many rows", 70, 32, 3, 1, 24, True),
    ):
        for label, rows, parts, attrs in _weights(rng, (hq + 2 * hkv) * d, k):
            bias = torch.randn(rows, generator=rng, dtype=torch.float64) if has_bias else None
            own = {**attrs, "q_heads": hq, "kv_heads": hkv, "head_dim": d}
            yield Case(f"{name}, {label}", (_activations(rng, t, k), *parts, bias), own)


def _gated_cases(rng: torch.Generator) -> Iterator[Case]:
    for place, (name, t, k, n) in enumerate(_SHAPES):
        activation = linear.ACTIVATIONS[place % 2]
        # Outputs are products of two, each with its error.
        for label, _, parts, attrs in _weights(rng, 2 * n, k, joined=2, gain=0.7):
            own = {**attrs, "activation": activation}
            yield Case(f"{name}, {label}, {activation}", (_activations(rng, t, k), *parts), own)


def _logits_cases(rng: torch.Generator) -> Iterable[Case]:
    for place, (name, t, k, n) in enumerate(_SHAPES):
        softcap = 3.0 if place % 2 else 0.0
        for label, _, parts, attrs in _weights(rng, n, k):
            own: dict[str, Attr] = {**attrs, "softcap": softcap}
            yield Case(f"{name}, {label}, softcap {softcap:g}", (_activations(rng, t, k), *parts), own)


# Their float ops, in order.
_CASES: Mapping[str, CaseMaker] = {
    "linear": _linear_cases,
    "linear_heads": _heads_cases,
    "linear_qkv": _qkv_cases,
    "linear_gated": _gated_cases,
    "logits": _logits_cases,
}

FLOAT_OPS: Mapping[str, OpContract] = {f"{op.name}_q": op for op in linear.CONTRACTS if op.name in _CASES}
"""Each op here -> the float op that it is with a quantised weight."""

CONTRACTS = tuple(_quantised(op, _CASES[op.name]) for op in FLOAT_OPS.values())
