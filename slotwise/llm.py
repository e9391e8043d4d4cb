"""The Python API: a model that has been loaded, planned and can be asked.

Owns `LLM`. What always holds: everything that can be wrong with a checkpoint, an option or a plan is raised while
loading; afterwards a request's failure is its own. Any number of `generate`, `stream` and `chat` calls may be under
way at once, in one thread or several: they share the engine's steps.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, overload

import torch

from slotwise.core.errors import CheckpointError, OptionError, RequestError, SlotwiseError
from slotwise.core.specs import DType
from slotwise.engine.detokenize import TokenPieces
from slotwise.engine.engine import Engine
from slotwise.engine.request import Chunk, Completion, Request, Stats
from slotwise.engine.sampling import Sampling
from slotwise.engine.score import score
from slotwise.engine.sequence import Sequence as Running
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.generation_config import GenerationDefaults
from slotwise.models.load import LoadedModel, load_model
from slotwise.models.tokenizer import Tokenizer, vocabulary_mismatch
from slotwise.plans.compile import Identity, Observer, compile_plan
from slotwise.plans.options import BackendChoice, PlanOptions
from slotwise.plans.plan import Plan
from slotwise.plans.presets import apply_preset
from slotwise.plans.program import DRAFT, TARGET
from slotwise.progress import progress_for

Prompt = str | Sequence[int]
Samplings = Sampling | Sequence[Sampling] | None
Messages = Sequence[Mapping[str, object]]

NGRAM = "ngram"


class LLM:
    """A model ready to generate.

    `model` is a Hugging Face folder; `draft` is None, the folder of a smaller model with the same vocabulary, or
    `"ngram"`. `backend` is a name, a list in order of preference, or a mapping of ops to either (`"*"` for the rest).
    `capacity` is the most tokens of a sequence, prompt included (default: the model's maximum, at most 4096);
    `page_size` the slots of a page; `pages` the pages of each role's pool; `max_sequences` how many run at once;
    `speculate` the greatest draft width; `acceptance` `"coupled"` (the output does not depend on the drafter) or
    `"rejection"`; `dtype` what to compute in (default: the checkpoint's). A `preset` gives values for those left out.
    `threads` sets PyTorch's threads for the whole process (default: PyTorch's own choice; 1 is best for tiny models).
    `progress` shows bars for long work; by default on a terminal only.

    Raises CheckpointError, OptionError, BackendError, KernelSelectionError or PlanError, each a SlotwiseError, when
    something does not fit.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        draft: str | Path | None = None,
        backend: BackendChoice | None = None,
        capacity: int | None = None,
        page_size: int | None = None,
        pages: int | None = None,
        max_sequences: int | None = None,
        speculate: int | None = None,
        acceptance: str | None = None,
        adaptive: bool | None = None,
        prefill_chunk: int | None = None,
        share_prefixes: bool | None = None,
        dtype: str | DType | None = None,
        preset: str | Path | None = None,
        threads: int | None = None,
        progress: bool | None = None,
    ) -> None:
        if threads is not None:
            if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
                raise OptionError(f"threads must be an integer from 1 to 1024, is {threads!r}")
            torch.set_num_threads(threads)
        given = {
            "backend": backend,
            "capacity": capacity,
            "page_size": page_size,
            "pages": pages,
            "max_sequences": max_sequences,
            "speculate": speculate,
            "acceptance": acceptance,
            "adaptive": adaptive,
            "prefill_chunk": prefill_chunk,
            "share_prefixes": share_prefixes,
            "dtype": dtype,
        }
        self._options = settle_options(preset, {name: value for name, value in given.items() if value is not None})
        self._model = load_model(model, self._options.dtype)
        self.tokenizer = Tokenizer.load(model)
        self._defaults = GenerationDefaults.load(model)
        self._template = ChatTemplate.load(model)
        self._draft = load_draft(draft, self.tokenizer, self._options.dtype)
        self._plan = compile_for(self._model, self._draft, self._options)
        self._lock = threading.RLock()
        weights = {TARGET: self._model.weights}
        if isinstance(self._draft, LoadedModel):
            weights[DRAFT] = self._draft.weights
        with progress_for(progress) as report:
            self._engine = Engine(
                self._plan,
                weights,
                pieces=TokenPieces(self.tokenizer.backend),
                eos_ids=self._defaults.eos_token_ids or self.tokenizer.eos_ids,
                progress=report,
            )
        self._shows_progress = progress

    # Generating

    @overload
    def generate(self, prompts: str, sampling: Sampling | None = None) -> Completion: ...

    @overload
    def generate(self, prompts: Sequence[int], sampling: Sampling | None = None) -> Completion: ...

    @overload
    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], sampling: Samplings = None
    ) -> list[Completion]: ...

    def generate(self, prompts: Any, sampling: Samplings = None) -> Completion | list[Completion]:
        """Complete one prompt (text or token ids) or several; several run together and come back in order.

        `sampling` is one for all or a list with one for each; None samples as the checkpoint's generation_config says.
        A single prompt that cannot be served raises its error; among several it comes back as a completion with
        `finish_reason` `error`, and the others are not touched.
        """
        single = _is_single(prompts)
        asked: list[Prompt] = [prompts] if single else list(prompts)
        samplings = self._samplings(sampling, len(asked))
        started: list[Running | Completion] = []
        try:
            with self._lock:
                for prompt, each in zip(asked, samplings, strict=True):
                    started.append(self._start(prompt, each, single))
            with progress_for(self._shows_progress) as report:
                self._run(started, report)
        finally:
            self._cancel(started)
        found = [entry if isinstance(entry, Completion) else entry.completion() for entry in started]
        if single and found[0].error is not None:
            raise found[0].error
        return found[0] if single else found

    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Iterator[Chunk]:
        """Complete one prompt piece by piece: whole characters, as soon as they are certain.

        The last chunk has the `completion`. Closing the iterator early cancels the request. Raises the request's error,
        at once when it cannot be served, else where it happens.
        """
        (each,) = self._samplings(sampling, 1)
        with self._lock:
            sequence = self._engine.add(self._request(prompt, each))
        return self._stream(sequence)

    def chat(self, messages: Messages, sampling: Sampling | None = None, **template: Any) -> Completion:
        """Complete a conversation: `messages` are mappings with `role` and `content`, rendered by the chat template.

        `template` are further variables of the template (`tools`, `enable_thinking`, ...). Raises RequestError when the
        checkpoint has no chat template or it refuses the messages.
        """
        return self.generate(self.chat_prompt(messages, **template), sampling)

    def stream_chat(self, messages: Messages, sampling: Sampling | None = None, **template: Any) -> Iterator[Chunk]:
        """`chat`, piece by piece."""
        return self.stream(self.chat_prompt(messages, **template), sampling)

    def chat_prompt(self, messages: Messages, **template: Any) -> list[int]:
        """The token ids that the chat template makes of `messages`."""
        return self.tokenizer.encode(self._template.render(messages, **template), add_special_tokens=False)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The model's logits after each of `token_ids`, float32 [T, V]: the very bits that generation sees."""
        with self._lock:
            return score(self._engine, list(token_ids))

    # Looking

    def plan(self, *, observe: Observer | None = None, **changes: Any) -> Plan:
        """The plan that this model runs; with `changes` (any option of the constructor), what it would be with them.

        `observe(pass name, program, graph)` is called after every pass.
        """
        if not changes and observe is None:
            return self._plan
        return compile_for(self._model, self._draft, self._options.with_changes(**changes), observe)

    def ledger(self, steps: int = 3) -> str:
        """The last decode steps with their numbers, and the slot ledger as it is now."""
        with self._lock:
            return self._engine.show_history(steps)

    @property
    def default_sampling(self) -> Sampling:
        """How the checkpoint's generation_config would sample: greedy where it says nothing."""
        defaults = self._defaults
        if not defaults.do_sample:
            return Sampling()
        values = {
            "temperature": 1.0 if defaults.temperature is None else defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "repetition_penalty": defaults.repetition_penalty,
        }
        return Sampling(**cast("dict[str, Any]", {name: v for name, v in values.items() if v is not None}))

    # Parts

    def _samplings(self, sampling: Samplings, count: int) -> list[Sampling]:
        if sampling is None:
            sampling = self.default_sampling
        if isinstance(sampling, Sampling):
            return [sampling] * count
        found = list(sampling)
        if len(found) != count or not all(isinstance(each, Sampling) for each in found):
            raise OptionError(
                f"sampling must be one Sampling or a list of one for each of {count} prompts, is {sampling!r}"
            )
        return found

    def _request(self, prompt: Prompt, sampling: Sampling) -> Request:
        if isinstance(prompt, str):
            return Request(tuple(self.tokenizer.encode(prompt)), sampling)
        if isinstance(prompt, (bytes, Mapping)) or not isinstance(prompt, Sequence):
            raise RequestError(f"a prompt must be text or a list of token ids, is a {type(prompt).__name__}")
        wrong = next((token for token in prompt if isinstance(token, bool) or not isinstance(token, int)), None)
        if wrong is not None:
            raise RequestError(f"a prompt of token ids must hold integers only, found {wrong!r}")
        return Request(tuple(prompt), sampling)

    def _start(self, prompt: Prompt, sampling: Sampling, single: bool) -> Running | Completion:
        try:
            return self._engine.add(self._request(prompt, sampling))
        except SlotwiseError as error:
            if single:
                raise
            return _refused(error, sampling)

    def _run(self, started: list[Running | Completion], report: Any) -> None:
        running = [entry for entry in started if isinstance(entry, Running)]
        while any(sequence.state != "done" for sequence in running):
            with self._lock:
                self._engine.step()
                if report is not None:
                    report("prompts", *self._engine.prefill_progress())

    def _stream(self, sequence: Running) -> Iterator[Chunk]:
        try:
            while True:
                with self._lock:
                    if sequence.state != "done":
                        self._engine.step()
                    chunk = sequence.take_chunk()
                if chunk is None:
                    continue
                if chunk.completion is not None and chunk.completion.error is not None:
                    raise chunk.completion.error
                yield chunk
                if chunk.completion is not None:
                    return
        finally:
            self._cancel([sequence])

    def _cancel(self, started: Sequence[Running | Completion]) -> None:
        with self._lock:
            for entry in started:
                if isinstance(entry, Running):
                    self._engine.cancel(entry)


def _is_single(prompts: object) -> bool:
    """Whether `prompts` is one prompt: text, or a list of integers."""
    if isinstance(prompts, str):
        return True
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise RequestError(f"prompts must be text, token ids, or a list of either, is a {type(prompts).__name__}")
    return bool(prompts) and all(isinstance(entry, int) for entry in prompts)


def _refused(error: SlotwiseError, sampling: Sampling) -> Completion:
    """The completion of a request that could not be served."""
    stats = Stats(0, 0, sampling.max_new_tokens, 0, sampling.seed or 0, 0, 0, 0, 0, 0, 0.0, 0.0, {})
    return Completion("", (), "error", None, stats, error)


def settle_options(preset: str | Path | None, given: Mapping[str, Any]) -> PlanOptions:
    """The preset's options, or the defaults, with those that were given in place."""
    options = PlanOptions() if preset is None else apply_preset(PlanOptions(), preset)
    return options.with_changes(**given)


def load_draft(draft: str | Path | None, tokenizer: Tokenizer, dtype: DType | None) -> LoadedModel | str | None:
    """The drafter that `draft` names; raises CheckpointError when a draft model has another vocabulary."""
    if draft is None or draft == NGRAM:
        return None if draft is None else NGRAM
    loaded = load_model(draft, dtype)
    mismatch = vocabulary_mismatch(tokenizer, Tokenizer.load(draft))
    if mismatch is not None:
        raise CheckpointError(
            f"the draft model {draft} does not have the target's vocabulary: {mismatch}; use a draft that was made for "
            "this model, or draft='ngram'"
        )
    return loaded


def compile_for(
    model: LoadedModel, draft: LoadedModel | str | None, options: PlanOptions, observe: Observer | None = None
) -> Plan:
    """The plan of loaded models, with their names and fingerprints in it."""
    identities = {TARGET: Identity(model.spec.name, model.checkpoint.fingerprint())}
    if isinstance(draft, LoadedModel):
        identities[DRAFT] = Identity(draft.spec.name, draft.checkpoint.fingerprint())
    drafter = draft.spec if isinstance(draft, LoadedModel) else draft
    return compile_plan(model.spec, draft=drafter, options=options, identities=identities, observe=observe)


def plan_model(
    model: str | Path,
    *,
    draft: str | Path | None = None,
    preset: str | Path | None = None,
    observe: Observer | None = None,
    **options: Any,
) -> Plan:
    """The plan of a checkpoint folder, from its config and headers alone: no weight is read."""
    settled = settle_options(preset, options)
    loaded = load_model(model, settled.dtype)
    drafter = None if draft is None else load_draft(draft, Tokenizer.load(model), settled.dtype)
    return compile_for(loaded, drafter, settled, observe)
