"""Fills the cache with known tokens: prompts, and what a preempted sequence had.

Owns `Prefiller`. What always holds: where a chunk of the prompt begins and ends depends on the prompt alone (a grid of
`prefill_chunk` from its start), and generated tokens are filled again by decode-side programs; so a sequence's K and V
have the same bits whatever it shares, whoever runs beside it, and however often it was preempted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from slotwise.engine.acceptance import Verdict, broken_row
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Lanes
from slotwise.engine.model_call import run_rows
from slotwise.engine.sampling.logprobs import TokenLogprobs, logprobs_of
from slotwise.engine.sampling.sampler import Sampler
from slotwise.engine.sequence import Sequence
from slotwise.plans.plan import Plan
from slotwise.plans.program import DECODE, PREFILL
from slotwise.slots.binding import Binding, bind_prefill
from slotwise.slots.ledger import Ledger, RoleLedger
from slotwise.slots.step import DRAFT, TARGET
from slotwise.slots.verify_binding import verify_binding


@dataclass(frozen=True, slots=True)
class ChunkOutcome:
    """What a chunk did: its rows, whether the sequence may decode now, and its first token if the prompt ended."""

    rows: int
    is_last: bool
    verdict: Verdict | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Prefiller:
    """Runs prefill steps, one sequence's chunk at a time."""

    def __init__(
        self,
        plan: Plan,
        executor: Executor,
        lanes: Lanes,
        ledger: Ledger,
        sampler: Sampler,
        tell_bound: Callable[[Binding], None],
    ) -> None:
        self._plan = plan
        self._executor = executor
        self._lanes = lanes
        self._ledger = ledger
        self._sampler = sampler
        self._tell_bound = tell_bound
        self._grid = plan.options.prefill_chunk

    def find_prefix(self, sequence: Sequence) -> list[int]:
        """Pages of others that hold the beginning of this sequence, as many as it may start from.

        At least the prompt's last row is left to compute, for its logits; where prefill is not row-invariant only whole
        chunks are taken over, so that the rest is cut as it would have been.
        """
        if not self._plan.options.share_prefixes or _wants_prompt(sequence):
            return []
        target = self._ledger[TARGET]
        usable = sequence.prompt_length - 1
        if self._plan.prefill_is_invariant:
            return target.pool.find_prefix(sequence.tokens, usable // target.page_size)
        # Pages between two places where a page and a chunk end together.
        stride = math.lcm(self._grid, target.page_size) // target.page_size
        found = target.pool.find_prefix(sequence.tokens, usable // target.page_size)
        return found[: len(found) // stride * stride]

    def may_share(self, sequence: Sequence) -> bool:
        """Whether the prompt of a sequence has a beginning that it could take from another with that prompt."""
        if not self._plan.options.share_prefixes or _wants_prompt(sequence):
            return False
        page_size = self._ledger[TARGET].page_size
        least = page_size if self._plan.prefill_is_invariant else math.lcm(self._grid, page_size)
        return sequence.prompt_length > least

    def find_draft_prefix(self, sequence: Sequence) -> list[int]:
        """The same for the draft role: what the draft model computes never changes the output, so any pages will do."""
        draft = self._ledger[DRAFT]
        usable = min(len(sequence.tokens) - 1, draft.capacity)
        return draft.pool.find_prefix(sequence.tokens, usable // draft.page_size)

    def fits(self, sequence: Sequence) -> bool:
        """Whether the pool has the pages of this sequence's next chunk."""
        begin, end, _ = self._next_chunk(sequence)
        return self._fits(self._ledger[TARGET], sequence, end) or begin == end

    def run_chunk(self, sequence: Sequence, epoch: int) -> ChunkOutcome:
        """Fill the next chunk of the target's cache; after the prompt's last, draw the first token."""
        lane = _lane(sequence)
        begin, end, kind = self._next_chunk(sequence)
        known = self._known(sequence)
        if begin < end:
            self._fill(sequence, TARGET, begin, end, known, kind, epoch)
            self._note_prompt(sequence, begin, end)
        is_last = end == known
        if not is_last or sequence.new_tokens:
            return ChunkOutcome(end - begin, is_last)
        logits, asked = self._sampler.logits, sequence.request.sampling.logprobs
        if kind == DECODE:  # which gives logits of all rows, and the last are wanted
            logits[0] = logits[end - begin - 1]
        raw = logits[:1].copy() if asked is not None else None
        if sequence.adjuster is not None:
            self._sampler.edit(0, sequence.adjuster.edits())
        drawn = self._sampler.sample(np.array([lane]), np.array([end]))
        if not drawn.ok[0]:
            return ChunkOutcome(end - begin, True, Verdict([], broken_row()))
        tokens = drawn.tokens.tolist()
        logprobs = () if raw is None else logprobs_of(raw, tokens, asked or 0, sequence.bytes_of)
        return ChunkOutcome(end - begin, True, Verdict(tokens), logprobs)

    def run_draft_chunk(self, sequence: Sequence, epoch: int, catch_up: int) -> int:
        """Let the draft model fill a chunk where it is more than `catch_up` tokens behind; returns the rows run."""
        draft, lane = self._ledger[DRAFT], _lane(sequence)
        length, begin = int(self._lanes.length[lane]), int(draft.committed[lane])
        known = min(length - 1, draft.capacity)
        if self._lanes.length_limit[lane] - length <= 1 or not self._lanes.draftable[lane]:
            return 0  # the last token is the target's own, or one cannot be fed: no draft will be asked for
        # Beyond the draft model's capacity there is nothing to draft, so nothing to catch up for.
        if length - begin <= catch_up or length > draft.capacity:
            return 0
        end = min(begin + self._grid, known)
        if not self._fits(draft, sequence, end):
            return 0
        self._fill(sequence, DRAFT, begin, end, known, PREFILL, epoch)
        if self._plan.options.share_prefixes:
            draft.publish(lane, sequence.tokens, end)
        return end - begin

    def publish(self, sequence: Sequence) -> None:
        """Share what may be shared of the sequence's committed pages."""
        if not self._plan.options.share_prefixes or (_wants_prompt(sequence) and not self._plan.prefill_is_invariant):
            return
        lane, target = _lane(sequence), self._ledger[TARGET]
        # A step that has been started and not read is committed, but its tokens are not known yet.
        upto = min(int(target.committed[lane]), self._known(sequence))
        if not self._plan.prefill_is_invariant:
            # Only whole chunks of a prompt have bits that another prompt with that beginning would compute.
            upto = min(upto, sequence.prompt_length) // self._grid * self._grid
        target.publish(lane, sequence.tokens, upto)

    def _note_prompt(self, sequence: Sequence, begin: int, end: int) -> None:
        """Keep the log-probabilities of the prompt's tokens after [begin, end), where asked for and not yet known."""
        asked = sequence.request.sampling.prompt_logprobs
        start, stop = max(begin, len(sequence.prompt_logprobs)), min(end, sequence.prompt_length - 1)
        if asked is not None and start < stop:
            rows, tokens = self._sampler.logits[start - begin : stop - begin], sequence.tokens[start + 1 : stop + 1]
            sequence.prompt_logprobs += logprobs_of(rows, tokens, asked, sequence.bytes_of)

    def _known(self, sequence: Sequence) -> int:
        """Tokens whose K and V can be filled: the prompt; or, with output, all but the pending token."""
        return len(sequence.tokens) - 1 if sequence.new_tokens else sequence.prompt_length

    def _next_chunk(self, sequence: Sequence) -> tuple[int, int, str]:
        """(begin, end, program kind) of what to fill next; empty when nothing is left."""
        begin, known = int(self._ledger[TARGET].committed[_lane(sequence)]), self._known(sequence)
        if begin < sequence.prompt_length and not _wants_prompt(sequence):
            end = min((begin // self._grid + 1) * self._grid, sequence.prompt_length, known)
            return begin, end, PREFILL
        return begin, min(begin + self._executor.most_rows(TARGET, DECODE), known), DECODE

    def _fill(self, sequence: Sequence, role: str, begin: int, end: int, known: int, kind: str, epoch: int) -> Binding:
        ledger, lane = self._ledger[role], _lane(sequence)
        lanes = np.array([lane])
        ledger.reserve(lanes, np.array([end]))
        step = self._plan.step(f"prefill {role}")
        binding = bind_prefill(step, epoch, sequence.id, role, lane, known, begin, end - begin)
        verify_binding(binding, self._ledger, epoch)
        self._tell_bound(binding)
        if kind == PREFILL:
            self._executor.set_logit_row(end - begin - 1)
        span = binding.spans[0]
        run_rows(self._executor, ledger, self._lanes, span, kind)
        ledger.commit(lanes, span.end)
        if role == TARGET:
            self.publish(sequence)
        return binding

    @staticmethod
    def _fits(role: RoleLedger, sequence: Sequence, end: int) -> bool:
        return int(role.pages_short(np.array([_lane(sequence)]), np.array([end])).sum()) <= role.pool.available


def _wants_prompt(sequence: Sequence) -> bool:
    """Whether all rows of the prompt must give logits: then decode-side programs fill it, from its start."""
    return sequence.request.sampling.prompt_logprobs is not None


def _lane(sequence: Sequence) -> int:
    """The lane of a running sequence."""
    if sequence.lane is None:
        raise ValueError(f"sequence {sequence.id} has no lane: it is {sequence.state}")
    return sequence.lane
