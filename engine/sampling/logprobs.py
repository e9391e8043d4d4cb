"""Log-probabilities of tokens, from a row of the model's logits.

Owns `TokenLogprobs` and `logprobs_of`. What always holds: they are the model's own, from logits that no penalty, bias,
ban or filter has touched; sums run in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural) at one position, from the model's logits before any sampler.

    `logprob` is the chosen token's; `top` maps the most likely token ids to theirs.
    """

    token_id: int
    logprob: float
    top: Mapping[int, float]


def logprobs_of(logits: npt.NDArray[np.float32], tokens: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities (natural) of `tokens`, one a row of raw `logits` [>= n, V], with the `top` likeliest of each.

    Of equally likely tokens the lower id comes first.
    """
    found = []
    for row, token in zip(logits, tokens, strict=False):
        wide = row.astype(np.float64)
        wide -= wide.max()
        wide -= np.log(np.exp(wide).sum())
        order = np.lexsort((np.arange(wide.size), -wide))[:top].tolist() if top else []
        found.append(TokenLogprobs(token, float(wide[token]), {t: float(wide[t]) for t in order}))
    return tuple(found)
