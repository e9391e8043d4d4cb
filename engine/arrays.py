"""The engine's arrays, where kernels may live in another memory than the engine.

Owns `Arrays` and `memory_of`. What always holds: `arrays[name]` is host memory that may be read and written; what the
host may have changed since is in the kernels' memory before a program that reads it runs, and what a program wrote is
fetched when it is asked for, and not before. On a CPU both are one memory and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from slotwise.core.backend import load_backend
from slotwise.core.errors import PlanError
from slotwise.plans.plan import Plan


class Arrays(Mapping[str, npt.NDArray[np.generic]]):
    """numpy views of host memory beside the tensors that kernels use.

    `separate` keeps a copy of each tensor for the host, pinned where the tensors are a GPU's.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor], *, separate: bool) -> None:
        self._buffers = buffers
        self._separate = separate
        self._host = {name: _mirror(buffer) if separate else buffer for name, buffer in buffers.items()}
        self._views = {name: host.numpy() for name, host in self._host.items()}
        self._written: set[str] = set()  # by a program, and not fetched yet

    def __getitem__(self, name: str) -> npt.NDArray[np.generic]:
        if name in self._written:
            self._host[name].copy_(self._buffers[name])
            self._written.discard(name)
        return self._views[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def before(self, read: Iterable[str]) -> None:
        """A program is about to read these: hand over what the host may have changed."""
        if self._separate:
            for name in read:
                if name not in self._written:
                    # Waited for: the host may write the next call's rows as soon as this returns.
                    self._buffers[name].copy_(self._host[name])

    def after(self, written: Iterable[str]) -> None:
        """A program has been started that writes these."""
        if self._separate:
            self._written.update(written)


def _mirror(buffer: torch.Tensor) -> torch.Tensor:
    return torch.zeros(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)


def memory_of(plan: Plan) -> torch.device:
    """Where the plan's kernels need their tensors; raises PlanError when they do not agree."""
    chosen = {node.selection.backend for p in plan.programs for node in p.graph.nodes if node.selection is not None}
    found = {name: load_backend(name).device for name in sorted(chosen)}
    if len(set(found.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise PlanError(
            f"kernels of one plan must share a memory, but this plan mixes {places}; choose backends of one"
        )
    return torch.device(next(iter(found.values()), "cpu"))
