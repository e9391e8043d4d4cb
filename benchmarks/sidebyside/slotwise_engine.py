"""Slotwise as an engine, through its public API where that gives the figure.

What always holds: nothing is shared between calls (`share_prefixes` off), and what is timed is what a caller waits for:
planning, verification of bindings, the ledger and the text included.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import slotwise
from sidebyside.engine import About, Tokens
from sidebyside.shapes import Shape
from slotwise.core.errors import OptionError
from slotwise.engine.request import Request
from slotwise.plans.program import DECODE
from slotwise.slots.step import TARGET

CAPACITY = 768
BATCH = 8


def load(shape: Shape, folder: Path, threads: int, backend: str, **options: Any) -> SlotwiseEngine:
    """The checkpoint on `backend`; `options` are further arguments of `slotwise.LLM` (`dtype`, `weights`)."""
    unknown = [name for name in options if name not in inspect.signature(slotwise.LLM).parameters]
    if unknown:
        raise OptionError(f"this version of slotwise.LLM has no option {', '.join(unknown)}")
    llm = slotwise.LLM(
        folder,
        backend=backend,
        threads=threads,
        capacity=CAPACITY,
        max_sequences=BATCH,
        prefill_chunk=512,
        speculate=0,
        share_prefixes=False,
        progress=False,
        **options,
    )
    return SlotwiseEngine(llm)


class SlotwiseEngine:
    """See `sidebyside.engine.Engine`."""

    def __init__(self, llm: slotwise.LLM) -> None:
        self.llm = llm

    def about(self) -> About:
        """See `Engine`."""
        plan = self.llm.plan()
        (program,) = (p for p in plan.programs if (p.role, p.kind, p.rows) == (TARGET, DECODE, 1))
        # A token's embedding is one row of its table, which a tied head reads whole.
        read = {v.name for node in program.graph.nodes if node.op != "embedding" for v in node.inputs if v is not None}
        weight_bytes = sum(
            parameter.value.spec.nbytes()
            for parameter in program.graph.parameters
            if parameter.value.name in read and not parameter.sources[0].startswith("rope.")
        )
        settings = f"LLM(backend={'+'.join(plan.options.backend_names)!r}, share_prefixes=False), generate"
        return About(weight_bytes, plan.target.dtype.itemsize, settings)

    def decode(self, prompt: Tokens, new: int) -> tuple[float, float]:
        """See `Engine`."""
        stats = self.llm.generate(list(prompt), _greedy(new + 1)).stats
        if stats.new_tokens != new + 1:
            raise RuntimeError(f"slotwise generated {stats.new_tokens} tokens of {new + 1}")
        return stats.seconds_to_first_token, stats.seconds - stats.seconds_to_first_token

    def decode_batch(self, prompts: Sequence[Tokens], steps: int) -> float:
        """See `Engine`: the engine's own steps, from the one at which all prompts are in."""
        engine = self.llm.engine
        sequences = [engine.add(Request(tuple(prompt), _greedy(steps + BATCH + 1))) for prompt in prompts]
        while any(sequence.state != "decode" for sequence in sequences):
            engine.step()
        before = sum(sequence.new_tokens for sequence in sequences)
        start = time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds = time.perf_counter() - start
        made = sum(sequence.new_tokens for sequence in sequences) - before
        for sequence in sequences:
            engine.cancel(sequence)
        if made != steps * len(prompts):
            raise RuntimeError(f"slotwise generated {made} tokens in {steps} steps of {len(prompts)} sequences")
        return seconds

    def rows(self, tokens: Tokens) -> float:
        """See `Engine`."""
        start = time.perf_counter()
        self.llm.logits(list(tokens))
        return time.perf_counter() - start

    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """See `Engine`."""
        return np.asarray(self.llm.logits(list(tokens)).numpy())


def _greedy(new: int) -> slotwise.Sampling:
    return slotwise.Sampling(max_new_tokens=new, temperature=0.0, ignore_eos=True)
