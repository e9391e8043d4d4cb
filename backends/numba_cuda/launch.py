"""From an op's call to launches of Numba-CUDA kernels.

Owns `Grid` and `cuda_kernel`. What always holds: the grids of a call follow from its specs and from whether
its tensors are aligned, so what the audit compiles is what runs; a launch's arguments are made once, when it is bound.
Tensors on a GPU launch natively, on PyTorch's current stream; tensors on a CPU run in the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from slotwise.backends._gpu.kernels import Given, Scratch, gpu_kernel
from slotwise.backends.numba_cuda.elements import ARRAYS
from slotwise.core.backend import CallSpec, Kernel, Launch
from slotwise.core.errors import BackendError
from slotwise.core.specs import DType

VECTOR = 16
"""Bytes of the widest access: where a tensor must start to be read so."""


@dataclass(frozen=True, slots=True)
class Grid:
    """One launch: a kernel, its grid, threads a block, and its arguments in the kernel's order.

    A string names an argument of the op's contract, which arrives as a flat array; a whole number arrives as int64, any
    other as float32.
    """

    kernel: Any
    grid: tuple[int, ...]
    threads: int
    arguments: tuple[str | Scratch | int | float, ...]


Grids = Callable[[CallSpec, bool], tuple[Grid, ...]]
"""(call, whether every tensor starts at a multiple of 16 bytes) -> the launches that compute it."""


def cuda_kernel(
    op: str,
    kind: str,
    grids: Grids,
    *,
    invariant_rows: int | None = None,
    refuses: Callable[[CallSpec], str | None] | None = None,
    workspace: Callable[[CallSpec], int] | None = None,
) -> Kernel:
    """The kernel `<op>.<kind>`. `grids` stays reachable through `grids_of`, for the audit."""

    def launches(call: CallSpec, given: Given, scratch: torch.Tensor | None) -> list[Launch]:
        tensors = [value for value in given.values() if value is not None and value.numel()]
        aligned = all(value.data_ptr() % VECTOR == 0 for value in tensors)
        return [_launch(one, given, scratch) for one in grids(call, aligned) if all(one.grid)]

    kernel = gpu_kernel(op, kind, launches, invariant_rows=invariant_rows, refuses=refuses, workspace=workspace)
    _GRIDS[kernel.name] = grids
    return kernel


_GRIDS: dict[str, Grids] = {}


def grids_of(kernel: str) -> Grids:
    """The grids of the kernel called `kernel`."""
    return _GRIDS[kernel]


def dims_of(call: CallSpec) -> dict[str, int]:
    """The sizes of the call's named dimensions."""
    return {n: s for n, s in call.contract.match(call.inputs, call.attrs)[0].items() if isinstance(s, int)}


def _launch(one: Grid, given: Given, workspace: torch.Tensor | None) -> Launch:
    arguments: list[Any] = []
    for value in one.arguments:
        if isinstance(value, str):
            tensor = given[value]
            assert tensor is not None  # a kernel names the arguments that its call has
            arguments.append(_flat(tensor))
        elif isinstance(value, Scratch):
            arguments.append(value.within(workspace))
        else:
            arguments.append(np.float32(value) if isinstance(value, float) else np.int64(value))
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in arguments):
        from slotwise.backends.numba_cuda.native import native_launch  # needs Numba-CUDA and a GPU

        return native_launch(one.kernel, one.grid, one.threads, arguments)
    arrays = tuple(value.numpy() if isinstance(value, torch.Tensor) else value for value in arguments)
    prepared: Launch = one.kernel.prepare(one.grid, one.threads, arrays)
    return prepared


_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.bool: torch.uint8, torch.int8: torch.uint8}


def _flat(value: torch.Tensor) -> torch.Tensor:
    """All elements in one row, in the form in which kernels take them (`ARRAYS`)."""
    if not value.is_contiguous():
        raise BackendError(f"numba_cuda takes tensors in row-major order; one of shape {tuple(value.shape)} is not")
    found = value.reshape(-1)
    return found.view(_VIEWS.get(value.dtype, value.dtype))


def array_type(dtype: DType) -> Any:
    """The numpy type that kernels see a tensor of `dtype` as."""
    return ARRAYS[dtype]
