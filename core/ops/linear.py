"""Matrix products with weights.

Owns `linear`, `linear_heads`, `linear_qkv`, `gated_activation`, `linear_gated` and `logits`. What always holds: a
weight is [N, K], row after row or in octets (`core/layouts.py`); products accumulate in float32 or wider; `linear_qkv`
and `linear_gated` take their weights joined along N, in the order q, k, v and gate, up.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F

from slotwise.core.contract import Argument, Case, Cost, OpContract
from slotwise.core.errors import ContractError, GraphError
from slotwise.core.graph import Attr
from slotwise.core.layouts import OCTETS, ROWS, WEIGHT_WORD, in_rows, to_octets
from slotwise.core.ops.tolerances import POINTWISE, REDUCTION
from slotwise.core.specs import Dim, DType

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, layout: str = ROWS) -> torch.Tensor:
    """`x` [T, K] times `weight` [N, K] transposed, plus `bias` [N] when there is one."""
    return F.linear(x, in_rows(weight, WEIGHT_WORD, layout), bias)


def linear_heads(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, heads: int, head_dim: int, layout: str = ROWS
) -> torch.Tensor:
    """`linear` with its output seen as [T, heads, head_dim]."""
    return linear(x, weight, bias, layout=layout).view(len(x), heads, head_dim)


def linear_qkv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    layout: str = ROWS,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries [T, Hq, D], keys and values [T, Hkv, D] of `x` [T, K]; `weight` is [(Hq + 2 Hkv) D, K]."""
    joined = linear(x, weight, bias, layout=layout).view(len(x), q_heads + 2 * kv_heads, head_dim)
    q, k, v = torch.split(joined, [q_heads, kv_heads, kv_heads], dim=1)
    return q, k, v


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """`silu`, `gelu_tanh` (the tanh approximation) or `gelu` (by erf) of `x`."""
    if activation == "silu":
        return F.silu(x)
    if activation in ("gelu_tanh", "gelu"):
        return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
    raise ContractError(f"activation {activation!r} is not known; expected one of {ACTIVATIONS}")


def gated_activation(gate: torch.Tensor, up: torch.Tensor, *, activation: str) -> torch.Tensor:
    """`activation(gate) * up`, both [T, N] (Shazeer, 2020)."""
    return activate(gate, activation) * up


def linear_gated(x: torch.Tensor, weight: torch.Tensor, *, activation: str, layout: str = ROWS) -> torch.Tensor:
    """`activation(x gate^T) * (x up^T)` with `weight` [2 N, K] holding gate's rows, then up's."""
    gate, up = linear(x, weight, None, layout=layout).chunk(2, dim=-1)
    return gated_activation(gate, up, activation=activation)


def logits(x: torch.Tensor, weight: torch.Tensor, *, softcap: float, layout: str = ROWS) -> torch.Tensor:
    """`x` [R, H] times `weight` [V, H] transposed, as float32; with `softcap` c > 0, `c tanh(y / c)` (Gemma 2)."""
    y = linear(x, weight, None, layout=layout)
    y = y if y.dtype == torch.float64 else y.float()
    return torch.tanh(y / softcap) * softcap if softcap > 0 else y


def heads_dims(op: str, attrs: Mapping[str, Attr], dims: Mapping[str, Dim]) -> Mapping[str, Dim]:
    """Heads and their width, for the op called `op`; raises GraphError when the weight's rows are not theirs."""
    heads, head_dim = int(attrs["heads"]), int(attrs["head_dim"])
    if dims["N"] != heads * head_dim:
        raise GraphError(f"op {op}: weight has {dims['N']} rows; {heads} heads of {head_dim} need another number")
    return {"Hx": heads, "D": head_dim}


def qkv_dims(op: str, attrs: Mapping[str, Attr], dims: Mapping[str, Dim]) -> Mapping[str, Dim]:
    """Query heads, key heads and their width; raises GraphError when the weight's rows are not theirs."""
    q_heads, kv_heads, head_dim = (int(attrs[name]) for name in ("q_heads", "kv_heads", "head_dim"))
    if dims["N"] != (q_heads + 2 * kv_heads) * head_dim:
        raise GraphError(
            f"op {op}: weight has {dims['N']} rows, but {q_heads} query heads and 2 x {kv_heads} key and value "
            f"heads of {head_dim} make {(q_heads + 2 * kv_heads) * head_dim}"
        )
    return {"Hq": q_heads, "Hkv": kv_heads, "D": head_dim}


def gated_dims(op: str, attrs: Mapping[str, Attr], dims: Mapping[str, Dim]) -> Mapping[str, Dim]:
    """Columns of the product; raises GraphError when the weight's rows are not gate's and up's."""
    joined = dims["N2"]
    if not isinstance(joined, int) or joined % 2:
        raise GraphError(f"op {op}: weight must have an even number of rows (gate and up), has {joined}")
    return {"N": joined // 2}


_SHAPES = (
    ("one row", 1, 24, 40),
    ("k + 1 rows", 6, 192, 101),
    ("odd sizes", 7, 101, 33),
    ("a bucket of 64", 64, 96, 72),
    ("many rows", 130, 64, 48),
)

_OCTET_SHAPES = (
    ("one row, octets", 1, 24, 40),
    ("k + 1 rows, octets", 6, 192, 104),
    ("odd sizes, octets", 7, 102, 24),
    ("many rows, octets", 130, 64, 48),
)


def _weight(rng: torch.Generator, n: int, k: int) -> torch.Tensor:
    return torch.randn(n, k, generator=rng, dtype=torch.float64) / math.sqrt(k)


def _octets(rng: torch.Generator, n: int, k: int) -> torch.Tensor:
    return to_octets(_weight(rng, n, k), WEIGHT_WORD)


def _linear_cases(rng: torch.Generator) -> Iterable[Case]:
    for place, (name, t, k, n) in enumerate(_OCTET_SHAPES):
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        bias = torch.randn(n, generator=rng, dtype=torch.float64) if place % 2 else None
        yield Case(f"{name}{', bias' if place % 2 else ''}", (x, _octets(rng, n, k), bias), {"layout": OCTETS})
    for name, t, k, n in _SHAPES:
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        yield Case(name, (x, _weight(rng, n, k), None))
        yield Case(f"{name}, bias", (x, _weight(rng, n, k), torch.randn(n, generator=rng, dtype=torch.float64)))


def _heads_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, k, heads, d in (("one row, heads of 24", 1, 48, 3, 24), ("many rows", 70, 40, 2, 16)):
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        attrs = {"heads": heads, "head_dim": d}
        yield Case(name, (x, _weight(rng, heads * d, k), None), attrs)
        yield Case(f"{name}, octets", (x, _octets(rng, heads * d, k), None), {**attrs, "layout": OCTETS})


def _qkv_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, k, hq, hkv, d in (
        ("one row, heads of 24", 1, 48, 6, 2, 24),
        ("no groups", 5, 64, 4, 4, 16),
        ("many rows", 70, 40, 3, 1, 24),
    ):
        n = (hq + 2 * hkv) * d
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        attrs = {"q_heads": hq, "kv_heads": hkv, "head_dim": d}
        yield Case(name, (x, _weight(rng, n, k), None), attrs)
        yield Case(f"{name}, octets", (x, _octets(rng, n, k), None), {**attrs, "layout": OCTETS})
        yield Case(f"{name}, bias", (x, _weight(rng, n, k), torch.randn(n, generator=rng, dtype=torch.float64)), attrs)


def _activation_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t in (("one row", 1), ("odd rows", 5)):
        for activation in ACTIVATIONS:
            gate, up = (torch.randn(t, 33, generator=rng, dtype=torch.float64) * 2 for _ in range(2))
            yield Case(f"{name}, {activation}", (gate, up), {"activation": activation})


def _gated_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, k, n in _SHAPES:
        for activation in ACTIVATIONS[:2]:
            x = torch.randn(t, k, generator=rng, dtype=torch.float64)
            yield Case(f"{name}, {activation}", (x, _weight(rng, 2 * n, k)), {"activation": activation})
    for name, t, k, n in _OCTET_SHAPES:
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        yield Case(f"{name}, silu", (x, _octets(rng, 2 * n, k)), {"activation": "silu", "layout": OCTETS})


def _logits_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, k, n in _SHAPES:
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        for softcap in (0.0, 3.0):
            yield Case(f"{name}, softcap {softcap:g}", (x, _weight(rng, n, k)), {"softcap": softcap})
    for name, t, k, n in _OCTET_SHAPES:
        x = torch.randn(t, k, generator=rng, dtype=torch.float64)
        yield Case(f"{name}, softcap 3", (x, _octets(rng, n, k)), {"softcap": 3.0, "layout": OCTETS})


def _linear_cost(d: Mapping[str, int], item: int, _: Mapping[str, Attr]) -> Cost:
    t, k, n = d["T"], d["K"], d["N"]
    return Cost(bytes=(n * k + t * k + t * n) * item, flops=2 * t * n * k)


CONTRACTS = (
    OpContract(
        name="linear",
        function=linear,
        inputs=(
            Argument("x", ("T", "K")),
            Argument("weight", ("N", "K"), word=WEIGHT_WORD),
            Argument("bias", ("N",), optional=True),
        ),
        outputs=(Argument("y", ("T", "N")),),
        cost=_linear_cost,
        cases=_linear_cases,
        tolerance=REDUCTION,
        defaults={"layout": ROWS},
    ),
    OpContract(
        name="linear_heads",
        function=linear_heads,
        inputs=(
            Argument("x", ("T", "K")),
            Argument("weight", ("N", "K"), word=WEIGHT_WORD),
            Argument("bias", ("N",), optional=True),
        ),
        outputs=(Argument("y", ("T", "Hx", "D")),),
        cost=_linear_cost,
        cases=_heads_cases,
        tolerance=REDUCTION,
        required=("heads", "head_dim"),
        defaults={"layout": ROWS},
        output_dims=functools.partial(heads_dims, "linear_heads"),
    ),
    OpContract(
        name="linear_qkv",
        function=linear_qkv,
        inputs=(
            Argument("x", ("T", "K")),
            Argument("weight", ("N", "K"), word=WEIGHT_WORD),
            Argument("bias", ("N",), optional=True),
        ),
        outputs=(
            Argument("q", ("T", "Hq", "D")),
            Argument("k", ("T", "Hkv", "D")),
            Argument("v", ("T", "Hkv", "D")),
        ),
        cost=_linear_cost,
        cases=_qkv_cases,
        tolerance=REDUCTION,
        required=("q_heads", "kv_heads", "head_dim"),
        defaults={"layout": ROWS},
        output_dims=functools.partial(qkv_dims, "linear_qkv"),
    ),
    OpContract(
        name="gated_activation",
        function=gated_activation,
        inputs=(Argument("gate", ("T", "N")), Argument("up", ("T", "N"))),
        outputs=(Argument("y", ("T", "N")),),
        cost=lambda d, item, _: Cost(bytes=3 * d["T"] * d["N"] * item, flops=8 * d["T"] * d["N"]),
        cases=_activation_cases,
        tolerance=POINTWISE,
        required=("activation",),
    ),
    OpContract(
        name="linear_gated",
        function=linear_gated,
        inputs=(Argument("x", ("T", "K")), Argument("weight", ("N2", "K"), word=WEIGHT_WORD, joined=2)),
        outputs=(Argument("y", ("T", "N")),),
        cost=lambda d, item, _: Cost(
            bytes=(d["N2"] * d["K"] + d["T"] * (d["K"] + d["N"])) * item, flops=2 * d["T"] * d["N2"] * d["K"]
        ),
        cases=_gated_cases,
        tolerance=REDUCTION,
        required=("activation",),
        defaults={"layout": ROWS},
        output_dims=functools.partial(gated_dims, "linear_gated"),
    ),
    OpContract(
        name="logits",
        function=logits,
        inputs=(Argument("x", ("R", "H")), Argument("weight", ("V", "H"), word=WEIGHT_WORD)),
        outputs=(Argument("logits", ("R", "V"), DType.F32),),
        cost=lambda d, item, _: Cost(
            bytes=(d["V"] * d["H"] + d["R"] * d["H"]) * item + 4 * d["R"] * d["V"], flops=2 * d["R"] * d["V"] * d["H"]
        ),
        cases=_logits_cases,
        tolerance=REDUCTION,
        defaults={"softcap": 0.0, "layout": ROWS},
        rows="R",
    ),
)
