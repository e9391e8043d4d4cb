"""The loops of quantisation, compiled: the span of each group, the search for its scale, its codes.

Owns `spans`, `least_squares_scales` and `encode`. What always holds: groups are float32 [G, 32] and finite but for
`spans`, which says whether they are; a group's result depends on that group alone. It is compiled at first use and
kept in Numba's cache; only `core/quantise.py` imports it, when it is needed. As tensor operations the same takes five
times as long: some fifty passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

Floats = npt.NDArray[np.float32]

# What the element furthest from 0 may become under `int4`, in codes. From -9 to -7: more codes for all and that one
# clipped, or all within reach; a test holds what five guesses lose on Gaussian groups to a bound.
_EXTREMES = (-8.0, -7.0, -9.0, -7.5, -8.5)
_LEAST_GAIN = np.float32(1 + 2**-20)  # a tie is the first's, else rounding would decide it
_GREATEST = np.float32(np.finfo(np.float32).max)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums may be reordered, which vector units need; NaN and infinity keep their meaning."""
    reordered = {"reassoc", "contract", "nsz"}
    try:
        return cast("Callable[..., Any]", njit(cache=True, error_model="numpy", fastmath=reordered)(function))
    except RuntimeError:  # no folder to keep it in
        return cast("Callable[..., Any]", njit(error_model="numpy", fastmath=reordered)(function))


@_compiled
def _spans(groups: Floats, low: Floats, high: Floats) -> bool:
    all_finite = True
    for i in range(len(groups)):
        least = greatest = groups[i, 0]
        finite = True
        for j in range(32):
            value = groups[i, j]
            finite &= abs(value) <= _GREATEST
            least = min(least, value)
            greatest = max(greatest, value)
        low[i], high[i] = least, greatest
        all_finite &= finite
    return all_finite


@_compiled
def _fit(groups: Floats, scale: Floats) -> None:
    """For given codes q the best scale is w.q / q.q, and it lowers the squared error w.w by (w.q)^2 / q.q."""
    for i in range(len(groups)):
        extreme = np.float32(0)
        for j in range(32):
            if abs(groups[i, j]) > abs(extreme):
                extreme = groups[i, j]
        best, gain = np.float32(0), np.float32(0)
        for k in range(len(_EXTREMES) + 1):
            # Last, the codes of the best scale so far, fitted once more.
            step = extreme / np.float32(_EXTREMES[k]) if k < len(_EXTREMES) else best
            inverse = np.float32(1) / step if step != 0 else np.float32(0)
            along, square = np.float32(0), np.float32(0)
            for j in range(32):
                code = min(max(np.rint(groups[i, j] * inverse), np.float32(-8)), np.float32(7))
                along += groups[i, j] * code
                square += code * code
            if square > 0 and along / square * along > gain * _LEAST_GAIN:
                best, gain = along / square, along / square * along
        scale[i] = best


@_compiled
def _encode(
    groups: Floats, scale: Floats, offset: Floats, low: float, high: float, codes: npt.NDArray[np.int8]
) -> None:
    for i in range(len(groups)):
        inverse = np.float32(1) / scale[i] if scale[i] != 0 else np.float32(0)
        for j in range(32):
            code = min(max(np.rint((groups[i, j] - offset[i]) * inverse), np.float32(low)), np.float32(high))
            codes[i, j] = np.int8(code)


def spans(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The least and the greatest element of each group, float32 [G], and whether all elements are finite."""
    low, high = (torch.empty(len(groups)) for _ in range(2))
    is_finite = bool(_spans(groups.numpy(), low.numpy(), high.numpy()))
    return low, high, is_finite


def least_squares_scales(groups: torch.Tensor) -> torch.Tensor:
    """For each group a scale of either sign, float32 [G], under which codes -8 .. 7 have a small squared error.

    Codes follow from a few guesses of the scale, the scale from the codes by least squares, and the best is kept.
    """
    scale = torch.empty(len(groups))
    _fit(groups.numpy(), scale.numpy())
    return scale


def encode(groups: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, low: int, high: int) -> torch.Tensor:
    """The nearest codes, int8 [G, 32], of (groups - offset) / scale, from `low` to `high`; 0 where the scale is 0."""
    codes = torch.empty(groups.shape, dtype=torch.int8)
    base = torch.zeros(len(groups)) if offset is None else offset.float()
    _encode(groups.numpy(), scale.float().numpy(), base.numpy(), float(low), float(high), codes.numpy())
    return codes
