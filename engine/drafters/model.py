"""The draft-model drafter: a smaller model of the same vocabulary, with its own cache.

What always holds: it fills exactly the draft span that the binding reserved, from its filled mark (rows that catch up
with the committed tokens come first) to one before the last draft; it samples with the target's noise where acceptance
is `coupled`, and with noise of its own where it is `rejection`. It is fed ids that it has, and drafts those alone,
where its vocabulary is padded less than the target's: a lane with another token is not drafted for (`Lanes.draftable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from slotwise.engine.drafters import Drafting
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.model_call import cut_by_rows, run_rows
from slotwise.engine.sampling.edits import Edits
from slotwise.engine.sampling.sampler import Sampler
from slotwise.plans.loop import DraftLoop
from slotwise.plans.program import DECODE
from slotwise.plans.sampling import CHEAPER, SAMPLE, SAMPLE_DRAFT, SAMPLE_NARROW
from slotwise.slots.binding import Binding, BoundSpan
from slotwise.slots.ledger import Ledger
from slotwise.slots.rounds import FilledRounds, fill_rounds, round_of
from slotwise.slots.rows import FilledRows
from slotwise.slots.step import DRAFT
from slotwise.slots.verify_rounds import verify_rounds

READ = ("sampled", "ok")
"""What every round gives."""

EditSource = Callable[[int, Sequence[int]], Edits]
"""(lane, drafts so far) -> the edits that the sequence's penalties make at that point."""


class ModelDrafter:
    """Drafts with the plan's role `draft`, whose logits `sampler` reads.

    `catch_up` is how far behind a lane may be and still draft in this step.
    """

    kind = "model"

    def __init__(
        self,
        executor: Executor,
        lanes: Lanes,
        ledger: Ledger,
        sampler: Sampler,
        edits_of: EditSource,
        *,
        acceptance: str,
        catch_up: int,
    ) -> None:
        self._executor = executor
        self._lanes = lanes
        self._ledger = ledger[DRAFT]
        self._sampler = sampler
        self._edits_of = edits_of
        self._keeps_scores = acceptance == "rejection"
        is_narrow = executor.plan.drafts_fewer_ids
        self._kind = SAMPLE_DRAFT if self._keeps_scores else SAMPLE_NARROW if is_narrow else SAMPLE
        self.catch_up = catch_up

    def begin(self, lane: int, tokens: Sequence[int]) -> None:
        """Nothing to do: the ledger knows what is filled."""

    def extend(self, lane: int, tokens: Sequence[int]) -> None:
        """Nothing to do: the next draft catches up."""

    def end(self, lane: int) -> None:
        """Nothing to do."""

    def offer(self, lanes: Ints, widths: Ints) -> Ints:
        """`widths`, but 0 for lanes that are too far behind, which are prefilled first, or not draftable."""
        behind = self._lanes.length[lanes] - self._ledger.committed[lanes]
        return np.where((behind <= self.catch_up) & self._lanes.draftable[lanes], widths, 0)

    def draft(self, binding: Binding, at: Ints) -> Drafting:
        """Draft in one launch where the plan has a loop for it, else round by round: the same tokens.

        Every round feeds one row a sequence, the first also those that catch up.
        """
        drafting = Drafting([[] for _ in binding.sequences])
        places = [i for i in at.tolist() if binding.width[i]]
        if not places:
            return drafting
        if self._keeps_scores:
            vocabulary = self._executor.plan.target.vocab_size
            # What the draft model has no id for it never draws.
            drafting.scores = np.full((int(binding.width.sum()), vocabulary), -np.inf, np.float32)
        score_row = np.cumsum(binding.width) - binding.width
        if self._draft_at_once(binding, places, drafting, score_row):
            return drafting
        for n in range(int(binding.width[places].max())):
            active = np.array([i for i in places if binding.width[i] > n and i not in drafting.broken], np.int64)
            if not active.size:
                break
            span = round_of(_span_of(binding, active), binding.width[active], n)
            for part in cut_by_rows(span.end - span.begin, self._executor.most_rows(DRAFT, DECODE)):
                rows = run_rows(self._executor, self._ledger, self._lanes, span.at(part))
                self._take(binding, active[part], rows, drafting, score_row + n)
        return drafting

    def _draft_at_once(self, binding: Binding, places: list[int], drafting: Drafting, score_row: Ints) -> bool:
        """All rounds as one launch, or a few for more rows than a program holds; False, with nothing done, without one.

        Penalties change logits between the rounds, so whoever has any keeps all to rounds one by one.
        """
        at = np.array(places, np.int64)
        at = at[np.argsort(-binding.width[at], kind="stable")]
        span, width = _span_of(binding, at), binding.width[at]
        if np.count_nonzero(self._lanes.adjusts[span.lanes]):
            return False
        kind = self._sampler.cheapest(self._kind, span.lanes)
        first = round_of(span, width, 0)
        rows = first.end - first.begin
        chosen: list[tuple[slice, DraftLoop]] = []
        for part in cut_by_rows(rows, self._executor.most_rows(DRAFT, DECODE)):
            loop = self._executor.loops.find(kind, rows[part].size, int(rows[part].sum()))
            if loop is None:
                return False
            chosen.append((part, loop))
        for part, loop in chosen:
            filled = self._run_loop(loop, span.at(part), width[part])
            self._take_rounds(at[part], filled, drafting, score_row)
        return True

    def _run_loop(self, loop: DraftLoop, span: BoundSpan, width: Ints) -> FilledRounds:
        """Fill and verify the rows of all rounds, and run them."""
        first, later = self._executor.row_inputs(DRAFT, loop.first), self._executor.loops.inputs
        filled = fill_rounds(first, later, loop.sequences, self._ledger, self._lanes.tokens, span, width)
        verify_rounds(first, later, filled, self._ledger)
        if loop.sampler not in CHEAPER.values():
            self._sampler.set_controls(span.lanes, span.end - width + 1)
        self._executor.run_loop(loop, filled.rounds)
        return filled

    def _take_rounds(self, at: Ints, filled: FilledRounds, drafting: Drafting, score_row: Ints) -> None:
        """Read what all rounds drew; `at` are the sequences' places in the binding."""
        n, later, loops, arrays = at.size, filled.rounds - 1, self._executor.loops, self._executor.arrays
        parts = {name: [arrays[name][None, :n], *([loops.later(name)[:later, :n]] if later else [])] for name in READ}
        tokens: Ints = np.concatenate(parts["sampled"]).astype(np.int64)
        ok = np.concatenate(parts["ok"]).astype(bool) & self._sampler.in_vocabulary(tokens)
        for row, (i, width) in enumerate(zip(at.tolist(), filled.width.tolist(), strict=True)):
            if not ok[:width, row].all():
                drafting.broken[i] = "the draft model's logits are not finite"
            drafting.tokens[i] = tokens[:width, row].tolist()
            if drafting.scores is not None:
                mine = drafting.scores[score_row[i] : score_row[i] + width, : self._sampler.vocab_size]
                mine[0] = self._sampler.scores[row]
                if width > 1:
                    mine[1:] = loops.later(self._sampler.scores_name)[: width - 1, row]

    def _take(self, binding: Binding, places: Ints, rows: FilledRows, drafting: Drafting, score_row: Ints) -> None:
        """Draw the next draft of each sequence at its last row."""
        last = rows.row_start[1:] - 1
        dead = set()
        for row, i in zip(last.tolist(), places.tolist(), strict=True):
            lane = int(binding.lanes[i])
            if self._lanes.adjusts[lane]:
                self._sampler.edit(row, self._edits_of(lane, drafting.tokens[i]))
                if self._sampler.is_dead(row):
                    dead.add(row)
        # Rows that only catch up are drawn from too, and ignored: one call either way.
        drawn = self._sampler.sample(rows.row_lanes, rows.row_positions + 1, self._kind)
        for row, i in zip(last.tolist(), places.tolist(), strict=True):
            # Where bans leave nothing after these drafts, any token is as good a draft: the target will judge.
            if not drawn.ok[row] and row not in dead:
                drafting.broken[i] = "the draft model's logits are not finite"
                continue
            token = int(drawn.tokens[row]) if row not in dead else 0
            drafting.tokens[i].append(token)
            self._lanes.tokens[binding.lanes[i], binding.length[i] + len(drafting.tokens[i]) - 1] = token
            if drafting.scores is not None:
                if row in dead:
                    drafting.scores[score_row[i]] = -np.inf
                    drafting.scores[score_row[i], token] = 0
                else:
                    drafting.scores[score_row[i], : self._sampler.vocab_size] = self._sampler.scores[row]


def _span_of(binding: Binding, places: Ints) -> BoundSpan:
    """What the sequences at `places` of the binding, all of them drafting, have reserved in the draft role."""
    return binding.reserved(DRAFT).at(np.searchsorted(np.flatnonzero(binding.width), places))
