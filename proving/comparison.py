"""How far an output may be from the oracle, and how far it is.

Owns `allowed_distance` and `compare`. What always holds: both work in float64; numbers that name something (tokens,
counts, slots of a cache that an op leaves alone) are right or wrong; a NaN is right where the oracle has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slotwise.core.contract import Argument, OpContract
from slotwise.core.specs import DType
from slotwise.proving.guard_zones import unravel


def allowed_distance(
    contract: OpContract,
    dtype: DType,
    argument: Argument,
    expected: Mapping[str, torch.Tensor],
    seen: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The distance from `expected` that each element may have: float64, of its shape."""
    want = expected[argument.name]
    wide = want.double()
    allowed = contract.tolerance[dtype].around(wide)
    if argument.cache == "writes":
        # What the op leaves alone in a cache belongs to other tokens: there no difference is small.
        allowed = torch.where(want == seen[argument.name], 0.0, allowed)
    if not want.dtype.is_floating_point:
        # Token numbers and counts are right or wrong. A row that is not ok has no token.
        allowed = torch.zeros_like(wide)
        ok = expected.get("ok")
        if ok is not None and argument.name != "ok":
            allowed[~ok] = math.inf
    return allowed


@dataclass(frozen=True, slots=True)
class Comparison:
    """The greatest distances, where the worst is, and what is wrong (empty when nothing)."""

    error: float
    relative: float
    index: tuple[int, ...]
    message: str


def compare(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> Comparison:
    """How far `got` is from `want` (float64, of one shape); where nothing is allowed, from `want` in `got`'s dtype."""
    found = got.double()
    rounded = want.to(got.dtype).double()
    wide = torch.where(allowed == 0, rounded, want.double())
    same = (found == wide) | (found.isnan() & wide.isnan()) | allowed.isinf()
    distance = torch.where(same, 0.0, (found - wide).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not distance.numel():
        return Comparison(0.0, 0.0, (), "")
    wrong = distance > allowed
    at = int(torch.where(wrong, distance - allowed, -math.inf).argmax() if bool(wrong.any()) else distance.argmax())
    index = unravel(at, distance.shape)
    error = float(distance.flatten()[at])
    relative = float((distance / wide.abs().clamp(min=1e-30)).nan_to_num(nan=0.0).max())
    message = ""
    if bool(wrong.any()):
        message = (
            f"is {got.flatten()[at].item()}, expected {wide.flatten()[at].item()}: off by {error:.3g} where "
            f"{float(allowed.flatten()[at]):.3g} is allowed ({int(wrong.sum())} of {got.numel()} elements are wrong)"
        )
    return Comparison(error, relative, index, message)
