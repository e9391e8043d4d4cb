"""transformers as an engine: a forward call a step, with a cache, under `torch.inference_mode`.

What always holds: the loop is the leanest that the library's public classes allow (no `generate`, whose own work costs
small models a third of their speed); only the last position's logits are computed where only they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sidebyside.engine import About, Tokens
from sidebyside.shapes import Shape


def load(shape: Shape, folder: Path, threads: int, dtype: str, attention: str = "sdpa") -> TransformersEngine:
    """The checkpoint in `dtype` (a torch dtype's name)."""
    torch.set_num_threads(threads)
    return TransformersEngine(shape, folder, getattr(torch, dtype), attention)


class TransformersEngine:
    """See `sidebyside.engine.Engine`."""

    def __init__(self, shape: Shape, folder: Path, dtype: torch.dtype, attention: str) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.shape, self.dtype, self.attention = shape, dtype, attention
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
        self.model.eval()

    def about(self) -> About:
        """See `Engine`."""
        return About(
            weight_bytes=self.shape.parameters * self.dtype.itemsize,
            kv_itemsize=self.dtype.itemsize,
            settings=f"forward calls, DynamicCache, {self.attention} attention, {self.dtype}",
        )

    @torch.inference_mode()
    def decode(self, prompt: Tokens, new: int) -> tuple[float, float]:
        """See `Engine`."""
        cache = self._cache()
        start = time.perf_counter()
        token = self._step(torch.tensor([prompt]), cache)
        first = time.perf_counter()
        for _ in range(new):
            token = self._step(token, cache)
        return first - start, time.perf_counter() - first

    @torch.inference_mode()
    def decode_batch(self, prompts: Sequence[Tokens], steps: int) -> float:
        """See `Engine`."""
        cache = self._cache()
        tokens = self._step(torch.tensor([list(prompt) for prompt in prompts]), cache)
        start = time.perf_counter()
        for _ in range(steps):
            tokens = self._step(tokens, cache)
        return time.perf_counter() - start

    @torch.inference_mode()
    def rows(self, tokens: Tokens) -> float:
        """See `Engine`."""
        ids = torch.tensor([tokens])
        start = time.perf_counter()
        self.model(input_ids=ids, past_key_values=self._cache(), use_cache=True)
        return time.perf_counter() - start

    @torch.inference_mode()
    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """See `Engine`."""
        found = self.model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        return np.asarray(found.float().numpy())

    def _cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def _step(self, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        """Feed `tokens` [B, T]; the likeliest next ones [B, 1]."""
        logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1].argmax(-1, keepdim=True)
