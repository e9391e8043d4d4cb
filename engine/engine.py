"""The engine: admits requests, plans and runs steps, hands out text.

Owns the loop: one `step` admits, prefills, decodes and checks the ledger. What always holds: requests are served in
order of arrival, the oldest can always go on, and the youngest gives its pages up when there are none left; slots are
reserved before they are written and settled before the step ends; an exception in one sequence's work ends that
sequence alone.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np
import numpy.typing as npt

from slotwise.core.errors import OptionError, OutOfPages, RequestError, SlotwiseError
from slotwise.core.model import WeightSource
from slotwise.engine.acceptance import Acceptance, Verdict
from slotwise.engine.acceptance.coupled import Coupled
from slotwise.engine.acceptance.rejection import Rejection
from slotwise.engine.adjust import Edits
from slotwise.engine.decode import DecodeRunner, as_fault
from slotwise.engine.detokenize import Detokenizer, TokenPieces
from slotwise.engine.drafters import Drafter
from slotwise.engine.drafters.model import ModelDrafter
from slotwise.engine.drafters.ngram import NgramDrafter
from slotwise.engine.drafters.none import NoDrafter
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Ints, Lanes
from slotwise.engine.observer import Observer
from slotwise.engine.parts import check_prompt, lanes_of, make_ledger
from slotwise.engine.planner import DecodePlanner
from slotwise.engine.prefill import ChunkOutcome, Prefiller
from slotwise.engine.request import FinishReason, Request
from slotwise.engine.sampler import Sampler, logprobs_of
from slotwise.engine.sequence import Sequence
from slotwise.engine.stops import StopChecker
from slotwise.engine.weights import Progress
from slotwise.engine.width import WidthPolicy
from slotwise.plans.binding import Binding
from slotwise.plans.plan import Plan
from slotwise.plans.program import DRAFT, TARGET
from slotwise.plans.show_binding import show_binding

HISTORY = 32
"""Steps that the engine remembers, to be printed."""


class Engine:
    """Runs requests through a plan. `weights` gives each role's tensors; `pieces` makes text of tokens (None: none).

    `drafter` replaces the plan's own (for tests and experiments); it proposes, and cannot touch accounting.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, WeightSource],
        *,
        pieces: TokenPieces | None = None,
        eos_ids: Iterable[int] = (),
        drafter: Drafter | None = None,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> None:
        self.plan = plan
        self.executor = Executor(plan, weights, progress, threads)
        self.ledger = make_ledger(plan)
        self.policy = WidthPolicy(plan.options.speculate, plan.draft_cost_ratio)
        lanes = plan.options.max_sequences
        self.lanes = Lanes(lanes, plan.target.capacity, self.policy.start_rate, self.ledger.roles)
        self.sampler = Sampler(self.executor, self.lanes)
        self.epoch = 0
        self.history: deque[tuple[Binding, dict[int, int]]] = deque(maxlen=HISTORY)
        self.observers: list[Observer] = []
        self._pieces = pieces
        self._eos_ids = tuple(eos_ids)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._next_id = 0
        self._drafter = drafter or self._make_drafter()
        self._commits = [(op.spans[0].role, op.ends) for op in plan.step("decode").ops if op.op == "commit"]
        self._planner = DecodePlanner(plan, self.lanes, self.ledger)
        self._prefiller = Prefiller(plan, self.executor, self.lanes, self.ledger, self.sampler, self._tell_bound)
        self._decoder = DecodeRunner(
            self.executor, self.lanes, self.ledger, self.sampler, self._make_acceptance(), self._drafter
        )

    def add(self, request: Request) -> Sequence:
        """Queue a request; raises RequestError, and changes nothing, when it cannot be served at all."""
        capacity, vocabulary = self.plan.target.capacity, self.plan.target.vocab_size
        prompt, sampling = request.prompt_ids, request.sampling
        check_prompt(prompt, self.plan.target)
        sampling.validate_for_vocabulary(vocabulary)
        granted = min(sampling.max_new_tokens, capacity - len(prompt))
        stops = StopChecker(sampling, self._eos_ids, budget=granted) if granted else None
        text = None if self._pieces is None else Detokenizer(self._pieces, prompt)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        sequence = Sequence(self._next_id, request, seed=seed, granted=granted, stops=stops, text=text)
        self._next_id += 1
        if granted:
            self._waiting.append(sequence)
        else:
            sequence.end("length")
        for observer in self.observers:
            observer.added(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a request at once, wherever it is; its slots return. Harmless for one that has ended."""
        if sequence.state != "done":
            self._finish(sequence, "cancelled")

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._running)

    def step(self) -> list[Sequence]:
        """One step of all requests; returns those that have something new, in order of arrival.

        Raises LedgerError when the books do not balance afterwards: then nothing more can be trusted.
        """
        self.epoch += 1
        for observer in self.observers:
            observer.began(self.epoch)
        try:
            touched = {sequence.id: sequence for sequence in (*self._admit(), *self._prefill(), *self._decode())}
            self.ledger.check(self.epoch)
        except Exception as error:
            for observer in self.observers:
                observer.crashed(self.epoch, error)
            raise
        for observer in self.observers:
            observer.ended(self.epoch)
        return [touched[id] for id in sorted(touched)]

    def prefill_progress(self) -> tuple[int, int]:
        """(filled, all) tokens of the prompts that are being filled now."""
        filling = [s for s in self._running if s.state == "prefill"]
        marks = self.ledger[TARGET].committed
        filled = sum(int(marks[s.lane]) for s in filling if s.lane is not None)
        return filled, sum(s.prompt_length for s in filling)

    def show_history(self, steps: int = 3) -> str:
        """The last decode steps with their numbers, and the ledger as it is now."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise OptionError(f"steps must be an integer of 0 or more, is {steps!r}")
        last = list(self.history)[len(self.history) - min(steps, len(self.history)) :]
        shown = [show_binding(binding, kept) for binding, kept in last]
        return "\n".join([*shown, str(self.ledger)])

    # Admission

    def _admit(self) -> list[Sequence]:
        """Give lanes to waiting sequences, oldest first, while there are lanes and pages; none overtakes another.

        Returns those that failed at it.
        """
        failed: list[Sequence] = []
        while self._waiting and self.lanes.free:
            sequence, pool = self._waiting[0], self.ledger[TARGET].pool
            prefix = self._prefiller.find_prefix(sequence)
            pages = -(-(len(sequence.tokens) + 1) // pool.page_size) - len(prefix)
            # A prefix page that nobody holds is no longer evictable once it is shared.
            resting = sum(int(pool.references[page] == 0) for page in prefix)
            if self._running and pages + resting + self._promised() > pool.available:
                break
            try:
                self._start(self._waiting.pop(0), prefix)
            except Exception as error:
                self._finish(sequence, "error", as_fault(error, sequence.id, "being admitted"))
                failed.append(sequence)
        return failed

    def _promised(self) -> int:
        """Pages that admitted sequences still need for the tokens they have: not there for others to count on."""
        target = self.ledger[TARGET]
        filling = [s for s in self._running if s.state == "prefill"]
        return sum(int(target.pages_short(lanes_of([s]), np.array([len(s.tokens) + 1]))[0]) for s in filling)

    def _start(self, sequence: Sequence, prefix: list[int]) -> None:
        lanes, sampling = self.lanes, sequence.request.sampling
        lane = lanes.take()
        sequence.lane, sequence.state = lane, "prefill"
        bisect.insort(self._running, sequence, key=lambda other: other.id)
        lanes.append(lane, sequence.tokens)
        lanes.length_limit[lane] = sequence.prompt_length + sequence.granted
        # Seeds are 64 unsigned bits, kept in signed words.
        lanes.seed[lane] = np.array([sequence.seed], np.uint64).view(np.int64)[0]
        lanes.temperature[lane], lanes.top_k[lane] = sampling.temperature, min(sampling.top_k, 2**31 - 1)
        lanes.top_p[lane], lanes.min_p[lane] = sampling.top_p, sampling.min_p
        lanes.adjusts[lane] = sequence.adjuster is not None
        lanes.rate[lane], lanes.steps[lane] = lanes.start_rate, 0
        self.ledger[TARGET].open(lane, prefix)
        sequence.shared_tokens += len(prefix) * self.plan.target.page_size
        if DRAFT in self.ledger:
            self.ledger[DRAFT].open(lane, self._prefiller.find_draft_prefix(sequence))
        self._drafter.begin(lane, sequence.tokens)

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's lane and pages; it waits again at its place in the order of arrival."""
        sequence.preemptions += 1
        self._leave(sequence)
        sequence.state = "waiting"
        bisect.insort(self._waiting, sequence, key=lambda other: other.id)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: SlotwiseError | None = None) -> None:
        """End a sequence wherever it is; its slots return in every role."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence.lane is not None:
            if error is None:
                self._prefiller.publish(sequence)
            else:
                self.ledger.withdraw(sequence.lane)
            self._leave(sequence)
        sequence.end(reason, error)

    def _leave(self, sequence: Sequence) -> None:
        lane = sequence.lane
        if lane is None:
            return
        for role, peak in self.lanes.peak_slots.items():
            sequence.peak_slots[role] = max(sequence.peak_slots.get(role, 0), int(peak[lane]))
            peak[lane] = 0
        # A drafter that fails here has nobody left to fail; should the lane be taken again, it begins anew.
        with contextlib.suppress(Exception):
            self._drafter.end(lane)
        self.ledger.close(lane)
        self.lanes.give_back(lane)
        self._running.remove(sequence)
        sequence.lane = None

    # Prefill

    def _prefill(self) -> list[Sequence]:
        """Run prompt chunks, oldest first, within one chunk's worth of rows a step, and at least one chunk."""
        touched: list[Sequence] = []
        rows_left = self.plan.options.prefill_chunk
        for sequence in [s for s in self._running if s.state == "prefill"]:
            while sequence.state == "prefill" and rows_left > 0 and self._make_room(sequence):
                outcome = self._run_chunk(sequence)
                rows_left -= outcome.rows
                if outcome.is_last:
                    touched.append(sequence)
                    self._end_prefill(sequence, outcome)
        if isinstance(self._drafter, ModelDrafter):
            self._prefill_drafts(self._drafter)
        return touched

    def _run_chunk(self, sequence: Sequence) -> ChunkOutcome:
        try:
            return self._prefiller.run_chunk(sequence, self.epoch)
        except Exception as error:
            return ChunkOutcome(0, True, Verdict([], as_fault(error, sequence.id, "prefilling")))

    def _end_prefill(self, sequence: Sequence, outcome: ChunkOutcome) -> None:
        """Take the first token, if the prompt has just ended, and let the sequence decode."""
        sequence.state = "decode"
        verdict = outcome.verdict
        if verdict is None:
            return
        if verdict.fault is not None:
            self._finish(sequence, "error", verdict.fault)
            return
        before = len(sequence.tokens)
        sequence.keep(verdict.candidates)
        sequence.logprobs += outcome.logprobs
        self._take_in(sequence, before)

    def _take_in(self, sequence: Sequence, before: int) -> None:
        """Put the tokens that a sequence has kept since it had `before` into its lane; finish it if they ended it."""
        if sequence.finish_reason is not None:
            self._finish(sequence, sequence.finish_reason)
        elif sequence.lane is not None:
            fresh = sequence.tokens[before:]
            self.lanes.append(sequence.lane, fresh)
            try:
                self._drafter.extend(sequence.lane, fresh)
            except Exception as error:
                self._finish(sequence, "error", as_fault(error, sequence.id, "telling the drafter of its tokens"))

    def _prefill_drafts(self, drafter: ModelDrafter) -> None:
        """Let the draft model catch up, a chunk's worth of rows a step; meanwhile those sequences do not draft."""
        rows_left = self.plan.options.prefill_chunk
        for sequence in [s for s in self._running if s.state == "decode"]:
            while rows_left > 0 and sequence.state == "decode":
                try:
                    rows = self._prefiller.run_draft_chunk(sequence, self.epoch, drafter.catch_up)
                except Exception as error:
                    self._finish(sequence, "error", as_fault(error, sequence.id, "prefilling the draft model"))
                    break
                if not rows:
                    break
                rows_left -= rows

    def _make_room(self, sequence: Sequence) -> bool:
        """Preempt younger sequences until this one's next chunk fits; False when it had to give way itself."""
        while not self._prefiller.fits(sequence):
            youngest = self._running[-1]
            if youngest is sequence and len(self._running) == 1:
                return True  # Alone it always fits; if not, the reservation fails and says why.
            self._preempt(youngest)
            if youngest is sequence:
                return False
        return True

    # Decode

    def _decode(self) -> list[Sequence]:
        """One decode step of every sequence that has its prompt behind it."""
        decoding = [s for s in self._running if s.state == "decode"]
        while len(self._running) > 1 and decoding and self._planner.lacks_pages(lanes_of(decoding)):
            self._preempt(self._running[-1])
            decoding = [s for s in decoding if s.state == "decode"]
        if not decoding:
            return []
        planned, binding, ended = self._bind(decoding)
        if binding is not None:
            self._tell_bound(binding)
            self._settle(binding, planned, self._decoder.run(binding, planned))
        return [*ended, *planned]

    def _bind(self, decoding: list[Sequence]) -> tuple[list[Sequence], Binding | None, list[Sequence]]:
        """Plan the step. A sequence whose part cannot be planned ends; the others are planned without it."""
        ended: list[Sequence] = []
        drafts = True
        while decoding:
            chosen = lanes_of(decoding)
            try:
                offered = self._offer(chosen) if drafts else np.zeros(chosen.size, np.int64)
                binding = self._planner.bind(self.epoch, [s.id for s in decoding], chosen, offered)
                return decoding, binding, ended
            except Exception as error:
                self._release(chosen)
                faults = {s.id: fault for s in decoding if (fault := self._fault_alone(s)) is not None}
                if not faults and isinstance(error, OutOfPages):
                    # Each alone can go on, together they want too much: the youngest gives way.
                    self._preempt(decoding[-1])
                elif not faults and drafts:
                    drafts = False  # A drafter that fails for all together and for none alone: do without it.
                elif not faults:
                    raise
                for sequence in decoding:
                    if sequence.id in faults:
                        self._finish(sequence, "error", faults[sequence.id])
                        ended.append(sequence)
                decoding = [s for s in decoding if s.state == "decode"]
        return [], None, ended

    def _fault_alone(self, sequence: Sequence) -> SlotwiseError | None:
        """What goes wrong when this sequence is planned alone, None when nothing does; its reservation is undone."""
        chosen = lanes_of([sequence])
        try:
            self._planner.bind(self.epoch, [sequence.id], chosen, self._offer(chosen))
        except Exception as error:
            return as_fault(error, sequence.id, "planning its step")
        finally:
            self._release(chosen)
        return None

    def _release(self, chosen: Ints) -> None:
        for role in self.ledger.roles.values():
            role.commit(chosen, role.committed[chosen])

    def _offer(self, chosen: Ints) -> Ints:
        """The width that policy and drafter would like for each lane, before any limit."""
        if self._drafter.kind == "none":
            return np.zeros(chosen.size, np.int64)
        lanes = self.lanes
        if self.plan.options.adaptive:
            wanted = self.policy.widths(lanes.rate[chosen], lanes.steps[chosen])
        else:
            wanted = np.full(chosen.size, self.plan.options.speculate, np.int64)
        return np.minimum(self._drafter.offer(chosen, wanted), wanted)

    def _settle(self, binding: Binding, decoding: list[Sequence], verdicts: list[Verdict]) -> None:
        """Keep, commit, release, and end what has ended; stops cut first, and all else uses the length they leave."""
        for observer in self.observers:
            observer.judged(binding, verdicts)
        kept = np.zeros(len(decoding), np.int64)
        for i, (sequence, verdict) in enumerate(zip(decoding, verdicts, strict=True)):
            kept[i] = count = sequence.keep(verdict.candidates)
            sequence.verifications += 1
            sequence.drafted += int(binding.width[i])
            # Where nothing went wrong, the last candidate is the target's own.
            sequence.accepted += min(count, len(verdict.candidates) - (verdict.fault is None))
            asked = sequence.request.sampling.logprobs
            raw = self._decoder.raw_logits(i)
            if asked is not None and raw is not None:
                sequence.logprobs += logprobs_of(raw, verdict.candidates[:count], asked)
        for role, peak in self.lanes.peak_slots.items():
            peak[binding.lanes] = np.maximum(peak[binding.lanes], self.ledger[role].reserved[binding.lanes])
        self._commit(binding, np.array([v.fault is None for v in verdicts]), kept)
        self.history.append((binding, dict(zip(binding.lanes.tolist(), kept.tolist(), strict=True))))
        for i, (sequence, verdict) in enumerate(zip(decoding, verdicts, strict=True)):
            # A stop reached before the fault is the end that a user sees, as it would have been without drafts.
            if verdict.fault is not None and sequence.finish_reason is None:
                self._finish(sequence, "error", verdict.fault)
            else:
                self._take_in(sequence, int(binding.length[i]))

    def _commit(self, binding: Binding, whole: npt.NDArray[np.bool_], kept: Ints) -> None:
        """Move the committed marks as the step says; what faulted is left to be released when it closes."""
        chosen, length, width, count = binding.lanes, binding.length, binding.width, kept
        if not whole.all():
            chosen, length, width, count = chosen[whole], length[whole], width[whole], count[whole]
        marks = {"len": length, "kept": count, "k": width}
        drafting = np.flatnonzero(width)
        for role, expressions in self._commits:
            ends = functools.reduce(np.minimum, [end.evaluate(marks) for end in expressions])
            if role == DRAFT:
                self.ledger[role].commit(chosen[drafting], ends[drafting])
            else:
                self.ledger[role].commit(chosen, ends)
        lanes = self.lanes
        if drafting.size:  # a step without drafts says nothing of how many are accepted
            lanes.rate[chosen] = self.policy.update(lanes.rate[chosen], width, np.clip(count - 1, 0, width))
        lanes.steps[chosen] += 1

    # Parts

    def _tell_bound(self, binding: Binding) -> None:
        for observer in self.observers:
            observer.bound(binding)

    def _make_drafter(self) -> Drafter:
        if self.plan.draft == "ngram":
            return NgramDrafter()
        if self.plan.draft == "model":
            options = self.plan.options
            return ModelDrafter(
                self.executor,
                self.lanes,
                self.ledger,
                self.sampler,
                self._edits_of,
                acceptance=options.acceptance,
                catch_up=options.speculate + 1,
            )
        return NoDrafter()

    def _make_acceptance(self) -> Acceptance:
        rejects = self.plan.options.acceptance == "rejection" and self.plan.draft != "none"
        return Rejection(self.executor, self.sampler) if rejects else Coupled(self.sampler)

    def _edits_of(self, lane: int, drafts: SequenceOf[int]) -> Edits:
        """The edits of the sequence in `lane` after `drafts`."""
        adjuster = next(s.adjuster for s in self._running if s.lane == lane)
        if adjuster is None:
            raise RequestError(f"lane {lane} has no edits to make")
        return adjuster.edits(drafts)
