"""Where top-p ends: the smallest set of the likeliest tokens whose mass reaches p.

Owns `nucleus` and the whole numbers that it and every kernel of `filter_logits` compute with. What always holds: from
float32 scores on, all arithmetic is of whole numbers and exact, so no order of summation, number of threads or fused
multiply-add decides what is kept, and a kernel that follows `weights` and `wanted_mass` keeps what every other does.
"""

from __future__ import annotations

import torch

REACH, STEPS = 28.0, 2.0**26
"""A token whose score is less than the greatest by `REACH` or more weighs nothing; nearer, distances are cut to whole
`STEPS`, which a multiplication of float32 by a power of two gives without rounding, and which fit in 31 bits."""

LOG2_E = 1549082005
"""log2(e) in units of 2**-30. Times a distance in `STEPS` it is the exponent of two, in units of 2**-56."""

FRACTION = 31
"""Bits of the exponent's fraction, of the coefficients and of the power: products of two fit in 62 bits."""

CURVE = (1488514809, 515782949, 118750234, 19769377, 2029197)
"""2**-f = 1 - f (c1 - f (c2 - f (c3 - f (c4 - f c5)))) for f from 0 to 1, within 2**-23: c1 to c5 in 2**-FRACTION."""

UNIT = 40
"""The likeliest token weighs 2**UNIT: the weights of 2**22 tokens can be summed in 63 bits."""

SHARE, SLACK = 30, 1 << 10
"""p is cut to units of 2**-SHARE, and a set reaches it with `SLACK` of them less: 2**-20 of the whole mass."""


def weights(scores: torch.Tensor) -> torch.Tensor:
    """exp(score - greatest) of float32 `scores` [V] in units of 2**-UNIT, int64 [V]; 0 where that is no number.

    Within 2**-23 of itself and one unit of the exponential, the same whole number wherever it is computed.
    """
    distance = scores.max() - scores
    steps = (torch.where(distance < REACH, distance, 0.0) * STEPS).long()
    exponent = steps * LOG2_E
    whole, part = exponent >> (26 + 30), (exponent >> (26 + 30 - FRACTION)) & ((1 << FRACTION) - 1)
    power = torch.zeros_like(part)
    for coefficient in (*reversed(CURVE), 1 << FRACTION):
        power = coefficient - ((part * power) >> FRACTION)
    return torch.where(distance < REACH, (power << (UNIT - FRACTION)) >> whole, 0)


def wanted_mass(total: int, p: float) -> int:
    """The mass that reaches `p` of `total`, in the units of `weights`: at least 1, so that the likeliest token is kept.

    It is the product without its last `SHARE` bits, put together of two that fit in 63 bits, as kernels do it.
    """
    share = max(int(p * 2.0**SHARE) - SLACK, 0)
    return max((total >> SHARE) * share + (((total & ((1 << SHARE) - 1)) * share) >> SHARE), 1)


def nucleus(scores: torch.Tensor, p: float) -> torch.Tensor:
    """Which tokens of float32 `scores` [V] top-p keeps: those before which less than the wanted mass stands, bool [V].

    Tokens stand in the order of their scores, of equals the lower token first.
    """
    mass = weights(scores)
    order = scores.sort(descending=True, stable=True).indices
    before = mass[order].cumsum(0) - mass[order]
    kept = torch.empty_like(order, dtype=torch.bool)
    kept[order] = before < wanted_mass(int(mass.sum()), p)
    return kept
