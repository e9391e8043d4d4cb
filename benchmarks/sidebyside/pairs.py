"""A target and a drafter, in slotwise and in transformers.

Owns `Generated` and the two engines of `benchmarks/speculation.py`. What always holds: seconds are of the whole call,
the prompt included; `target_calls` counts how often the target ran after the prompt's own call where that yields a
token of its own (slotwise), and every call where the first one verifies drafts already (transformers).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Generated:
    """One generation: new tokens, seconds, calls of the target, tokens drafted and accepted, width of each step."""

    tokens: tuple[int, ...]
    seconds: float
    target_calls: int
    drafted: int
    accepted: int
    widths: tuple[int, ...] = ()


def load(engine: str, target: Path, threads: int, **options: Any) -> Any:
    """`slotwise` or `transformers` with a target and, in `options`, its drafter."""
    import torch

    torch.set_num_threads(threads)
    return SlotwisePair(target, threads, **options) if engine == "slotwise" else TransformersPair(target, **options)


class SlotwisePair:
    """`draft` is a folder, `ngram` or None."""

    def __init__(self, target: Path, threads: int, draft: str | None, backend: str, **options: Any) -> None:
        import slotwise

        self._sampling = slotwise.Sampling
        self._llm = slotwise.LLM(
            target,
            draft=draft,
            backend=backend,
            threads=threads,
            max_sequences=1,
            share_prefixes=False,
            progress=False,
            **options,
        )

    def about(self) -> str:
        """What was chosen, for the reader."""
        plan = self._llm.plan()
        return (
            f"speculate={plan.options.speculate}, adaptive={plan.options.adaptive}, {plan.options.acceptance}, "
            f"{plan.target.dtype.value}, {'+'.join(plan.options.backend_names)}"
        )

    def generate(self, prompt: Sequence[int], new: int, temperature: float, seed: int) -> Generated:
        """`new` tokens after `prompt`; stop tokens are off."""
        sampling = self._sampled(new, temperature, seed)
        start = time.perf_counter()
        completion = self._llm.generate(list(prompt), sampling)
        seconds = time.perf_counter() - start
        stats = completion.stats
        return Generated(completion.token_ids, seconds, stats.verifications, stats.drafted, stats.accepted)

    def widths(self, prompt: Sequence[int], new: int, temperature: float, seed: int) -> tuple[int, ...]:
        """The draft width of each decode step of that generation, which is the same every time."""
        found: list[int] = []
        engine, epoch = self._llm.engine, 0
        for _ in self._llm.stream(list(prompt), self._sampled(new, temperature, seed)):
            if engine.history and engine.history[-1][0].epoch != epoch:
                binding, _kept = engine.history[-1]
                epoch = binding.epoch
                found.append(int(binding.width[0]))
        return tuple(found)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Float32 [T, V]."""
        return self._llm.logits(list(tokens)).numpy()

    def _sampled(self, new: int, temperature: float, seed: int) -> Any:
        return self._sampling(max_new_tokens=new, temperature=temperature, seed=seed, ignore_eos=True)


class TransformersPair:
    """`draft` is a folder for assisted generation, `prompt lookup`, or None; `drafts` None leaves the library's own."""

    def __init__(self, target: Path, draft: str | None, dtype: str, drafts: int | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._torch = torch
        self._model: Any = _plain(AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype)))
        self._how: dict[str, Any] = {}
        if draft == "prompt lookup":
            self._how["prompt_lookup_num_tokens"] = drafts or 10
        elif draft is not None:
            assistant = _plain(AutoModelForCausalLM.from_pretrained(draft, dtype=getattr(torch, dtype)))
            if drafts is not None:
                settings = assistant.generation_config
                settings.num_assistant_tokens = drafts
                settings.num_assistant_tokens_schedule = "constant"
                settings.assistant_confidence_threshold = 0.0
            self._how["assistant_model"] = assistant
        self._about = f"generate, {dtype}" + (f", {drafts} drafts" if drafts else "")
        self._calls = self._drafted = self._accepted = 0
        self._model.register_forward_hook(self._count_call)
        self._make_candidates = self._model._get_candidate_generator
        self._model._get_candidate_generator = self._counted_candidates

    def about(self) -> str:
        """What was chosen, for the reader."""
        return self._about

    def generate(self, prompt: Sequence[int], new: int, temperature: float, seed: int) -> Generated:
        """`new` tokens after `prompt`; stop tokens are off."""
        torch = self._torch
        torch.manual_seed(seed)
        # Without these, the library samples from the likeliest 50 alone.
        sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how = sampled if temperature else {"do_sample": False}
        ids = torch.tensor([list(prompt)])
        self._calls = self._drafted = self._accepted = 0
        start = time.perf_counter()
        with torch.inference_mode():
            found = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **how, **self._how
            )
        seconds = time.perf_counter() - start
        tokens = tuple(found[0, len(prompt) :].tolist())
        return Generated(tokens, seconds, self._calls, self._drafted, self._accepted)

    def logits(self, tokens: Sequence[int]) -> Any:
        """Float32 [T, V]."""
        with self._torch.inference_mode():
            return self._model(input_ids=self._torch.tensor([list(tokens)])).logits[0].float().numpy()

    def _count_call(self, *_: Any) -> None:
        self._calls += 1

    def _counted_candidates(self, *arguments: Any, **named: Any) -> Any:
        """The library's candidate generator, with what goes through it counted."""
        made = self._make_candidates(*arguments, **named)
        propose, settle = made.get_candidates, made.update_candidate_strategy

        def counted_propose(ids: Any, *rest: Any, **more: Any) -> Any:
            found = propose(ids, *rest, **more)
            self._drafted += found[0].shape[1] - ids.shape[1]
            return found

        def counted_settle(ids: Any, scores: Any, matches: Any) -> Any:
            self._accepted += int(matches)
            return settle(ids, scores, matches)

        made.get_candidates, made.update_candidate_strategy = counted_propose, counted_settle
        return made


def _plain(model: Any) -> Any:
    """The model without what its generation_config would add: no stop tokens, no sampling of its own."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
    return model.eval()
