"""From an op's call to launches on a GPU: what the GPU backends share.

Owns `gpu_kernel`, `Scratch` and its arrays. What always holds: a backend says which launches compute a call, from the
call's specs and tensors; what a call is, which dtypes are computed in, how scratch arrays lie in a call's workspace and
in what order launches run is the same for all of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors, needs_no_workspace, wants_rows
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType, TensorSpec

ALIGNMENT = 256
"""Bytes: where each scratch array starts."""

FLOATS = (DType.F32, DType.F16, DType.BF16)

Given = Mapping[str, torch.Tensor | None]
"""A call's tensors by the names of its contract; None for an optional one that is left out."""

Launches = Callable[[CallSpec, Given, torch.Tensor | None], Sequence[Launch]]
"""(call, its tensors, workspace) -> the launches that compute it, in order."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """An array in the call's workspace, `offset` bytes from its start."""

    offset: int
    dtype: DType

    def within(self, workspace: torch.Tensor | None) -> torch.Tensor:
        """The array, to the workspace's end in whole elements."""
        assert workspace is not None  # a kernel with scratch arrays declares its workspace
        item = self.dtype.itemsize
        size = (workspace.numel() - self.offset) // item * item
        return workspace[self.offset : self.offset + size].view(self.dtype.torch)


def aligned_size(size: int) -> int:
    """`size` bytes, rounded up so that another scratch array can follow."""
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def gpu_kernel(
    op: str,
    kind: str,
    launches: Launches,
    *,
    invariant_rows: int | None = None,
    refuses: Callable[[CallSpec], str | None] | None = None,
    workspace: Callable[[CallSpec], int] | None = None,
) -> Kernel:
    """The kernel `<op>.<kind>`, which takes weights in rows and computes in `FLOATS`."""

    def why_not(call: CallSpec) -> str | None:
        if call.dtype not in FLOATS:
            return f"it computes in f32, f16 or bf16, not in {call.dtype.value}"
        return wants_rows(call) or (None if refuses is None else refuses(call))

    bind = functools.partial(_bind, op, launches)
    return Kernel(op, f"{op}.{kind}", bind, why_not, invariant_rows, workspace or needs_no_workspace)


def _bind(
    op: str,
    launches: Launches,
    inputs: Tensors,
    outputs: tuple[torch.Tensor, ...],
    attrs: Mapping[str, Attr],
    workspace: torch.Tensor | None,
) -> Launch:
    contract = contract_of(op)
    names = [argument.name for argument in (*contract.inputs, *contract.outputs)]
    given = dict(zip(names, (*inputs, *outputs), strict=True))

    def spec(value: torch.Tensor) -> TensorSpec:
        return TensorSpec(DType.of(value), tuple(value.shape))

    call = CallSpec(op, tuple(None if v is None else spec(v) for v in inputs), tuple(map(spec, outputs)), attrs)
    found = tuple(launches(call, given, workspace))
    return found[0] if len(found) == 1 else functools.partial(_in_turn, found)


def _in_turn(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch()
