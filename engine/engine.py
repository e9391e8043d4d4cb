"""The engine: admits requests, plans and runs steps, hands out text.

Owns the loop: one `step` admits, prefills, decodes and checks the ledger. What always holds: requests are served in
order of arrival, the oldest can always go on, and the youngest gives its pages up when there are none left; slots are
reserved before they are written and settled before the step ends, or committed and in flight; an exception in one
sequence's work ends that sequence alone; an interrupted step is computed again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf

import numpy as np

from slotwise.core.errors import OptionError, OutOfPages, RequestError
from slotwise.core.model import WeightSource
from slotwise.engine.acceptance import Acceptance, Verdict
from slotwise.engine.acceptance.coupled import Coupled
from slotwise.engine.acceptance.rejection import Rejection
from slotwise.engine.bind import StepBinder
from slotwise.engine.decode import DecodeRunner
from slotwise.engine.detokenize import Detokenizer, TokenPieces
from slotwise.engine.drafters import Drafter
from slotwise.engine.drafters.model import ModelDrafter
from slotwise.engine.drafters.ngram import NgramDrafter
from slotwise.engine.drafters.none import NoDrafter
from slotwise.engine.executor import Executor
from slotwise.engine.lanes import Lanes
from slotwise.engine.observer import Observer
from slotwise.engine.overlap import Flight, Overlap
from slotwise.engine.parts import check_prompt, lanes_of, make_ledger
from slotwise.engine.prefill import Prefiller
from slotwise.engine.prefill_phase import PrefillPhase
from slotwise.engine.request import Request
from slotwise.engine.roster import Roster
from slotwise.engine.sampling.adjust import LogitAdjuster, adjuster_for
from slotwise.engine.sampling.edits import Edits
from slotwise.engine.sampling.sampler import Sampler
from slotwise.engine.sequence import Sequence
from slotwise.engine.settle import Settler
from slotwise.engine.stops import StopChecker
from slotwise.engine.weights import Progress
from slotwise.engine.width import WidthPolicy
from slotwise.plans.plan import Plan
from slotwise.slots.binding import Binding
from slotwise.slots.show import show_binding
from slotwise.slots.step import DRAFT, TARGET

SEED_BITS = 53
"""Seeds that are drawn fit the whole numbers that JSON keeps in every language."""

HISTORY = 32
"""Steps that the engine remembers, to be printed."""


class Engine:
    """Runs requests through a plan. `weights` gives each role's tensors; `pieces` makes text of tokens (None: none).

    `drafter` replaces the plan's own (for tests and experiments); it proposes, and cannot touch accounting. `overlap`
    says whether a step may be started before the one before it is read: see `Executor`.
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
        overlap: bool | None = None,
    ) -> None:
        self.plan = plan
        self.executor = Executor(plan, weights, progress, threads, overlap)
        self.ledger = make_ledger(plan)
        self.policy = WidthPolicy(plan.options.speculate, plan.draft_cost_ratio)
        lanes = plan.options.max_sequences
        draft_ids = plan.role(DRAFT).vocab_size if plan.drafts_fewer_ids else None
        self.lanes = Lanes(lanes, plan.target.capacity, self.policy.start_rate, self.ledger.roles, draft_ids)
        self.sampler = Sampler(self.executor, self.lanes)
        self.epoch = 0
        self.history: deque[tuple[Binding, dict[int, int]]] = deque(maxlen=HISTORY)
        self.observers: list[Observer] = []
        self._pieces = pieces
        self._eos_ids = tuple(eos_ids)
        self._next_id = 0
        self._drafter = drafter or self._make_drafter()
        self._prefiller = Prefiller(plan, self.executor, self.lanes, self.ledger, self.sampler, self._tell_bound)
        self.roster = Roster(self.lanes, self.ledger, self._prefiller, self._drafter)
        catch_up = self._drafter.catch_up if isinstance(self._drafter, ModelDrafter) else None
        self._prefill = PrefillPhase(self._prefiller, self.roster, plan.options.prefill_chunk, catch_up)
        self._binder = StepBinder(plan, self.lanes, self.ledger, self.policy, self._drafter, self.roster)
        self._decoder = DecodeRunner(
            self.executor, self.lanes, self.ledger, self.sampler, self._make_acceptance(), self._drafter
        )
        self._settler = Settler(plan, self.lanes, self.ledger, self.policy)
        self._overlap = Overlap(self.executor, self.lanes, self.ledger, self.sampler)
        self._flight: Flight | None = None

    @property
    def pieces(self) -> TokenPieces | None:
        """What makes text of tokens; None where nothing does."""
        return self._pieces

    def add(self, request: Request) -> Sequence:
        """Queue a request; raises RequestError, and changes nothing, when it cannot be served at all."""
        vocabulary = self.plan.target.vocab_size
        prompt, sampling = request.prompt_ids, request.sampling
        check_prompt(prompt, self.plan.target)
        sampling.validate_for_vocabulary(vocabulary)
        if sampling.n != 1:
            raise OptionError(f"n: a request is for one completion, found {sampling.n}; LLM.generate adds n of them")
        requested = sampling.budget(len(prompt))
        granted = self.granted(request)
        if not granted and sampling.prompt_logprobs is not None:
            raise OptionError(
                f"prompt_logprobs: a prompt of {len(prompt)} tokens leaves no room for a new one, so it is not run; "
                "raise max_length or capacity, or take log-probabilities from LLM.logits"
            )
        pieces = self._pieces
        shown = pieces if pieces is None or sampling.skip_special_tokens else pieces.with_special
        silent = {} if shown is None else shown.silent
        stops = None
        if granted:
            stops = StopChecker(sampling, self._eos_ids, budget=granted, prompt_length=len(prompt), silent=silent)
        sequence = Sequence(
            self._next_id,
            request,
            seed=secrets.randbits(SEED_BITS) if sampling.seed is None else sampling.seed,
            requested=granted if requested is None else requested,
            granted=granted,
            stops=stops,
            text=None if shown is None else Detokenizer(shown, prompt),
            adjuster=self.adjuster_for(request),
            bytes_of=None if pieces is None else pieces.with_special.continuing,
        )
        self._next_id += 1
        if granted:
            self.roster.waiting.append(sequence)
        else:
            sequence.end("length")
        for observer in self.observers:
            observer.added(sequence)
        return sequence

    def granted(self, request: Request) -> int:
        """The most tokens that a request may be given: what it asks for, where the capacity leaves as many."""
        prompt_length = len(request.prompt_ids)
        requested, room = request.sampling.budget(prompt_length), self.plan.target.capacity - prompt_length
        return room if requested is None else min(requested, room)

    def adjuster_for(self, request: Request) -> LogitAdjuster | None:
        """What edits the logits of a request, with nothing committed; None where nothing does."""
        return adjuster_for(request.sampling, request.prompt_ids, self._eos_ids, self.granted(request))

    def cancel(self, sequence: Sequence) -> None:
        """End a request at once, wherever it is; its slots return. Harmless for one that has ended."""
        if sequence.state != "done":
            self.roster.finish(sequence, "cancelled")

    def close(self) -> None:
        """End all requests and wait for what runs beside the host; the engine is not to be stepped afterwards."""
        for sequence in [*self.roster.running, *self.roster.waiting]:
            self.cancel(sequence)
        self._flight = None
        if self.executor.stream is not None:
            self.executor.stream.join()

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.roster.waiting or self.roster.running)

    def step(self) -> list[Sequence]:
        """One step of all requests; returns those that have something new, in order of arrival.

        Raises LedgerError when the books do not balance afterwards: then nothing more can be trusted.
        """
        self.epoch += 1
        for observer in self.observers:
            observer.began(self.epoch)
        try:
            touched = self.roster.admit()
            flight, self._flight = self._flight, None
            if flight is not None and not self._may_overlap:
                touched += self._land(flight)
                flight = None
            touched += [*self._prefill.run(self.epoch), *self._decode(flight)]
            self.ledger.check(self.epoch)
        except Exception as error:
            for observer in self.observers:
                observer.crashed(self.epoch, error)
            raise
        except BaseException:
            self._give_up()  # Interrupted anywhere: what was under way is computed again.
            raise
        for observer in self.observers:
            observer.ended(self.epoch)
        return sorted(dict.fromkeys(touched), key=lambda sequence: sequence.id)

    def prefill_progress(self) -> tuple[int, int]:
        """(filled, all) tokens of the prompts that are being filled now."""
        filling = self.roster.filling
        marks = self.ledger[TARGET].committed
        filled = sum(int(marks[s.lane]) for s in filling if s.lane is not None)
        return filled, sum(s.prompt_length for s in filling)

    def show_history(self, steps: int = 3) -> str:
        """The last decode steps with their numbers, and the ledger as it is now."""
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise OptionError(f"steps must be an integer of 0 or more, is {steps!r}")
        last = list(self.history)[len(self.history) - min(steps, len(self.history)) :]
        shown = [show_binding(binding, kept) for binding, kept in last]
        failed = self._overlap.last_error
        if failed is not None:
            shown.append(f"a step that was started ahead failed and was run again: {type(failed).__name__}: {failed}")
        return "\n".join([*shown, str(self.ledger)])

    # Decode

    def _decode(self, flight: Flight | None) -> list[Sequence]:
        """One decode step of every sequence that has its prompt behind it; with `flight`, the one after that."""
        if flight is not None:
            self._flight = self._follow(flight)
            return self._land(flight)
        running, decoding = self.roster.running, self.roster.decoding
        while len(running) > 1 and decoding and self._binder.lacks_pages(decoding):
            self.roster.preempt(running[-1])
            decoding = self.roster.decoding
        if not decoding:
            return []
        planned, binding, ended = self._binder.bind(self.epoch, decoding)
        if binding is not None:
            self._tell_bound(binding)
            flight = self._start_ahead(binding, planned) if self._may_overlap else None
            if flight is not None:
                self._flight = self._follow(flight)
                planned = self._land(flight)
            else:
                self._settle(binding, planned, self._decoder.run(binding, planned))
        return [*ended, *planned]

    @property
    def _may_overlap(self) -> bool:
        """Whether steps may be started ahead now: for whoever has a prompt to fill the next is bound anew."""
        return (
            self._overlap.is_possible
            and not self.roster.filling
            and not any(observer.is_in_step for observer in self.observers)
        )

    def _follow(self, flight: Flight) -> Flight | None:
        """Start the step after `flight`, whose tokens are not read yet; None where something stands against it."""
        lengths, limits = self.lanes.length, self.lanes.length_limit
        going_on = [
            s
            for s in flight.sequences
            if s.state == "decode" and s.lane is not None and lengths[s.lane] < limits[s.lane]
        ]
        if not going_on or not self._overlap.can_follow(flight):
            return None
        if flight.binding.epoch == self.epoch:
            self.epoch += 1
        try:
            chosen = lanes_of(going_on)
            ids = [s.id for s in going_on]
            binding = self._binder.planner.plan(self.epoch, ids, chosen, np.zeros(chosen.size, np.int64))
        except Exception as error:
            # Whatever it is, the step is planned again when the flight has landed; that pages run out is usual.
            self._binder.release(chosen)
            if not isinstance(error, OutOfPages):
                self._overlap.last_error = error
            return None
        self._tell_bound(binding)
        found = self._start_ahead(binding, going_on, flight)
        if found is None:
            self._binder.release(chosen)
        return found

    def _start_ahead(self, binding: Binding, sequences: list[Sequence], before: Flight | None = None) -> Flight | None:
        """Start a bound step and commit it; None, with nothing changed, where it must be waited for."""
        if not self._overlap.takes(sequences, binding):
            return None
        try:
            flight = self._overlap.start(binding, sequences, before)
        except Exception as error:
            self._overlap.last_error = error
            return None  # Run in the usual way, it is found out whose fault it is.
        one = np.ones(len(sequences), np.int64)
        self._settler.commit(binding, one > 0, one)
        self.lanes.length[binding.lanes] += 1
        return flight

    def _land(self, flight: Flight) -> list[Sequence]:
        """Read a flight's tokens; returns its sequences but those that had ended before it was read."""
        landed = [s for s in flight.sequences if s.state == "decode"]
        try:
            verdicts = self._overlap.read(flight)
        except Exception as error:
            # What it wrote is not to be trusted, nor what has been started behind it.
            self._overlap.doubt(landed, error)
            if landed:
                self._give_up()
            return []
        self._settle(flight.binding, list(flight.sequences), verdicts, is_committed=True)
        return landed

    def _give_up(self) -> None:
        """Let everything that runs be computed again from its tokens; all of it, so that nobody is overtaken."""
        self._flight = None
        for sequence in list(self.roster.running):
            if sequence.finish_reason is not None:  # interrupted between its last token and its end
                self.roster.finish(sequence, sequence.finish_reason)
            else:
                self.roster.preempt(sequence)

    def _settle(
        self, binding: Binding, decoding: list[Sequence], verdicts: list[Verdict], *, is_committed: bool = False
    ) -> None:
        """Keep, commit, release, and end what has ended; stops cut first, and all else uses the length they leave.

        A step that was started ahead is committed already, a slot a sequence; who ended meanwhile takes nothing of it.
        """
        going_on = [i for i, sequence in enumerate(decoding) if sequence.state == "decode"]
        if not going_on:
            return
        for observer in self.observers:
            # One that wants steps one by one has come since this one was started, and never heard of it.
            if not (is_committed and observer.is_in_step):
                observer.judged(binding, verdicts)
        self._settler.note_peaks(binding, going_on)
        kept = np.ones(len(decoding), np.int64)
        for i in going_on:
            raw = None if is_committed else self._decoder.raw_logits(i)
            kept[i] = self._settler.keep(decoding[i], verdicts[i], int(binding.width[i]), raw)
        if not is_committed:
            self._settler.commit(binding, np.array([v.fault is None for v in verdicts]), kept)
        self.history.append((binding, dict(zip(binding.lanes.tolist(), kept.tolist(), strict=True))))
        for i in going_on:
            sequence, verdict = decoding[i], verdicts[i]
            # A stop reached before the fault is the end that a user sees, as it would have been without drafts.
            if verdict.fault is not None and sequence.finish_reason is None:
                self.roster.finish(sequence, "error", verdict.fault)
            else:
                self.roster.take_in(sequence, int(binding.length[i]))

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
                Sampler(self.executor, self.lanes, DRAFT),
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
        adjuster = next(s.adjuster for s in self.roster.running if s.lane == lane)
        if adjuster is None:
            raise RequestError(f"lane {lane} has no edits to make")
        return adjuster.edits(drafts)
