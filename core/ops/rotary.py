"""Rotary position embedding, alone and fused with the cache write.

Owns `rotary` and `rotary_write`. What always holds: tables are float32 [M, W] with W half the rotated width, made by
the model (any scaling is in them); dimension i is paired with i + W (the half-split convention of Hugging Face
checkpoints); dimensions beyond 2 W pass through (Su et al., 2021).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slotwise.core.contract import Argument, Case, Cost, OpContract
from slotwise.core.ops.attention import write_slots
from slotwise.core.ops.tolerances import POINTWISE
from slotwise.core.specs import DType


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `x` [T, Hx, D] by `cos` and `sin` [T, W], in float32 or wider, rounded once."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = cos.shape[1]
    c, s = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    first, second = x[..., :width].to(wide), x[..., width : 2 * width].to(wide)
    rotated = torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)
    return torch.cat((rotated, x[..., 2 * width :]), dim=-1)


def rotary(
    q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `q` [T, Hq, D] and `k` [T, Hkv, D] to `positions` [T]; tables `cos`, `sin` [M, W]."""
    index = positions.long()
    c, s = cos.index_select(0, index), sin.index_select(0, index)
    return _rotate(q, c, s), _rotate(k, c, s)


def rotary_write(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layer: int,
) -> torch.Tensor:
    """`rotary`, then rotated K and V into `slots` [T] of the caches [S, Hkv, D]; returns the rotated queries."""
    rotated_q, rotated_k = rotary(q, k, positions, cos, sin)
    write_slots(rotated_k, v, k_cache, v_cache, slots, layer=layer)
    return rotated_q


_SHAPES = (
    # name, T, Hq, Hkv, D, W
    ("one row", 1, 2, 1, 24, 12),
    ("grouped", 6, 6, 2, 32, 16),
    ("part of the head rotated", 3, 2, 2, 40, 8),
    ("many rows", 65, 4, 4, 16, 8),
)


def _tables(positions: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.outer(torch.arange(positions).double(), 100.0 ** -(torch.arange(width) / width).double())
    return angle.cos().float(), angle.sin().float()


def _rotary_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, hq, hkv, d, w in _SHAPES:
        q = torch.randn(t, hq, d, generator=rng, dtype=torch.float64)
        k = torch.randn(t, hkv, d, generator=rng, dtype=torch.float64)
        positions = torch.randint(0, 90, (t,), generator=rng, dtype=torch.int32)
        yield Case(name, (q, k, positions, *_tables(90, w)))


def _rotary_write_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, hq, hkv, d, w in _SHAPES:
        q = torch.randn(t, hq, d, generator=rng, dtype=torch.float64)
        k, v = (torch.randn(t, hkv, d, generator=rng, dtype=torch.float64) for _ in range(2))
        positions = torch.randint(0, 90, (t,), generator=rng, dtype=torch.int32)
        caches = (torch.randn(80, hkv, d, generator=rng, dtype=torch.float64) for _ in range(2))
        slots = torch.randperm(80, generator=rng)[:t].to(torch.int32)
        yield Case(name, (q, k, v, positions, *_tables(90, w), *caches, slots), {"layer": 0})


_CACHE = ("S", "Hkv", "D")

CONTRACTS = (
    OpContract(
        name="rotary",
        function=rotary,
        inputs=(
            Argument("q", ("T", "Hq", "D")),
            Argument("k", ("T", "Hkv", "D")),
            Argument("positions", ("T",), DType.I32),
            Argument("cos", ("M", "W"), DType.F32),
            Argument("sin", ("M", "W"), DType.F32),
        ),
        outputs=(Argument("rotated_q", ("T", "Hq", "D")), Argument("rotated_k", ("T", "Hkv", "D"))),
        cost=lambda d, item, _: Cost(
            bytes=2 * d["T"] * (d["Hq"] + d["Hkv"]) * d["D"] * item + d["T"] * (4 + 8 * d["W"]),
            flops=6 * d["T"] * (d["Hq"] + d["Hkv"]) * d["W"],
        ),
        cases=_rotary_cases,
        tolerance=POINTWISE,
    ),
    OpContract(
        name="rotary_write",
        function=rotary_write,
        inputs=(
            Argument("q", ("T", "Hq", "D")),
            Argument("k", ("T", "Hkv", "D")),
            Argument("v", ("T", "Hkv", "D")),
            Argument("positions", ("T",), DType.I32),
            Argument("cos", ("M", "W"), DType.F32),
            Argument("sin", ("M", "W"), DType.F32),
            Argument("k_cache", _CACHE, cache="writes"),
            Argument("v_cache", _CACHE, cache="writes"),
            Argument("slots", ("T",), DType.I32),
        ),
        outputs=(Argument("rotated_q", ("T", "Hq", "D")),),
        cost=lambda d, item, _: Cost(
            bytes=2 * d["T"] * (d["Hq"] + 2 * d["Hkv"]) * d["D"] * item + d["T"] * (8 + 8 * d["W"]),
            flops=6 * d["T"] * (d["Hq"] + d["Hkv"]) * d["W"],
        ),
        cases=_rotary_write_cases,
        tolerance=POINTWISE,
        required=("layer",),
        state="kv",
        span="slots",
    ),
)
