"""Normalisation and the residual stream.

Owns `add`, `rms_norm`, `add_rms_norm` and `head_rms_norm`. What always holds: the mean square and the product with the
weight are taken in float32 or wider, whatever the dtype (Zhang and Sennrich, 2019; each family's rounding as its
published models were trained with is chosen by `weight_offset`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slotwise.core.contract import Argument, Case, Cost, OpContract
from slotwise.core.ops.tolerances import POINTWISE


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a + b`, both [T, H]."""
    return a + b


def rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float) -> torch.Tensor:
    """`x / sqrt(mean(x**2) + eps) * (weight_offset + weight)` over the last dimension.

    With `weight_offset` 0 (Llama, Qwen) the normalised row is rounded to the dtype before the weight multiplies it;
    with 1 (Gemma) the product is taken in float32 and rounded once.
    """
    wide = _wide(x)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight_offset == 0.0:
        return weight * normed.to(x.dtype)
    return (normed * (weight_offset + _wide(weight))).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`total = x + residual` rounded to the dtype, and `rms_norm(total)`; returns (total, normed)."""
    total = x + residual
    return total, rms_norm(total, weight, eps=eps, weight_offset=weight_offset)


def head_rms_norm(x: torch.Tensor, weight: torch.Tensor, *, eps: float, weight_offset: float) -> torch.Tensor:
    """`rms_norm` over each head of `x` [T, Hx, D] with one weight [D] (Qwen3's and Gemma 3's q/k norm)."""
    return rms_norm(x, weight, eps=eps, weight_offset=weight_offset)


_SHAPES = (("one row", 1, 24), ("ragged rows", 7, 192), ("wide", 3, 1000))


def _add_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, h in _SHAPES:
        yield Case(name, tuple(torch.randn(t, h, generator=rng, dtype=torch.float64) for _ in range(2)))


def _norm_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, h in _SHAPES:
        for offset in (0.0, 1.0):
            x = torch.randn(t, h, generator=rng, dtype=torch.float64) * 3
            weight = torch.randn(h, generator=rng, dtype=torch.float64)
            yield Case(f"{name}, offset {offset:g}", (x, weight), {"eps": 1e-6, "weight_offset": offset})


def _add_norm_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, h in _SHAPES:
        for offset in (0.0, 1.0):
            x, residual = (torch.randn(t, h, generator=rng, dtype=torch.float64) for _ in range(2))
            weight = torch.randn(h, generator=rng, dtype=torch.float64)
            yield Case(f"{name}, offset {offset:g}", (x, residual, weight), {"eps": 1e-6, "weight_offset": offset})


def _head_norm_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, heads, d in (("one row", 1, 1, 24), ("odd heads", 5, 3, 24), ("wide", 2, 8, 128)):
        for offset in (0.0, 1.0):
            x = torch.randn(t, heads, d, generator=rng, dtype=torch.float64) * 3
            weight = torch.randn(d, generator=rng, dtype=torch.float64)
            yield Case(f"{name}, offset {offset:g}", (x, weight), {"eps": 1e-6, "weight_offset": offset})


_NORM_DEFAULTS = {"weight_offset": 0.0}

CONTRACTS = (
    OpContract(
        name="add",
        function=add,
        inputs=(Argument("a", ("T", "H")), Argument("b", ("T", "H"))),
        outputs=(Argument("sum", ("T", "H")),),
        cost=lambda d, item, _: Cost(bytes=3 * d["T"] * d["H"] * item, flops=d["T"] * d["H"]),
        cases=_add_cases,
        tolerance=POINTWISE,
    ),
    OpContract(
        name="rms_norm",
        function=rms_norm,
        inputs=(Argument("x", ("T", "H")), Argument("weight", ("H",))),
        outputs=(Argument("normed", ("T", "H")),),
        cost=lambda d, item, _: Cost(bytes=(2 * d["T"] + 1) * d["H"] * item, flops=4 * d["T"] * d["H"]),
        cases=_norm_cases,
        tolerance=POINTWISE,
        required=("eps",),
        defaults=_NORM_DEFAULTS,
    ),
    OpContract(
        name="add_rms_norm",
        function=add_rms_norm,
        inputs=(Argument("x", ("T", "H")), Argument("residual", ("T", "H")), Argument("weight", ("H",))),
        outputs=(Argument("total", ("T", "H")), Argument("normed", ("T", "H"))),
        cost=lambda d, item, _: Cost(bytes=(4 * d["T"] + 1) * d["H"] * item, flops=5 * d["T"] * d["H"]),
        cases=_add_norm_cases,
        tolerance=POINTWISE,
        required=("eps",),
        defaults=_NORM_DEFAULTS,
    ),
    OpContract(
        name="head_rms_norm",
        function=head_rms_norm,
        inputs=(Argument("x", ("T", "Hx", "D")), Argument("weight", ("D",))),
        outputs=(Argument("normed", ("T", "Hx", "D")),),
        cost=lambda d, item, _: Cost(
            bytes=(2 * d["T"] * d["Hx"] + 1) * d["D"] * item, flops=4 * d["T"] * d["Hx"] * d["D"]
        ),
        cases=_head_norm_cases,
        tolerance=POINTWISE,
        required=("eps",),
        defaults=_NORM_DEFAULTS,
    ),
)
