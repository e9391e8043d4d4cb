"""From logits to tokens: filters, coupled sampling and acceptance.

Owns `filter_logits`, `greedy`, `sample`, `accept_coupled` and `accept_rejection`. What always holds:
a row's result depends on that row alone; where a row's `ok` is false (NaN, infinite or nothing left to choose from) its
token means nothing, and is still within the vocabulary, for the next round of a draft loop is fed it unseen; noise is
counter-based, keyed by (seed, position, token).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slotwise.core.contract import Argument, Case, Cost, OpContract
from slotwise.core.ops.noise import ACCEPT_STREAM, RESIDUAL_STREAM, TARGET_STREAM, uniform_noise
from slotwise.core.ops.nucleus import nucleus
from slotwise.core.ops.tolerances import BIT_EQUAL, POINTWISE
from slotwise.core.specs import DType

_INF = float("inf")


def filter_logits(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Scores [R, V] whose softmax is the sampling distribution: temperature, top-k, top-p, min-p, in that order.

    Temperature 0 leaves one token, the greatest, the first of equals. Off values: top_k 0, top_p 1, min_p 0. A token
    that equals the k-th greatest stays; top-p keeps the smallest set whose mass reaches p (Holtzman et al., 2020);
    min-p drops tokens less likely than min_p times the likeliest (Nguyen et al., 2024).

    Which tokens top-k and top-p keep is decided on the scores rounded to float32, in which kernels have them, so the
    oracle sees the ties that they see. Where top-p ends is one definition for all kernels (`nucleus.py`):

    - Tokens stand in the order of their scores, of equals the lower token first. One is kept where the mass before it
      is below p, so at a boundary the set that has p exactly is all: transformers 5, vLLM and llama.cpp end there too.
    - Mass is a sum of whole numbers, so the order in which a kernel adds decides nothing.
    - A mass within 2**-20 of p reaches it. Logits and p are rounded before this op sees them (0.8 is 0.800000012 in
      float32), and what adds up to p before they were rounded must not depend on which way. That covers scores up to 8
      in size; beyond, an exact boundary may fall on either side, yet on the same side in every kernel.
    - p = 0, or any p up to 2**-20, keeps one token. Below 1, p drops what is less likely by e**-28 than the likeliest.
    """
    scores = logits.clone()
    cold = temperature == 0
    if cold.any():
        rows = scores[cold]
        best = rows.argmax(-1, keepdim=True)
        only = torch.full_like(rows, -_INF).scatter_(1, best, rows.gather(1, best) * 0.0)
        scores[cold] = only
    warm = ~cold
    if warm.any():
        scores[warm] = scores[warm] / temperature[warm].to(scores.dtype).unsqueeze(1)
    limited = warm & (top_k > 0) & (top_k < scores.shape[1])
    for i in limited.nonzero().flatten().tolist():
        rounded = scores[i].float()
        kth = rounded.topk(int(top_k[i])).values[-1]
        scores[i].masked_fill_(rounded < kth, -_INF)
    for i in (warm & (top_p < 1)).nonzero().flatten().tolist():
        scores[i].masked_fill_(~nucleus(scores[i].float(), float(top_p[i])), -_INF)
    for i in (warm & (min_p > 0)).nonzero().flatten().tolist():
        scores[i].masked_fill_(scores[i] < scores[i].max() + min_p[i].to(scores.dtype).log(), -_INF)
    return scores


def _finite_max(best: torch.Tensor) -> torch.Tensor:
    """A row can be sampled when its greatest value is finite: torch's max hands a NaN in the row on."""
    return torch.isfinite(best)


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The greatest entry of each row of `logits` [R, V], the first of equals: tokens [R], ok [R]."""
    best, token = logits.max(-1)
    return token.int(), _finite_max(best)


def sample(
    scores: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor, *, stream: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from softmax(scores) [R, V] by the Gumbel-max trick with noise for (seed, position, token): tokens, ok [R].

    The same noise for the drafter and the target makes them agree as often as coupling can, and makes the token a
    function of (scores, seed, position) alone (Daliri, Musco and Suresh, "Coupling without communication and
    drafter-invariant speculative decoding", 2024).
    """
    noise = uniform_noise(seed, positions, scores.shape[1], stream)
    gumbel = -torch.log(-torch.log(noise.to(scores.dtype)))
    ok = _finite_max(scores.max(-1).values)
    return (scores + gumbel).argmax(-1).int(), ok


def accept_coupled(sampled: torch.Tensor, token_ids: torch.Tensor, row_start: torch.Tensor) -> torch.Tensor:
    """How many drafts of each sequence equal what was sampled in their place: accepted [B].

    Row i fed `token_ids[i]` and gave `sampled[i]`; within a sequence, draft `token_ids[i + 1]` stands where
    `sampled[i]` would. Counting stops at the first difference.
    """
    accepted = torch.zeros(len(row_start) - 1, dtype=torch.int32, device=sampled.device)
    starts = row_start.tolist()
    for b in range(len(starts) - 1):
        first, last = starts[b], starts[b + 1]
        if last - first > 1:
            same = sampled[first : last - 1] == token_ids[first + 1 : last]
            accepted[b] = same.int().cumprod(0).sum()
    return accepted


def accept_rejection(
    target_scores: torch.Tensor,
    draft_scores: torch.Tensor,
    token_ids: torch.Tensor,
    row_start: torch.Tensor,
    seed: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Speculative sampling: accepted [B], the token after them [B], ok [B].

    Row i holds the target's scores and those the drafter drew `token_ids[i + 1]` from, for the token at `positions[i]`.
    A draft x is accepted with probability min(1, p(x) / q(x)); the first one refused is replaced by a draw from
    max(p - q, 0), and after all were accepted one more token is drawn from p (Leviathan et al. 2023; Chen et al. 2023).
    `seed` and `positions` are per row [R].
    A row that cannot be drawn from ends the run: the drafts before it stand, and `ok` is false.
    """
    batch = len(row_start) - 1
    accepted = torch.zeros(batch, dtype=torch.int32, device=token_ids.device)
    following = torch.zeros(batch, dtype=torch.int32, device=token_ids.device)
    ok = torch.ones(batch, dtype=torch.bool, device=token_ids.device)
    starts = row_start.tolist()
    for b in range(batch):
        first, last = starts[b], starts[b + 1]
        if first == last:
            continue
        finite = _finite_max(target_scores[first:last].max(-1).values).tolist()
        stop = last - 1
        residual: torch.Tensor | None = None
        for i in range(first, last - 1):
            if not finite[i - first]:
                stop = i
                break
            p, q = target_scores[i].double().softmax(-1), draft_scores[i].double().softmax(-1)
            drafted = int(token_ids[i + 1])
            u = float(uniform_noise(seed[i : i + 1], positions[i : i + 1], 1, ACCEPT_STREAM))
            if u * float(q[drafted]) >= float(p[drafted]):
                stop, residual = i, (p - q).clamp_(min=0)
                break
        accepted[b] = stop - first
        if not finite[stop - first]:
            ok[b] = False
            continue
        row = slice(stop, stop + 1)
        # A residual without mass means p = q up to rounding; a draw from p is then the same draw.
        if residual is not None and float(residual.sum()) > 0:
            scores = residual.log().unsqueeze(0).to(target_scores.dtype)
            following[b] = sample(scores, seed[row], positions[row], stream=RESIDUAL_STREAM)[0][0]
        else:
            following[b] = sample(target_scores[row], seed[row], positions[row], stream=TARGET_STREAM)[0][0]
    return accepted, following, ok


def _logits(rng: torch.Generator, r: int, v: int) -> torch.Tensor:
    return torch.randn(r, v, generator=rng, dtype=torch.float64).float() * 3


def _filter_cases(rng: torch.Generator) -> Iterable[Case]:
    settings = (
        ("greedy", 0.0, 0, 1.0, 0.0),
        ("temperature", 0.7, 0, 1.0, 0.0),
        ("top-k", 1.0, 5, 1.0, 0.0),
        ("top-k above V", 1.0, 500, 1.0, 0.0),
        ("top-p", 0.9, 0, 0.8, 0.0),
        ("tiny top-p", 1.0, 0, 1e-6, 0.0),
        ("min-p", 1.3, 0, 1.0, 0.1),
        ("all", 0.8, 20, 0.9, 0.02),
    )
    for name, *values in settings:
        yield Case(name, (_logits(rng, 1, 101), *_controls([values])))
    yield Case("mixed rows", (_logits(rng, len(settings), 101), *_controls([s[1:] for s in settings])))
    yield from _boundary_cases(rng)


def _boundary_cases(rng: torch.Generator) -> Iterable[Case]:
    """Rows in which masses are p itself, or differ from it by a unit in the last place, or by very many small ones."""
    skewed, even = torch.tensor([0.3, 0.1, 0.1, 0.5]).log(), torch.full((5,), 0.2).log()
    yield _top_p("p reached by two tokens, before a tie", skewed, 0.8)
    yield _top_p("p reached within a tie", even, 0.6)
    yield _top_p("p reached a last place earlier or later", skewed, *_around(0.5), *_around(0.8), *_around(0.9))
    yield _top_p("p reached at each of equal tokens", torch.zeros(10), *(i / 10 for i in range(10)), *_around(0.7))
    yield _top_p("p reached to the unit of mass", torch.zeros(4), *(p for i in (1, 2) for p in _around(i / 4 + 2**-20)))
    yield _top_p("p reached at other temperatures", skewed * 0.7, *_around(0.8), temperature=0.7)
    yield _top_p("one token has nearly all mass", torch.tensor([0.0, 40.0, 12.0, 27.0]), 0.0, 0.5, *_around(1.0)[:1])
    yield _top_p("a vocabulary of one", torch.zeros(1), 0.0, 1e-6, 0.5)
    banned = torch.tensor([-_INF, 1.0, -_INF, 1.0, 1.0, -_INF, 1.0])
    yield _top_p("banned tokens among equals", banned, 0.0, *_around(0.25), *_around(0.5), 0.99)
    yield _top_p("zeros of either sign", torch.tensor([-0.0, 0.0, -0.0, 0.0, -1.0]), 0.2, 0.4, 0.6)
    yield _top_p("after top-k", torch.tensor([4.0, 2, 1, 1, 1, 1]).log(), 0.4, *_around(0.5), 0.8, top_k=3)
    tail = torch.cat((torch.zeros(1), torch.full((2999,), 1 / 2999).log()))
    places = torch.randperm(3000, generator=rng)
    yield _top_p("half the mass in thousands of tokens", tail[places], *_around(0.5), 0.75)


def _top_p(name: str, logits: torch.Tensor, *ps: float, temperature: float = 1.0, top_k: int = 0) -> Case:
    """A row of `logits` [V] for each p."""
    return Case(name, (logits.repeat(len(ps), 1), *_controls([(temperature, top_k, p, 0.0) for p in ps])))


def _around(p: float) -> tuple[float, float, float]:
    """The float32 numbers below `p`, nearest to it, and above."""
    nearest = torch.tensor(p)
    below, above = (nearest.nextafter(torch.tensor(limit)) for limit in (-_INF, _INF))
    return float(below), float(nearest), float(above)


def _controls(rows: list[list[float]] | list[tuple[float, int, float, float]]) -> tuple[torch.Tensor, ...]:
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    return temperature.float(), top_k.int(), top_p.float(), min_p.float()


def _keys(rng: torch.Generator, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    seed = torch.randint(-(2**62), 2**62, (r,), generator=rng, dtype=torch.int64)
    return seed, torch.randint(0, 4096, (r,), generator=rng, dtype=torch.int32)


def _greedy_cases(rng: torch.Generator) -> Iterable[Case]:
    for r, v in ((1, 101), (7, 33), (64, 257)):
        yield Case(f"{r} rows of {v}", (_logits(rng, r, v),))
    tied = torch.zeros(2, 9)
    tied[1, 4:] = 1.0
    yield Case("first of equals", (tied,))
    broken = _logits(rng, 4, 17)
    broken[1, 3], broken[2, 5], broken[3] = float("nan"), _INF, -_INF
    yield Case("NaN, infinite and empty rows", (broken,))


def _sample_cases(rng: torch.Generator) -> Iterable[Case]:
    for r, v in ((1, 101), (7, 33), (20, 258)):
        yield Case(f"{r} rows of {v}", (_logits(rng, r, v), *_keys(rng, r)), {"stream": TARGET_STREAM})
    one = torch.full((3, 50), -_INF)
    one[torch.arange(3), torch.tensor([0, 49, 7])] = 0.0
    yield Case("one token left", (one, *_keys(rng, 3)), {"stream": TARGET_STREAM})
    broken = _logits(rng, 4, 17)
    broken[1, 3], broken[2], broken[3] = float("nan"), float("nan"), -_INF
    yield Case("NaN and empty rows", (broken, *_keys(rng, 4)), {"stream": TARGET_STREAM})


def _accept_cases(rng: torch.Generator) -> Iterable[Case]:
    starts = torch.tensor([0, 4, 5, 5, 8], dtype=torch.int32)
    token_ids = torch.tensor([9, 1, 2, 3, 9, 9, 4, 5], dtype=torch.int32)
    for name, sampled in (
        ("all", [1, 2, 3, 7, 8, 4, 5, 6]),
        ("none", [0, 2, 3, 7, 8, 0, 5, 6]),
        ("some", [1, 2, 0, 7, 8, 4, 0, 6]),
    ):
        yield Case(name, (torch.tensor(sampled, dtype=torch.int32), token_ids, starts))


def _rejection_cases(rng: torch.Generator) -> Iterable[Case]:
    starts = torch.tensor([0, 4, 5, 5, 8], dtype=torch.int32)
    token_ids = torch.randint(0, 17, (8,), generator=rng, dtype=torch.int32)
    yield Case("ragged", (_logits(rng, 8, 17), _logits(rng, 8, 17), token_ids, starts, *_keys(rng, 8)))
    same = _logits(rng, 8, 17)
    yield Case("drafter equals target", (same, same.clone(), token_ids, starts, *_keys(rng, 8)))


_F32, _I32, _I64 = DType.F32, DType.I32, DType.I64
_ROWS = Argument("row_start", ("B+1",), _I32)


CONTRACTS = (
    OpContract(
        name="filter_logits",
        function=filter_logits,
        inputs=(
            Argument("logits", ("R", "V"), _F32),
            Argument("temperature", ("R",), _F32),
            Argument("top_k", ("R",), _I32),
            Argument("top_p", ("R",), _F32),
            Argument("min_p", ("R",), _F32),
        ),
        outputs=(Argument("scores", ("R", "V"), _F32),),
        cost=lambda d, item, _: Cost(bytes=8 * d["R"] * d["V"], flops=4 * d["R"] * d["V"]),
        cases=_filter_cases,
        tolerance=POINTWISE,
        rows="R",
    ),
    OpContract(
        name="greedy",
        function=greedy,
        inputs=(Argument("logits", ("R", "V"), _F32),),
        outputs=(Argument("tokens", ("R",), _I32, below="V"), Argument("ok", ("R",), DType.BOOL)),
        cost=lambda d, item, _: Cost(bytes=4 * d["R"] * d["V"], flops=d["R"] * d["V"]),
        cases=_greedy_cases,
        tolerance=BIT_EQUAL,
        rows="R",
    ),
    OpContract(
        name="sample",
        function=sample,
        inputs=(
            Argument("scores", ("R", "V"), _F32),
            Argument("seed", ("R",), _I64),
            Argument("positions", ("R",), _I32),
        ),
        outputs=(Argument("tokens", ("R",), _I32, below="V"), Argument("ok", ("R",), DType.BOOL)),
        cost=lambda d, item, _: Cost(bytes=4 * d["R"] * d["V"], flops=40 * d["R"] * d["V"]),
        cases=_sample_cases,
        tolerance=BIT_EQUAL,
        required=("stream",),
        rows="R",
    ),
    OpContract(
        name="accept_coupled",
        function=accept_coupled,
        inputs=(Argument("sampled", ("R",), _I32), Argument("token_ids", ("R",), _I32), _ROWS),
        outputs=(Argument("accepted", ("B",), _I32),),
        cost=lambda d, item, _: Cost(bytes=8 * d["R"] + 8 * d["B"], flops=d["R"]),
        cases=_accept_cases,
        tolerance=BIT_EQUAL,
        rows=None,
    ),
    OpContract(
        name="accept_rejection",
        function=accept_rejection,
        inputs=(
            Argument("target_scores", ("R", "V"), _F32),
            Argument("draft_scores", ("R", "V"), _F32),
            Argument("token_ids", ("R",), _I32),
            _ROWS,
            Argument("seed", ("R",), _I64),
            Argument("positions", ("R",), _I32),
        ),
        outputs=(
            Argument("accepted", ("B",), _I32),
            Argument("following", ("B",), _I32),
            Argument("ok", ("B",), DType.BOOL),
        ),
        cost=lambda d, item, _: Cost(bytes=8 * d["R"] * d["V"], flops=20 * d["R"] * d["V"]),
        cases=_rejection_cases,
        tolerance=BIT_EQUAL,
        rows=None,
    ),
)
