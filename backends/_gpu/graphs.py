"""Many launches as one: CUDA graphs.

Owns `chain`. What always holds: launches read and write the same memory each time (the plan's arena, arrays, caches and
weights), so a graph captured once computes whatever those hold when it is replayed. Without a GPU the launches
run one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from slotwise.core.backend import Launch


def chain(launches: Sequence[Launch], threads: int | None) -> Launch:
    """One launch that does what `launches` do in order; `threads` means nothing to a GPU.

    The first run compiles what is not compiled yet, outside the capture. At load it computes on what the engine's
    arrays hold, zeros: one token of no sequence, written to the scratch slot. A draft loop, captured at its first use,
    computes on the rows that it is about to be replayed on, and writes the same again.
    """
    if not torch.cuda.is_available():
        return functools.partial(_run_all, tuple(launches))
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run_all(tuple(launches))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        _run_all(tuple(launches))
    return graph.replay


@functools.cache
def _pool() -> Any:
    """Kernels allocate nothing, so all graphs can share one pool."""
    found: Any = torch.cuda.graph_pool_handle()
    return found


def _run_all(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch()
