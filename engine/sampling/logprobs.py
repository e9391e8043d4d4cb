"""Log-probabilities of tokens, from a row of the model's logits.

Owns `TokenLogprobs` and `logprobs_of`. What always holds: they are the model's own, from logits that no penalty, bias,
ban or filter has touched; sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = bytes  # a field of that name hides the type
BytesOf = Callable[[int], Bytes]
"""What a token adds to a text, special tokens shown."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural) at one position, from the model's logits before any sampler.

    `logprob` is the chosen token's and `rank` its place among all, 1 for the likeliest; `top` maps the most likely
    token ids to theirs, likeliest first. `bytes` are what the token adds to a text, and `top_bytes` what each of `top`
    would: a token may be a part of a character. Without a tokenizer they are None.
    """

    token_id: int
    logprob: float
    rank: int
    top: Mapping[int, float]
    bytes: Bytes | None
    top_bytes: Mapping[int, Bytes] | None

    @property
    def text(self) -> str | None:
        """`bytes` as text, where a part of a character is U+FFFD."""
        return None if self.bytes is None else self.bytes.decode(errors="replace")


def logprobs_of(
    logits: npt.NDArray[np.float32], tokens: Sequence[int], top: int, bytes_of: BytesOf | None
) -> tuple[TokenLogprobs, ...]:
    """Log-probabilities (natural) of `tokens`, one a row of raw `logits` [>= n, V], with the `top` likeliest of each.

    Of equally likely tokens the lower id comes first, and all have the rank of the first. -1 is all tokens.
    """
    found = []
    for row, token in zip(logits, tokens, strict=False):
        wide = row.astype(np.float64)
        wide -= wide.max()
        wide -= np.log(np.exp(wide).sum())
        count = wide.size if top < 0 else top
        order = _likeliest(wide, min(count, wide.size)).tolist()
        likeliest = {t: float(wide[t]) for t in order}
        rank = 1 + int(np.count_nonzero(wide > wide[token]))
        if bytes_of is None:
            found.append(TokenLogprobs(token, float(wide[token]), rank, likeliest, None, None))
        else:
            spoken = {t: bytes_of(t) for t in order}
            found.append(TokenLogprobs(token, float(wide[token]), rank, likeliest, bytes_of(token), spoken))
    return tuple(found)


def _likeliest(values: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Where the `count` greatest of `values` stand, the greatest first, equal ones in their order."""
    if not count:
        return np.empty(0, np.int64)
    # A vocabulary is large, and sorting all of it takes many times as long as finding the least that is wanted.
    wanted = np.flatnonzero(values >= np.partition(values, values.size - count)[values.size - count])
    return wanted[np.lexsort((wanted, -values[wanted]))][:count]
