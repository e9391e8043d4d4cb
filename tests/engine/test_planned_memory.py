"""What a plan says that it takes is what the loaded engine holds, within 2%."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from slotwise import LLM
from slotwise.engine.engine import Engine
from slotwise.plans.memory import need_of


def _distinct(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; those that share their memory count once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


def _arrays_in(owner: object) -> int:
    return sum(value.nbytes for value in vars(owner).values() if isinstance(value, np.ndarray))


def _held(engine: Engine) -> dict[str, int]:
    """Bytes of all tensors and arrays that the engine holds, by kind."""
    executor, arrays = engine.executor, engine.executor.arrays
    blocks = [block.memory for block in arrays._blocks]
    large = [tensor for tensor in executor.buffers.values() if tensor.dim() > 1]
    host = [tensor for tensor in arrays._host.values() if tensor.dim() > 1] + list(arrays._host_blocks)
    packed = sum(
        part.given.nbytes + part.results.nbytes + sum(table.nbytes for table in part.tables.values())
        for part in arrays._spare
    )
    tables = _arrays_in(engine.lanes) + sum(each.nbytes for each in engine.lanes.peak_slots.values())
    for role in engine.ledger.roles:
        pool = engine.ledger[role].pool
        tables += _arrays_in(engine.ledger[role]) + _arrays_in(pool)
        tables += sum(8 + 32 for _ in pool._free)  # a place in the list, and a number
    return {
        "weights": _distinct(each for role in executor.weights.values() for each in role.values()),
        "states": _distinct(each for role in executor.caches.values() for each in role.values()),
        "arena": executor.arena.nbytes,
        "arrays": _distinct([*blocks, *large, *host]) + packed,
        "tables": tables,
    }


@pytest.mark.parametrize("backend", ["reference", "numba_cpu"])
@pytest.mark.parametrize(
    "options",
    [{}, {"weights": "int8"}, {"weights": "int4_zp", "pages": 40}, {"overlap": True}, {"draft": "model"}],
    ids=str,
)
def test_planned_bytes_are_those_that_are_held(
    stories: Path, stories_draft: Path, backend: str, options: dict[str, Any]
) -> None:
    chosen = {**options, "draft": stories_draft} if "draft" in options else options
    with LLM(stories, backend=backend, threads=1, capacity=256, max_sequences=4, **chosen) as llm:
        llm.generate("Once upon a time")
        need, held = need_of(llm.plan(), overlap=bool(options.get("overlap"))), _held(llm.engine)
        assert {kind: need.of(kind) for kind in ("weights", "states", "arena")} == {
            kind: held[kind] for kind in ("weights", "states", "arena")
        }
        assert abs(sum(held.values()) - need.held) <= 0.02 * need.held
        # The small parts by themselves: a step started ahead may not have needed both of its copies yet.
        assert held["arrays"] <= need.of("arrays") <= 1.25 * held["arrays"]
        assert held["tables"] == pytest.approx(need.of("tables"), rel=0.05)
