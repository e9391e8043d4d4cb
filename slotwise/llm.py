"""The Python API: a model that has been loaded, planned and can be asked.

Owns `LLM`. What always holds: everything that can be wrong with a checkpoint, an option or a plan is raised while
loading; afterwards a request's failure is its own. Any number of `generate`, `stream` and `chat` calls may be under
way at once, in one thread or several: they share the engine's steps. `AsyncLLM` is the same for asyncio.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, overload

import torch

from slotwise import debug
from slotwise.core.errors import OptionError, SlotwiseError
from slotwise.core.specs import DType
from slotwise.engine.detokenize import TokenPieces
from slotwise.engine.engine import Engine
from slotwise.engine.request import Completion
from slotwise.engine.sampling import Sampling
from slotwise.engine.sequence import Sequence as Running
from slotwise.keywords import known_keywords
from slotwise.models.chat_template import ChatTemplate, Tools
from slotwise.models.generation_config import GenerationDefaults
from slotwise.models.load import LoadedModel, load_model
from slotwise.models.tokenizer import Tokenizer
from slotwise.planning import (
    DRAFTING,
    check_path,
    check_saved,
    choose,
    load_draft,
    memory_here,
    plan_model,
    plan_within,
    subject_of,
)
from slotwise.plans.compile import AfterPass
from slotwise.plans.fit import refuse
from slotwise.plans.memory import Budget
from slotwise.plans.options import BackendChoice
from slotwise.plans.plan import Plan
from slotwise.progress import news_for, progress_for
from slotwise.recording.crash import CrashRecorder
from slotwise.recording.recorder import Recorder, record
from slotwise.requests import Prompt, RequestMaker, Samplings, by_prompt, each_completion, integers, refused, unpacked
from slotwise.sharing import SharedEngine
from slotwise.slots.step import DRAFT, TARGET
from slotwise.stream import Stream

Messages = Sequence[Mapping[str, object]]


class LLM:
    """A model ready to generate; `with LLM(...) as llm` frees its memory at the end, as `close` does.

    `model` is a Hugging Face folder, or `"org/name"`, which `slotwise get org/name` has put into its cache; `draft` is
    None, a smaller model with the same vocabulary, or `"ngram"`. `backend` is a name, a list in order of preference, or
    a mapping of ops to either (`"*"` for the rest); left out, it is `numba_cpu` where that runs.
    `capacity` is the most tokens of a sequence, prompt included (default: the model's maximum, at most 4096);
    `page_size` the slots of a page; `pages` the pages of each role's pool; `max_sequences` how many run at once;
    `dtype` what to compute in (default: the checkpoint's); `weights` how the matrices of both models are held:
    `"native"` (default), or quantised while loading, `"int8"`, `"int4"` or `"int4_zp"`.
    `speculate` is the greatest draft width; `acceptance` `"coupled"` (the output does not depend on the drafter) or
    `"rejection"`; `adaptive` whether widths follow what was accepted lately. These three are refused without a drafter,
    but for `speculate=0`. A `preset` gives values for those left out; what it says of drafts waits for a drafter.
    `memory` is how much all of it may take where kernels run, `"24GiB"` or bytes. What is left out of capacity and
    pages then follows from it: no capacity, the largest at which `max_sequences` full sequences fit; a capacity and no
    pages, as many pages as fit. What does not fit there, or here, is refused before a weight is read, with what would.
    `plan`, a saved plan or its file, stands for all of these: its options are taken, and any difference between it and
    what this version makes of these checkpoints is an error. `memory` beside it is checked and changes nothing.
    `threads` is how many threads compute, PyTorch's for the whole process included (default: one for each core; 1 is
    best for tiny models). `overlap` says whether a step without drafts may be launched before the tokens of the one
    before it are read: None where kernels run beside Python by nature, on a GPU; True on a CPU too, by one more thread;
    False never. Tokens are the same.
    `progress` shows bars for long work; by default on a terminal only.

    Raises CheckpointError, OptionError, BackendError, KernelSelectionError or PlanError, each a SlotwiseError, when
    something does not fit.
    """

    @known_keywords
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
        decode_rows: int | None = None,
        share_prefixes: bool | None = None,
        dtype: str | DType | None = None,
        weights: str | None = None,
        memory: int | str | None = None,
        preset: str | Path | None = None,
        plan: Plan | str | Path | None = None,
        threads: int | None = None,
        overlap: bool | None = None,
        progress: bool | None = None,
    ) -> None:
        for name, value in (("overlap", overlap), ("progress", progress)):
            if value is not None and not isinstance(value, bool):
                raise OptionError(f"{name} must be true, false or None, is {value!r}")
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
            "decode_rows": decode_rows,
            "share_prefixes": share_prefixes,
            "dtype": dtype,
            "weights": weights,
        }
        given = {name: value for name, value in given.items() if value is not None}
        check_path("model", model, "a checkpoint folder")
        asked = None if memory is None else Budget.given(memory)
        choice = choose(given, draft=draft, preset=preset, plan=plan)
        options, draft, saved = choice.options, choice.draft, choice.saved
        self._named = {**choice.named, "memory": memory}
        loaded = load_model(model, options.dtype)
        self._folder = loaded.checkpoint.folder
        self._vocab_size = loaded.spec.vocab_size
        self._folders = {"model": str(model), "draft": None if draft is None else str(draft)}
        self.tokenizer = Tokenizer.load(model, rows=loaded.spec.vocab_size)
        self.requests = RequestMaker(self.tokenizer, GenerationDefaults.load(model), self.eos_ids)
        """Makes requests of prompts, for who runs them on the engine."""
        self._template = ChatTemplate.load(model, self.tokenizer.special_tokens.variables)
        drafter = load_draft(draft, loaded, self.tokenizer, options.dtype)
        if saved is not None:
            check_saved(saved, loaded, drafter)
        here, ahead = memory_here(options), bool(overlap)
        budget = min((each for each in (asked, here) if each), key=lambda each: each.nbytes) if asked else None
        self._plan = saved or plan_within(loaded, drafter, options, budget, debug.pass_observer(), overlap=ahead)
        for each in (asked, here):
            refuse(subject_of(loaded, drafter, overlap=ahead), self._plan, each)
        sources = {TARGET: loaded.weights}
        if isinstance(drafter, LoadedModel):
            sources[DRAFT] = drafter.weights
        with news_for(progress), progress_for(progress) as report:
            engine = Engine(
                self._plan,
                sources,
                pieces=TokenPieces(self.tokenizer.backend),
                eos_ids=self.eos_ids,
                progress=report,
                threads=threads,
                overlap=overlap,
            )
        debug.attach(engine)
        engine.observers.append(CrashRecorder(engine, self._folders))
        self._engine = SharedEngine(engine)
        self._progress = progress

    # Generating

    # A text is also a sequence of texts; the first form that fits is meant.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: Prompt, sampling: Sampling | None = None
    ) -> Completion: ...

    @overload
    def generate(self, prompts: Sequence[Prompt], sampling: Samplings = None) -> list[Completion]: ...

    @known_keywords
    def generate(self, prompts: Any, sampling: Samplings = None) -> Completion | list[Completion]:
        """Complete one prompt (text or token ids) or several; several run together and come back in order.

        `sampling` is one for all or a list with one for each; None samples as the checkpoint's generation_config says.
        A single prompt that cannot be served raises its error; among several it comes back as a completion with
        `finish_reason` `error`, and the others are not touched. With `n` above 1 a prompt's completion has the
        n - 1 others as `alternatives`.
        """
        single, asked = self.requests.asked(prompts, sampling)
        started: list[Running | Completion] = []
        try:
            for prompt, each in each_completion(asked):
                try:
                    started.append(self._engine.add(self.requests.request(prompt, each)))
                except SlotwiseError as error:
                    if single:
                        raise
                    started.append(refused(error, each))
            running = [entry for entry in started if isinstance(entry, Running)]
            with progress_for(self._progress) as report:
                for sequence in running:
                    while sequence.state != "done":
                        self._engine.step(sequence, report)
        finally:
            self._engine.cancel(entry for entry in started if isinstance(entry, Running))
        found = [entry if isinstance(entry, Completion) else entry.completion() for entry in started]
        if single and found[0].error is not None:
            raise found[0].error
        found = by_prompt(asked, found)
        return found[0] if single else found

    @known_keywords
    def stream(self, prompt: Prompt, sampling: Sampling | None = None) -> Stream:
        """Complete one prompt piece by piece: whole characters, as soon as they are certain.

        The last chunk has the `completion`. Closing or dropping the stream early cancels the request. Raises the
        request's error, at once when it cannot be served, else where it happens.
        """
        request = self.requests.request(prompt, self.requests.for_stream(sampling))
        return Stream(self._engine, self._engine.add(request), self._progress)

    @known_keywords
    def chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> Completion:
        """Complete a conversation: `messages` are mappings with `role` and `content`, rendered by the chat template.

        `tools` are schemas or Python functions that the model may call, `documents` mappings with `title` and `text`.
        `chat_template` is another template, by its text or by the name of one of the checkpoint's.
        `continue_final_message` has the model go on with the last message (text: with that field of it, such as
        `reasoning_content`); otherwise it begins a message, unless `add_generation_prompt` is false.
        `template_variables` are further variables of the template (`{"enable_thinking": False}`). The keywords mean
        what they mean for transformers' `apply_chat_template`; docs/chat.md has all of its parameters.

        Raises RequestError when the checkpoint has no chat template, it refuses the messages or reads nothing of what
        is given to it; OptionError for a keyword that there is not.
        """
        prompt = self.chat_prompt(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        return self.generate(prompt, sampling)

    @known_keywords
    def stream_chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        *,
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> Stream:
        """`chat`, piece by piece."""
        prompt = self.chat_prompt(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        return self.stream(prompt, sampling)

    @known_keywords
    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The token ids that the chat template makes of `messages`; keywords as for `chat`."""
        text = self._template.render(
            messages,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables=template_variables,
        )
        given = {"tools": tools, "documents": documents, **(template_variables or {})}
        asked = [name for name, value in given.items() if value or name in (template_variables or {})]
        self._template.refuse_unread(asked, chat_template, tools)
        return self.tokenizer.encode(text, add_special_tokens=False)

    @known_keywords
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """The model's logits after each of `token_ids`, float32 [T, V].

        All rows go through the decode-side programs, so they are the bits that generation has at positions it decoded
        itself; a prompt goes through prefill programs, whose last bits may differ.
        """
        return self._engine.score(integers(unpacked(token_ids, "token_ids must be a list of token ids")))

    # Looking

    def plan(self, *, observe: AfterPass | None = None, **changes: Any) -> Plan:
        """The plan that this model runs; with `changes` (`draft`, `preset`, any plan option), what it would be.

        `observe(pass name, program, graph)` is called after every pass.
        """
        if not changes and observe is None:
            return self._plan
        named = {**self._named, **changes}
        if named["draft"] is None:  # what was said of a drafter that is gone, or that a saved plan had not
            named = {name: value for name, value in named.items() if name in changes or name not in DRAFTING}
        return plan_model(self._folder, observe=observe, **named)

    @known_keywords
    def ledger(self, steps: int = 3) -> str:
        """The last decode steps with their numbers, and the slot ledger as it is now."""
        return self._engine.show_history(steps)

    @known_keywords
    def record(self, path: str | Path, *, tensors: bool = False) -> AbstractContextManager[Recorder]:
        """Record what runs within the `with` block into the file `path`, a line a step; see docs/recordings.md.

        `tensors` keeps the target's logits beside it, in `path`.safetensors. Raises OutputError when the file cannot be
        written, OptionError when something is running already.
        """
        return record(self._engine.engine, path, self._folders, tensors=tensors)

    @property
    def engine(self) -> Engine:
        """The engine itself, for tools that watch it or replay on it; it has one user at a time."""
        return self._engine.engine

    @property
    def folders(self) -> Mapping[str, str | None]:
        """The checkpoint folders by what they are for, `model` and `draft`, as they were named."""
        return self._folders

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids at which a text ends: all that generation_config, config and the tokenizer name and the model has."""
        return tuple(end.id for end in self.tokenizer.special_tokens.ends if end.id < self._vocab_size)

    @property
    def default_sampling(self) -> Sampling:
        """How the checkpoint's generation_config would sample: greedy where it says nothing."""
        return self.requests.default_sampling

    # Closing

    def close(self) -> None:
        """Free the model's memory and threads; harmless when done before.

        What runs, in other threads too, ends with `finish_reason` `cancelled`. What is asked of the engine afterwards
        raises RequestError; the plan, the tokenizer and `chat_prompt` stay. PyTorch's own threads are the process's.
        """
        self._engine.close()
        gc.collect()  # an engine and its observers know each other

    def __enter__(self) -> LLM:
        self._engine.engine  # noqa: B018  a closed model is refused where it is entered, not at its first use
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
