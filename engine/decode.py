"""Runs a bound decode step: draft, verify, accept.

Owns `DecodeRunner`. What always holds: what runs is what the binding says; a step with more rows than a program holds
is cut between sequences; when a call fails, its sequences are run again one by one (rows are invariant, so the others
get the very tokens that they would have had), and those that fail alone get the fault as their verdict.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import SequenceFault, SlotwiseError
from slotwise.engine.acceptance import Acceptance, Verdict
from slotwise.engine.drafters import Drafter, Drafting
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.model_call import cut_by_rows, run_rows
from slotwise.engine.sampling.sampler import Sampler
from slotwise.engine.sequence import Sequence
from slotwise.plans.program import DECODE
from slotwise.slots.binding import Binding
from slotwise.slots.ledger import Ledger
from slotwise.slots.rows import FilledRows
from slotwise.slots.step import TARGET

Scores = npt.NDArray[np.float32]


class DecodeRunner:
    """Runs the draft, verify and accept ops of bindings."""

    def __init__(
        self,
        executor: Executor,
        lanes: Lanes,
        ledger: Ledger,
        sampler: Sampler,
        acceptance: Acceptance,
        drafter: Drafter,
    ) -> None:
        self._executor = executor
        self._lanes = lanes
        self._target = ledger[TARGET]
        self._sampler = sampler
        self._acceptance = acceptance
        self._drafter = drafter
        self._raw: dict[int, Scores] = {}

    def run(self, binding: Binding, sequences: SequenceOf[Sequence]) -> list[Verdict]:
        """A verdict for each sequence of the binding, in its order."""
        verdicts: list[Verdict | None] = [None] * len(sequences)
        self._raw.clear()
        drafting = self._draft(binding, verdicts)
        healthy = np.array([i for i, verdict in enumerate(verdicts) if verdict is None], np.int64)
        rows = binding.width[healthy] + 1
        for part in cut_by_rows(rows, self._executor.most_rows(TARGET, DECODE)) if healthy.size else ():
            self._verify(binding, sequences, healthy[part], drafting, verdicts)
        return [verdict or Verdict([], SequenceFault("the step gave no verdict")) for verdict in verdicts]

    def raw_logits(self, place: int) -> Scores | None:
        """The unedited logits of the rows of the sequence at `place` of the last binding, if it asked for them."""
        return self._raw.get(place)

    def _draft(self, binding: Binding, verdicts: list[Verdict | None]) -> Drafting:
        """Drafts of all sequences, validated and put behind their known tokens."""
        drafting = Drafting([[] for _ in binding.sequences])
        if not binding.width.any():
            return drafting
        wanted = np.flatnonzero(binding.width)
        try:
            drafting = self._ask(binding, wanted)
        except Exception:
            # One at a time, to find whose it is.
            for i in wanted.tolist():
                try:
                    one = self._ask(binding, np.array([i]))
                except Exception as error:
                    verdicts[i] = Verdict([], as_fault(error, binding.sequences[i], "drafting"))
                    continue
                drafting.tokens[i] = one.tokens[i]
                drafting.broken.update(one.broken)
                if one.scores is not None:
                    if drafting.scores is None:
                        drafting.scores = np.zeros_like(one.scores)
                    start = int(binding.width[:i].sum())
                    span = slice(start, start + int(binding.width[i]))
                    drafting.scores[span] = one.scores[span]
        for i in wanted.tolist():
            if verdicts[i] is None:
                reason = drafting.broken.get(i) or self._refusal(binding, i, drafting)
                if reason is not None:
                    verdicts[i] = Verdict([], SequenceFault(f"sequence {binding.sequences[i]}: {reason}"))
                    continue
                start = int(binding.length[i])
                self._lanes.tokens[binding.lanes[i], start : start + int(binding.width[i])] = drafting.tokens[i]
        return drafting

    def _ask(self, binding: Binding, at: Ints) -> Drafting:
        drafting: object = self._drafter.draft(binding, at)
        if not isinstance(drafting, Drafting) or len(drafting.tokens) != len(binding.sequences):
            raise SequenceFault(f"the drafter gave no list of tokens for each of {len(binding.sequences)} sequences")
        return drafting

    def _refusal(self, binding: Binding, place: int, drafting: Drafting) -> str | None:
        """What is wrong with a drafter's proposal, None when it is what was planned."""
        vocabulary, width = self._executor.plan.target.vocab_size, int(binding.width[place])
        tokens: object = drafting.tokens[place]
        if not isinstance(tokens, list):
            return f"the drafter gave {tokens!r} where a list of {width} tokens was planned"
        if len(tokens) != width:
            return f"the drafter gave {len(tokens)} tokens where {width} were planned"
        wrong = next((t for t in tokens if not isinstance(t, int) or not 0 <= t < vocabulary), None)
        return None if wrong is None else f"the drafter gave {wrong!r}, which is no token id from 0 to {vocabulary - 1}"

    def _verify(
        self,
        binding: Binding,
        sequences: SequenceOf[Sequence],
        places: Ints,
        drafting: Drafting,
        verdicts: list[Verdict | None],
    ) -> None:
        """Verify the sequences at `places` in one call; on failure one by one."""
        try:
            found = self._verify_call(binding, sequences, places, drafting)
        except Exception as error:
            if places.size == 1:
                place = int(places[0])
                verdicts[place] = Verdict([], as_fault(error, binding.sequences[place], "verifying"))
                return
            for place in places:
                self._verify(binding, sequences, np.array([place]), drafting, verdicts)
            return
        for place, verdict in zip(places.tolist(), found, strict=True):
            verdicts[place] = verdict

    def _verify_call(
        self, binding: Binding, sequences: SequenceOf[Sequence], places: Ints, drafting: Drafting
    ) -> list[Verdict]:
        rows = run_rows(self._executor, self._target, self._lanes, binding.reserved(TARGET).at(places))
        self._edit_logits(sequences, places, rows, drafting)
        return self._acceptance.judge(rows, self._scores_by_row(binding, places, rows, drafting))

    def _edit_logits(self, sequences: SequenceOf[Sequence], places: Ints, rows: FilledRows, drafting: Drafting) -> None:
        """Keep raw logits for those that want log-probabilities; then apply each sequence's own edits."""
        for n, place in enumerate(places.tolist()):
            sequence = sequences[place]
            first, last = int(rows.row_start[n]), int(rows.row_start[n + 1])
            if sequence.request.sampling.logprobs is not None:
                self._raw[place] = self._sampler.logits[first:last].copy()
            if sequence.adjuster is not None:
                drafts = drafting.tokens[place]
                for row in range(first, last):
                    self._sampler.edit(row, sequence.adjuster.edits(drafts[: row - first]))

    def _scores_by_row(self, binding: Binding, places: Ints, rows: FilledRows, drafting: Drafting) -> Scores | None:
        """The drafter's scores, moved from one row a draft to the verified rows (a sequence's last has none)."""
        if drafting.scores is None:
            return None
        found = np.zeros((rows.rows, drafting.scores.shape[1]), np.float32)
        start = np.cumsum(binding.width) - binding.width
        for n, place in enumerate(places.tolist()):
            width, first = int(binding.width[place]), int(rows.row_start[n])
            found[first : first + width] = drafting.scores[start[place] : start[place] + width]
        return found


def as_fault(error: Exception, sequence: int, doing: str) -> SlotwiseError:
    """`error` as a fault of one sequence, with the original as its cause."""
    fault = SequenceFault(f"sequence {sequence} failed while {doing}: {type(error).__name__}: {error}")
    fault.__cause__ = error
    return fault
