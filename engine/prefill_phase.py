"""The part of a step that fills prompts.

Owns `PrefillPhase`. What always holds: prompts are filled oldest first, a chunk's worth of rows a step and at least one
chunk; when pages run out younger sequences give way; a sequence whose chunk fails ends, and the others go on.
"""

from __future__ import annotations

from slotwise.engine.acceptance import Verdict
from slotwise.engine.decode import as_fault
from slotwise.engine.prefill import ChunkOutcome, Prefiller
from slotwise.engine.roster import Roster
from slotwise.engine.sequence import Sequence


class PrefillPhase:
    """Runs the prompt chunks of a step; `rows` is a chunk's worth of them.

    `catch_up` is how many tokens a draft model may be behind and still draft; None where there is no draft model.
    """

    def __init__(self, prefiller: Prefiller, roster: Roster, rows: int, catch_up: int | None) -> None:
        self._prefiller = prefiller
        self._roster = roster
        self._rows = rows
        self._catch_up = catch_up

    def run(self, epoch: int) -> list[Sequence]:
        """Run this step's chunks; returns the sequences whose prompt has ended."""
        touched: list[Sequence] = []
        rows_left = self._rows
        for sequence in self._roster.filling:
            while sequence.state == "prefill" and rows_left > 0 and self._make_room(sequence):
                outcome = self._run_chunk(sequence, epoch)
                rows_left -= outcome.rows
                if outcome.is_last:
                    touched.append(sequence)
                    self._end(sequence, outcome)
        if self._catch_up is not None:
            self._fill_drafts(epoch, self._catch_up)
        return touched

    def _run_chunk(self, sequence: Sequence, epoch: int) -> ChunkOutcome:
        try:
            return self._prefiller.run_chunk(sequence, epoch)
        except Exception as error:
            return ChunkOutcome(0, True, Verdict([], as_fault(error, sequence.id, "prefilling")))

    def _end(self, sequence: Sequence, outcome: ChunkOutcome) -> None:
        """Take the first token, if the prompt has just ended, and let the sequence decode."""
        sequence.state = "decode"
        verdict = outcome.verdict
        if verdict is None:
            return
        if verdict.fault is not None:
            self._roster.finish(sequence, "error", verdict.fault)
            return
        before = len(sequence.tokens)
        sequence.keep(verdict.candidates)
        sequence.logprobs += outcome.logprobs
        self._roster.take_in(sequence, before)

    def _fill_drafts(self, epoch: int, catch_up: int) -> None:
        """Let the draft model catch up, a chunk's worth of rows a step; meanwhile those sequences do not draft."""
        rows_left = self._rows
        for sequence in self._roster.decoding:
            while rows_left > 0 and sequence.state == "decode":
                try:
                    rows = self._prefiller.run_draft_chunk(sequence, epoch, catch_up)
                except Exception as error:
                    self._roster.finish(sequence, "error", as_fault(error, sequence.id, "prefilling the draft model"))
                    break
                if not rows:
                    break
                rows_left -= rows

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt younger sequences until this one's next chunk fits; False when it had to give way itself."""
        running = self._roster.running
        while not self._prefiller.fits(sequence):
            youngest = running[-1]
            if youngest is sequence and len(running) == 1:
                return True  # Alone it always fits; if not, the reservation fails and says why.
            self._roster.preempt(youngest)
            if youngest is sequence:
                return False
        return True
