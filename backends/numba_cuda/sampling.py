"""From logits to tokens.

Owns the kernels of `filter_logits`, `greedy`, `sample`, `accept_coupled` and `accept_rejection`. What always holds: a
row's result depends on that row alone; the greatest value and the lowest token of equals are found piece by piece, in
any order the same; a row with a NaN, an infinity or nothing left has `ok` false and a token within the vocabulary.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from slotwise.backends._gpu.kernels import Scratch, aligned_size
from slotwise.backends.numba_cuda import filters
from slotwise.backends.numba_cuda.blocks import LEAST, NOWHERE, WARP, ZERO, block_best, block_max, block_sum
from slotwise.backends.numba_cuda.launch import Grid, cuda_kernel
from slotwise.backends.numba_cuda.noise import gumbel, philox, uniform
from slotwise.backends.numba_cuda.simulator import cuda, device, kernel
from slotwise.core.backend import CallSpec
from slotwise.core.ops.noise import ACCEPT_STREAM, RESIDUAL_STREAM, TARGET_STREAM
from slotwise.core.specs import DType

PIECE = 4096
"""Tokens of a row that one block looks at."""

THREADS = 256
WARPS = THREADS // WARP
INFINITE = np.float32(np.inf)
NAN = np.float32(np.nan)

best_of_block = block_best(THREADS)
highest_of_block = block_max(THREADS)
total_of_block = block_sum(THREADS)
count_of_block = block_sum(THREADS, whole=True)


@device
def clean(value):
    """`value`, or -inf for a NaN."""
    return value if value == value else LEAST


@functools.cache
def best_of_piece(noisy: bool) -> Any:
    """Of one piece of a row: the greatest score plus noise, its token, and the greatest score (NaN if there is one)."""

    @kernel
    def best_of_piece(scores, seed, positions, best_value, best_token, best_score, size, pieces, stream):
        sums = cuda.shared.array(WARPS, np.float32)
        counts = cuda.shared.array(WARPS, np.int64)
        row = cuda.blockIdx.x
        piece = cuda.blockIdx.y
        start = piece * PIECE
        stop = min(start + PIECE, size)
        value, token = LEAST, np.int64(NOWHERE)
        highest = LEAST
        broken = np.int64(0)
        for first in range(start + cuda.threadIdx.x * 4, stop, THREADS * 4):
            if noisy:
                w0, w1, w2, w3 = philox(seed[row], positions[row], first // 4, stream)
            for i in range(4):
                if first + i < stop:
                    score = scores[row * size + first + i]
                    broken += 1 if score != score else 0
                    score = clean(score)
                    highest = score if score > highest else highest
                    if noisy:
                        word = w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))
                        score += gumbel(word)
                    if score > value or token == NOWHERE:
                        value = score
                        token = np.int64(first + i)
        value, token = best_of_block(value, token, sums, counts)
        highest = highest_of_block(highest, sums)
        broken = count_of_block(broken, counts)
        if cuda.threadIdx.x == 0:
            at = row * pieces + piece
            best_value[at] = value
            best_token[at] = token
            best_score[at] = NAN if broken > 0 else highest

    return best_of_piece


@functools.cache
def best_of_row() -> Any:
    """The best of a row's pieces, and whether the row can be drawn from: one thread a row."""

    @kernel
    def best_of_row(best_value, best_token, best_score, tokens, ok, rows, pieces):
        row = cuda.grid(1)
        if row < rows:
            value = best_value[row * pieces]
            token = best_token[row * pieces]
            highest = LEAST
            broken = False
            for piece in range(pieces):
                at = row * pieces + piece
                if best_value[at] > value:
                    value = best_value[at]
                    token = best_token[at]
                score = best_score[at]
                broken = broken or score != score
                highest = score if score > highest else highest
            tokens[row] = token
            ok[row] = 1 if (not broken) and highest > LEAST and highest < INFINITE else 0

    return best_of_row


@functools.cache
def count_accepted() -> Any:
    """How many drafts of each sequence equal what was sampled in their place: one thread a sequence."""

    @kernel
    def count_accepted(sampled, token_ids, row_start, accepted, sequences):
        b = cuda.grid(1)
        if b < sequences:
            first = row_start[b]
            drafts = row_start[b + 1] - first - 1
            count = np.int64(0)
            while count < drafts and sampled[first + count] == token_ids[first + count + 1]:
                count += 1
            accepted[b] = count

    return count_accepted


@device
def softmax_terms(scores, at, size, sums, counts):
    """The greatest value of a row, the sum of exp(value - greatest), and how many NaNs it has."""
    highest = LEAST
    broken = np.int64(0)
    for token in range(cuda.threadIdx.x, size, THREADS):
        value = scores[at + token]
        broken += 1 if value != value else 0
        highest = value if value > highest else highest
    highest = highest_of_block(highest, sums)
    broken = count_of_block(broken, counts)
    mass = ZERO
    for token in range(cuda.threadIdx.x, size, THREADS):
        mass += math.exp(scores[at + token] - highest)
    return highest, total_of_block(mass, sums), broken


@device
def word_of(seed, position, token, stream):
    """The random word of one token."""
    w0, w1, w2, w3 = philox(seed, position, token // 4, stream)
    i = token % 4
    return w0 if i == 0 else (w1 if i == 1 else (w2 if i == 2 else w3))


@device
def can_draw(highest, broken):
    """Whether a row with this greatest value and number of NaNs can be drawn from."""
    return broken == 0 and highest > LEAST and highest < INFINITE


@functools.cache
def accept_or_replace() -> Any:
    """Speculative sampling for one sequence, a block each: its drafts in turn, then the token after them."""

    @kernel
    def accept_or_replace(
        target_scores, draft_scores, token_ids, row_start, seed, positions, accepted, following, ok, size
    ):
        sums = cuda.shared.array(WARPS, np.float32)
        counts = cuda.shared.array(WARPS, np.int64)
        b = cuda.blockIdx.x
        first = np.int64(row_start[b])
        last = np.int64(row_start[b + 1])
        token = np.int64(0)
        count = np.int64(0)
        fine = True
        if first < last:
            refused = False
            going = True
            row, stop = first, first
            p_high, p_mass = LEAST, ZERO
            q_high, q_mass = LEAST, ZERO
            while going:
                p_high, p_mass, broken = softmax_terms(target_scores, row * size, size, sums, counts)
                fine = can_draw(p_high, broken)
                going = False
                stop = row
                if fine and row < last - 1:
                    q_high, q_mass, _ = softmax_terms(draft_scores, row * size, size, sums, counts)
                    drafted = token_ids[row + 1]
                    p = math.exp(target_scores[row * size + drafted] - p_high) / p_mass
                    q = math.exp(draft_scores[row * size + drafted] - q_high) / q_mass
                    u = uniform(word_of(seed[row], positions[row], 0, ACCEPT_STREAM))
                    refused = u * q >= p
                    going = u * q < p
                    row += 1
            count = stop - first
            if fine:
                at = stop * size
                best, plain_best = LEAST, LEAST
                token, plain_token = np.int64(NOWHERE), np.int64(NOWHERE)
                left = ZERO
                for index in range(cuda.threadIdx.x, size, THREADS):
                    raw = target_scores[at + index]
                    noisy = clean(raw + gumbel(word_of(seed[stop], positions[stop], index, TARGET_STREAM)))
                    if noisy > plain_best or plain_token == NOWHERE:
                        plain_best = noisy
                        plain_token = np.int64(index)
                    if refused:
                        p = math.exp(raw - p_high) / p_mass
                        q = math.exp(draft_scores[at + index] - q_high) / q_mass
                        residual = p - q if p > q else ZERO
                        left += residual
                        noisy = LEAST
                        if residual > ZERO:
                            noisy = math.log(residual) + gumbel(
                                word_of(seed[stop], positions[stop], index, RESIDUAL_STREAM)
                            )
                        if noisy > best or token == NOWHERE:
                            best = noisy
                            token = np.int64(index)
                plain_best, plain_token = best_of_block(plain_best, plain_token, sums, counts)
                best, token = best_of_block(best, token, sums, counts)
                left = total_of_block(left, sums)
                # A residual without mass means p = q up to rounding; a draw from p is then the same draw.
                if not (refused and left > ZERO):
                    token = plain_token
        if cuda.threadIdx.x == 0:
            accepted[b] = count
            following[b] = token
            ok[b] = 1 if fine else 0

    return accept_or_replace


def _filter(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rows, size = call.outputs[0].sizes()
    names = ("logits", "temperature", "top_k", "top_p", "min_p", "scores", size)
    return (Grid(filters.filter_rows(), (rows,), filters.THREADS, names),)


def _draw(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    rows, size = _scores(call)
    pieces, span = math.ceil(size / PIECE), _span(call)
    found = (Scratch(0, DType.F32), Scratch(span, DType.I32), Scratch(2 * span, DType.F32))
    # Greedy has no seed and no positions: something of their types stands in, and is not read.
    names = ("scores", "seed", "positions") if call.op == "sample" else ("logits", found[1], found[1])
    stream = int(call.attrs.get("stream", 0))
    return (
        Grid(best_of_piece(call.op == "sample"), (rows, pieces), THREADS, (*names, *found, size, pieces, stream)),
        Grid(best_of_row(), (math.ceil(rows / 64),), 64, (*found, "tokens", "ok", rows, pieces)),
    )


def _scores(call: CallSpec) -> tuple[int, int]:
    first = call.inputs[0]
    assert first is not None
    rows, size = first.sizes()
    return rows, size


def _span(call: CallSpec) -> int:
    rows, size = _scores(call)
    return aligned_size(rows * math.ceil(size / PIECE) * 4)


def _count(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    (sequences,) = call.outputs[0].sizes()
    names = ("sampled", "token_ids", "row_start", "accepted", sequences)
    return (Grid(count_accepted(), (math.ceil(sequences / 64),), 64, names),)


def _accept(call: CallSpec, aligned: bool) -> tuple[Grid, ...]:
    (sequences,) = call.outputs[0].sizes()
    names = ("target_scores", "draft_scores", "token_ids", "row_start", "seed", "positions")
    results = ("accepted", "following", "ok", _scores(call)[1])
    return (Grid(accept_or_replace(), (sequences,), THREADS, (*names, *results)),)


KERNELS = (
    cuda_kernel("filter_logits", "rows", _filter),
    cuda_kernel("greedy", "pieces", _draw, workspace=lambda call: 3 * _span(call)),
    cuda_kernel("sample", "pieces", _draw, workspace=lambda call: 3 * _span(call)),
    cuda_kernel("accept_coupled", "sequences", _count),
    cuda_kernel("accept_rejection", "sequences", _accept),
)
