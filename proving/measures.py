"""How far a result is from what it should be, in ways that absolute error does not show.

Owns `ulps_between` and `cosine`. What always holds: both speak of two tensors of one shape; ULPs are counted in the
dtype of the first, the one that a kernel wrote, after the other was rounded to it; what is NaN in both, or the same
infinity in both, agrees.
"""

from __future__ import annotations

import torch

_WORDS = {
    torch.float64: (torch.int64, 2**63 - 1),
    torch.float32: (torch.int32, 2**31 - 1),
    torch.float16: (torch.int16, 2**15 - 1),
    torch.bfloat16: (torch.int16, 2**15 - 1),
}


def ulps_between(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Representable numbers between each element of `got` and `want` rounded to its dtype: int64, of their shape.

    Floating point is sign and magnitude, so its bits, with the negative ones mirrored, count its numbers in order; -0
    and 0 are one number. Where one alone is NaN the distance is 2**62. Integers and truth values count by ones.
    """
    rounded = want.to(got.dtype)
    if got.dtype not in _WORDS:
        return (got.long() - rounded.long()).abs()
    word, magnitude = _WORDS[got.dtype]

    def places(values: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(word).long()
        return torch.where(bits < 0, -(bits & magnitude), bits)

    distance = (places(got) - places(rounded)).abs()
    nan, other = got.isnan(), rounded.isnan()
    distance = torch.where(nan != other, 2**62, distance)
    return torch.where(nan & other, 0, distance)


def cosine(got: torch.Tensor, want: torch.Tensor) -> float:
    """Cosine of the angle between two tensors as vectors, in float64, over the elements that are finite in both.

    1 where there is nothing to compare or both are zero, 0 where one of them alone is zero.
    """
    left, right = got.detach().double().flatten(), want.detach().double().flatten()
    finite = left.isfinite() & right.isfinite()
    left, right = left[finite], right[finite]
    sizes = float(left.norm()), float(right.norm())
    if not all(sizes):
        return 1.0 if sizes[0] == sizes[1] else 0.0
    return max(-1.0, min(1.0, float((left / sizes[0]) @ (right / sizes[1]))))
