"""No bit of a logit depends on where the tensors lie in their file: a header may be padded by any number of bytes."""

from __future__ import annotations

import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise import LLM

IDS = [1, 5, 9, 4, 7, 30, 11, 2]


def padded(source: Path, folder: Path, by: int) -> Path:
    """A copy whose header has `by` spaces more."""
    shutil.copytree(source, folder)
    data = (folder / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * by
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return folder


def loaded(folder: Path, backend: str) -> LLM:
    return LLM(folder, backend=backend, dtype="float32", capacity=32, prefill_chunk=8, threads=1, progress=False)


@functools.cache
def as_saved(folder: Path, backend: str) -> torch.Tensor:
    return loaded(folder, backend).logits(IDS)


@pytest.mark.parametrize("backend", ["reference", "numba_cpu"])
@given(by=st.integers(1, 64))
@settings(max_examples=12)
def test_logits_are_the_same_bits_wherever_tensors_lie(backend: str, by: int, random_checkpoint: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        llm = loaded(padded(random_checkpoint, Path(folder) / "m", by), backend)
        assert torch.equal(llm.logits(IDS), as_saved(random_checkpoint, backend))
