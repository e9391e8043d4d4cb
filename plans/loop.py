"""Draft loops: several rounds of drafting as one launch.

Owns `DraftLoop`, which loops a plan has, and the arrays of their rounds. What always holds: a loop runs programs that
the plan has anyway and adds no call of its own; round r > 0 reads as its token ids what round r - 1 sampled, and
everything else that differs from round to round lies in arrays of its own, filled before the launch. So between two
rounds nothing passes through the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.options import PlanOptions
from slotwise.plans.program import DECODE, SAMPLER
from slotwise.plans.sampling import GREEDY, GREEDY_NARROW, SAMPLE, SAMPLE_DRAFT, SAMPLE_NARROW
from slotwise.slots.step import DRAFT

FEEDS, FED = "sampled", "token_ids"
"""What a round gives, and the next one's input that it becomes."""

GIVEN = ("positions", "slots", "row_start", "kv_len", "token_positions")
"""Inputs that every round has of its own."""

_GRAIN = 64
"""Rounds lie this many elements apart, or a multiple: 256 bytes of int32, so that all are aligned alike."""


@dataclass(frozen=True, slots=True)
class DraftLoop:
    """Up to `rounds` rounds for `sequences` sequences; fewer rounds are the beginning of the same launches.

    A round is the draft model's decode program, then the sampler's program `sampler` for `sequences` rows. The first
    round's model program has `first` rows: each sequence's last known token, in the sequences' order, then tokens that
    the draft model has yet to catch up with, a sequence of one row each (all rows of a layer are written before any is
    read). A later round has a row a sequence, and in its place. Both counts are the programs' buckets.
    """

    sequences: int
    first: int
    rounds: int
    sampler: str

    def programs(self, rounds: int) -> Iterator[tuple[int, tuple[str, str, int]]]:
        """(round, key of a program: role, kind, rows) of the first `rounds` rounds, in order."""
        for number in range(rounds):
            yield number, (DRAFT, DECODE, self.sequences if number else self.first)
            yield number, (SAMPLER, self.sampler, self.sequences)

    def __str__(self) -> str:
        return f"draft loop of {self.sequences} sequences, {self.first} first rows, {self.sampler}"


def loop_samplers(acceptance: str, is_narrow: bool) -> tuple[str, ...]:
    """The sampler programs that drafts are drawn with under an acceptance rule.

    `is_narrow` says that the draft model has fewer token ids than the target.
    """
    if acceptance != "coupled":
        return (SAMPLE_DRAFT,)
    return (GREEDY_NARROW, SAMPLE_NARROW) if is_narrow else (GREEDY, SAMPLE)


def draft_loops(options: PlanOptions, buckets: tuple[int, ...], is_narrow: bool) -> tuple[DraftLoop, ...]:
    """The loops of a plan with a draft model whose decode-side programs have these `buckets`.

    For every bucket of sequences: no sequence has anything to catch up with, or there is room for a row more each.
    """
    most = next((rows for rows in buckets if rows >= options.max_sequences), buckets[-1])
    found = []
    for sampler in loop_samplers(options.acceptance, is_narrow):
        for sequences in (rows for rows in buckets if rows <= most):
            twice = next((rows for rows in buckets if rows >= 2 * sequences), buckets[-1])
            found += [DraftLoop(sequences, first, options.speculate, sampler) for first in sorted({sequences, twice})]
    return tuple(found)


def round_buffer(name: str) -> str:
    """The array that holds `name` for the rounds after the first, one after the other."""
    return f"rounds.{name}"


def round_buffers(
    loops: Iterable[DraftLoop], acceptance: str, scores: str, vocab_size: int
) -> Iterator[tuple[str, TensorSpec]]:
    """The arrays of the rounds after the first, by name; none where no loop has any.

    `scores` is the array of the draft model's scores, over its `vocab_size` token ids.
    """
    known = tuple(loops)
    later = max((loop.rounds for loop in known), default=0) - 1
    if later < 1:
        return
    sequences = max(loop.sequences for loop in known)
    apart = _up(sequences + 1, _GRAIN)
    for name in (*GIVEN, FEEDS):
        yield round_buffer(name), TensorSpec(DType.I32, (later * apart,))
    yield round_buffer("ok"), TensorSpec(DType.BOOL, (later * apart,))
    if acceptance != "coupled":
        # Acceptance wants the scores that every draft was drawn from.
        rows = _up(sequences, _GRAIN // math.gcd(_GRAIN, vocab_size))
        yield round_buffer(scores), TensorSpec(DType.F32, (later * rows, vocab_size))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
