"""From logits to tokens.

Owns the kernels of `filter_logits`, `greedy`, `sample`, `accept_coupled` and `accept_rejection`. What always holds: a
row's result depends on that row alone; the greatest value and the lowest token of equals are found piece by piece, in
any order the same; a row with a NaN, an infinity or nothing left has `ok` false and a token within the vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from slotwise.backends._gpu.kernels import Scratch, aligned_size
from slotwise.backends.cuda_triton.configurations import configure
from slotwise.backends.cuda_triton.filters import filter_rows
from slotwise.backends.cuda_triton.launch import Grid, triton_kernel
from slotwise.backends.cuda_triton.noise import gumbel_noise, uniform_noise
from slotwise.core.backend import CallSpec
from slotwise.core.ops.noise import ACCEPT_STREAM, RESIDUAL_STREAM, TARGET_STREAM
from slotwise.core.specs import DType

PIECE = 4096
"""Tokens of a row that one program looks at."""


@triton.jit
def best_of(values, token, BLOCK: tl.constexpr):
    """The greatest of `values` and the lowest token that has it; a NaN is passed over."""
    clean = tl.where(values == values, values, float("-inf"))
    best = tl.max(clean, axis=0)
    return best, tl.min(tl.where(clean == best, token, 2147483647), axis=0)


@triton.jit
def best_of_piece(
    scores, seed, positions, best_value, best_token, best_score, size, pieces, stream,
    NOISY: tl.constexpr, PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one piece of a row: the greatest score plus noise, its token, and the greatest score (NaN if there is one)."""
    row, piece = tl.program_id(0), tl.program_id(1)
    start = piece * PIECE
    value, token, score = float("-inf"), start, float("-inf")
    broken = 0
    for first in range(start, tl.minimum(start + PIECE, size), BLOCK):
        index = first + tl.arange(0, BLOCK)
        raw = tl.load(scores + row.to(tl.int64) * size + index, mask=index < size, other=float("-inf"))
        broken += tl.sum((raw != raw).to(tl.int32), axis=0)
        score = tl.maximum(score, tl.max(tl.where(raw == raw, raw, float("-inf")), axis=0))
        if NOISY:
            raw += gumbel_noise(tl.load(seed + row), tl.load(positions + row), first, stream, BLOCK)
        its_value, its_token = best_of(raw, index, BLOCK)
        token = tl.where(its_value > value, its_token, token)
        value = tl.maximum(value, its_value)
    at = row * pieces + piece
    tl.store(best_value + at, value)
    tl.store(best_token + at, token)
    tl.store(best_score + at, tl.where(broken > 0, float("nan"), score))


@triton.jit
def best_of_row(best_value, best_token, best_score, tokens, ok, pieces, BLOCK: tl.constexpr):
    """The best of a row's pieces, and whether the row can be drawn from."""
    row = tl.program_id(0)
    piece = tl.arange(0, BLOCK)
    inside = piece < pieces
    value = tl.load(best_value + row * pieces + piece, mask=inside, other=float("-inf"))
    token = tl.load(best_token + row * pieces + piece, mask=inside, other=2147483647)
    _, chosen = best_of(value, token, BLOCK)
    score = tl.load(best_score + row * pieces + piece, mask=inside, other=float("-inf"))
    broken = tl.sum((score != score).to(tl.int32), axis=0)
    highest = tl.max(tl.where(score == score, score, float("-inf")), axis=0)
    tl.store(tokens + row, chosen)
    tl.store(ok + row, (broken == 0) & (highest > float("-inf")) & (highest < float("inf")))


@triton.jit
def count_accepted(sampled, token_ids, row_start, accepted, BLOCK: tl.constexpr):
    """How many drafts of one sequence equal what was sampled in their place."""
    b = tl.program_id(0)
    first, last = tl.load(row_start + b), tl.load(row_start + b + 1)
    drafts = tl.maximum(last - first - 1, 0)
    index = tl.arange(0, BLOCK)
    inside = index < drafts
    drawn = tl.load(sampled + first + index, mask=inside, other=0)
    drafted = tl.load(token_ids + first + index + 1, mask=inside, other=0)
    tl.store(accepted + b, tl.min(tl.where(inside & (drawn != drafted), index, drafts), axis=0))


@triton.jit
def softmax_terms(scores, row, size, BLOCK: tl.constexpr):
    """The greatest value of a row, the sum of exp(value - greatest), and how many NaNs it has."""
    highest = float("-inf")
    broken = 0
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        values = tl.load(scores + row * size + index, mask=index < size, other=float("-inf"))
        broken += tl.sum((values != values).to(tl.int32), axis=0)
        highest = tl.maximum(highest, tl.max(tl.where(values == values, values, float("-inf")), axis=0))
    mass = 0.0
    for first in range(0, size, BLOCK):
        index = first + tl.arange(0, BLOCK)
        values = tl.load(scores + row * size + index, mask=index < size, other=float("-inf"))
        mass += tl.sum(tl.exp(values - highest), axis=0)
    return highest, mass, broken


@triton.jit
def accept_or_replace(
    target_scores, draft_scores, token_ids, row_start, seed, positions, accepted, following, ok, size,
    ACCEPT_STREAM: tl.constexpr, RESIDUAL_STREAM: tl.constexpr, TARGET_STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Speculative sampling for one sequence: its drafts in turn, then the token after those that stand."""
    b = tl.program_id(0)
    first, last = tl.load(row_start + b), tl.load(row_start + b + 1)
    token, count, fine = 0, 0, True
    if first < last:
        stop = last - 1
        refused = False
        p_high, q_high = float("-inf"), float("-inf")
        p_mass, q_mass = 0.0, 0.0
        going = True
        for i in range(first, last):
            if going:
                row = first.to(tl.int64) + (i - first)
                p_high, p_mass, broken = softmax_terms(target_scores, row, size, BLOCK)
                going = False
                stop = i
                fine = (broken == 0) & (p_high > float("-inf")) & (p_high < float("inf"))
                if fine & (i < last - 1):
                    q_high, q_mass, _ = softmax_terms(draft_scores, row, size, BLOCK)
                    drafted = tl.load(token_ids + i + 1)
                    p = tl.exp(tl.load(target_scores + row * size + drafted) - p_high) / p_mass
                    q = tl.exp(tl.load(draft_scores + row * size + drafted) - q_high) / q_mass
                    noise = uniform_noise(tl.load(seed + i), tl.load(positions + i), 0, ACCEPT_STREAM, 4)
                    u = tl.sum(tl.where(tl.arange(0, 4) == 0, noise, 0.0), axis=0)
                    refused = u * q >= p
                    going = u * q < p
        count = stop - first
        if fine:
            row = stop.to(tl.int64)
            its_seed, its_position = tl.load(seed + stop), tl.load(positions + stop)
            best, token = float("-inf"), 0
            plain_best, plain_token = float("-inf"), 0
            left = 0.0
            for start in range(0, size, BLOCK):
                index = start + tl.arange(0, BLOCK)
                inside = index < size
                raw = tl.load(target_scores + row * size + index, mask=inside, other=float("-inf"))
                noisy = raw + gumbel_noise(its_seed, its_position, start, TARGET_STREAM, BLOCK)
                its_best, its_token = best_of(noisy, index, BLOCK)
                plain_token = tl.where(its_best > plain_best, its_token, plain_token)
                plain_best = tl.maximum(plain_best, its_best)
                if refused:
                    q_raw = tl.load(draft_scores + row * size + index, mask=inside, other=float("-inf"))
                    p = tl.exp(raw - p_high) / p_mass
                    q = tl.exp(q_raw - q_high) / q_mass
                    residual = tl.where(p > q, p - q, 0.0)
                    left += tl.sum(residual, axis=0)
                    noisy = tl.log(residual) + gumbel_noise(its_seed, its_position, start, RESIDUAL_STREAM, BLOCK)
                    its_best, its_token = best_of(noisy, index, BLOCK)
                    token = tl.where(its_best > best, its_token, token)
                    best = tl.maximum(best, its_best)
            # A residual without mass means p = q up to rounding; a draw from p is then the same draw.
            token = tl.where(refused & (left > 0.0), token, plain_token)
    tl.store(accepted + b, count)
    tl.store(following + b, token)
    tl.store(ok + b, fine)


def _filter(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    rows, size = call.outputs[0].sizes()
    return (Grid(filter_rows, (rows,), configure("filter_logits", generation), {"size": size}),)


def _draw(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    rows, size = _scores(call)
    noisy = call.op == "sample"
    pieces = triton.cdiv(size, PIECE)
    span = aligned_size(rows * pieces * 4)
    parts: dict[str, str | Scratch | None] = {
        "best_value": Scratch(0, DType.F32),
        "best_token": Scratch(span, DType.I32),
        "best_score": Scratch(2 * span, DType.F32),
    }
    inputs = {} if noisy else {"scores": "logits", "seed": None, "positions": None}
    return (
        Grid(
            best_of_piece,
            (rows, pieces),
            configure("draw", generation),
            {"size": size, "pieces": pieces, "stream": int(call.attrs.get("stream", 0))},
            {"NOISY": noisy, "PIECE": PIECE},
            {**parts, **inputs},
        ),
        Grid(
            best_of_row,
            (rows,),
            configure("best_of_row", generation),
            {"pieces": pieces},
            {"BLOCK": triton.next_power_of_2(pieces)},
            parts,
        ),
    )


def _scores(call: CallSpec) -> tuple[int, int]:
    first = call.inputs[0]
    assert first is not None
    rows, size = first.sizes()
    return rows, size


def _draw_workspace(call: CallSpec) -> int:
    rows, size = _scores(call)
    return 3 * aligned_size(rows * triton.cdiv(size, PIECE) * 4)


def _count(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    (sequences,) = call.outputs[0].sizes()
    sampled = call.inputs[0]
    assert sampled is not None
    constants = {"BLOCK": triton.next_power_of_2(sampled.sizes()[0])}
    return (Grid(count_accepted, (sequences,), configure("count_accepted", generation), {}, constants),)


def _accept(call: CallSpec, generation: str) -> tuple[Grid, ...]:
    (sequences,) = call.outputs[0].sizes()
    streams = {"ACCEPT_STREAM": ACCEPT_STREAM, "RESIDUAL_STREAM": RESIDUAL_STREAM, "TARGET_STREAM": TARGET_STREAM}
    chosen = configure("accept_rejection", generation)
    return (Grid(accept_or_replace, (sequences,), chosen, {"size": _scores(call)[1]}, streams),)


KERNELS = (
    triton_kernel("filter_logits", "rows", _filter),
    triton_kernel("greedy", "pieces", _draw, workspace=_draw_workspace),
    triton_kernel("sample", "pieces", _draw, workspace=_draw_workspace),
    triton_kernel("accept_coupled", "sequences", _count),
    triton_kernel("accept_rejection", "sequences", _accept),
)
