"""llama.cpp as an engine, through llama-cpp-python's low-level calls.

What always holds: a step is one `llama_decode` and an argmax over the logits where they lie, which is less than the
package's own `Llama.generate` does; the build is the one that pip made, for this machine's own processor unless told
otherwise; weights are repacked as llama.cpp sees fit, its flash attention is on where it supports it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
import numpy.typing as npt

from sidebyside.engine import About, Tokens
from sidebyside.gguf_files import make_gguf
from sidebyside.shapes import Shape

CAPACITY = 768
BATCH = 8
CHUNK = 512


def load(shape: Shape, folder: Path, threads: int, kind: str) -> LlamaCppEngine:
    """The checkpoint as GGUF of `kind`."""
    return LlamaCppEngine(shape, make_gguf(shape, folder, kind), threads, kind)


class LlamaCppEngine:
    """See `sidebyside.engine.Engine`."""

    def __init__(self, shape: Shape, file: Path, threads: int, kind: str) -> None:
        self.shape, self.kind = shape, kind
        self.said: list[str] = []
        # Kept: a callback that Python collects would be called all the same.
        self._log = api.llama_log_callback(lambda level, text, _: self.said.append(text.decode(errors="replace")))
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(file).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp did not load {file.name}: {self._last_words()}")
        self._single = _Context(self, threads, sequences=1)
        self._many = _Context(self, threads, sequences=BATCH)

    def about(self) -> About:
        """See `Engine`."""
        described = " ".join(api.llama_print_system_info().decode().split())
        return About(
            weight_bytes=api.llama_model_size(self._model),
            kv_itemsize=2,
            settings=f"llama_decode, {self.kind} with float16 cache; {described}",
        )

    def decode(self, prompt: Tokens, new: int) -> tuple[float, float]:
        """See `Engine`."""
        context = self._single
        context.clear()
        start = time.perf_counter()
        context.feed(prompt)
        token = context.likeliest(-1)
        first = time.perf_counter()
        for _ in range(new):
            context.feed([token])
            token = context.likeliest(-1)
        return first - start, time.perf_counter() - first

    def decode_batch(self, prompts: Sequence[Tokens], steps: int) -> float:
        """See `Engine`."""
        context = self._many
        context.clear()
        tokens = []
        for sequence, prompt in enumerate(prompts):
            context.feed(prompt, sequence)
            tokens.append(context.likeliest(-1))
        length = len(prompts[0])
        start = time.perf_counter()
        for step in range(steps):
            context.feed_each(tokens, length + step)
            tokens = [context.likeliest(sequence) for sequence in range(len(prompts))]
        return time.perf_counter() - start

    def rows(self, tokens: Tokens) -> float:
        """See `Engine`."""
        self._single.clear()
        start = time.perf_counter()
        self._single.feed(tokens, every_row=True)
        return time.perf_counter() - start

    def logits(self, tokens: Tokens) -> npt.NDArray[np.float32]:
        """See `Engine`."""
        self._single.clear()
        self._single.feed(tokens, every_row=True)
        return np.stack([self._single.logits(row) for row in range(len(tokens))])

    def _last_words(self) -> str:
        return " ".join("".join(self.said).split())[-300:]


class _Context:
    """A llama_context with its batch."""

    def __init__(self, engine: LlamaCppEngine, threads: int, sequences: int) -> None:
        params = api.llama_context_default_params()
        params.n_ctx = CAPACITY * sequences
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # sequences here have no common prefix
        params.no_perf = True
        self._engine, self._vocab = engine, engine.shape.vocab
        self._context: Any = api.llama_init_from_model(engine._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context: {engine._last_words()}")
        self._memory = api.llama_get_memory(self._context)
        self._batch = api.llama_batch_init(CHUNK, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        api.llama_memory_clear(self._memory, False)

    def feed(self, tokens: Tokens, sequence: int = 0, every_row: bool = False) -> None:
        """Continue one sequence by `tokens`."""
        start = 1 + int(api.llama_memory_seq_pos_max(self._memory, sequence))
        last = len(tokens) - 1
        self._decode([(token, start + i, sequence, every_row or i == last) for i, token in enumerate(tokens)])

    def feed_each(self, tokens: Tokens, position: int) -> None:
        """One token of each sequence, all at `position`."""
        self._decode([(token, position, sequence, True) for sequence, token in enumerate(tokens)])

    def logits(self, row: int) -> npt.NDArray[np.float32]:
        """A copy of the logits of a row that was fed; -1 is the last."""
        return self._row(row).copy()

    def likeliest(self, row: int) -> int:
        """The likeliest token after a row that was fed."""
        return int(self._row(row).argmax())

    def _row(self, row: int) -> npt.NDArray[np.float32]:
        pointer = api.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab,))

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = api.llama_decode(self._context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}: {self._engine._last_words()}")
