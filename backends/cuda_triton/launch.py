"""From an op's call to launches of Triton functions.

Owns `Grid` and `triton_kernel`. What always holds: the grids of a call follow from its specs and the table
of configurations alone, so what the audit compiles is what runs; memory and the order of every sum follow from shapes
and never from the table, so tuning changes no bit and no plan. Tensors on a GPU launch natively, tensors on a CPU run
in Triton's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from slotwise.backends._gpu.kernels import Given, Scratch, gpu_kernel
from slotwise.backends.cuda_triton.configurations import INTERPRETER, Configuration, generation_of
from slotwise.core.backend import CallSpec, Kernel, Launch


@dataclass(frozen=True, slots=True)
class Grid:
    """One launch: a Triton function, its grid, and what its parameters are.

    `tensors` says which argument of the op's contract (or scratch array) a pointer parameter stands for; a parameter
    named like an argument need not be listed; None is a pointer that the function does not read.
    """

    function: JITFunction[Any]
    grid: tuple[int, ...]
    configuration: Configuration
    numbers: Mapping[str, int | float] = field(default_factory=dict)
    constants: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    tensors: Mapping[str, str | Scratch | None] = field(default_factory=dict)

    def parameters(self) -> Iterable[tuple[str, str | Scratch | int | float | bool | None, bool]]:
        """(name, what it stands for, whether it is a compile-time constant) in the function's order."""
        for parameter in self.function.params:
            name = parameter.name
            if parameter.is_constexpr:
                value = self.constants[name] if name in self.constants else self.configuration.constants[name]
                yield name, value, True
            elif name in self.numbers:
                yield name, self.numbers[name], False
            else:
                yield name, self.tensors.get(name, name), False


Grids = Callable[[CallSpec, str], tuple[Grid, ...]]
"""(call, GPU generation) -> the launches that compute it."""


def triton_kernel(
    op: str,
    kind: str,
    grids: Grids,
    *,
    invariant_rows: int | None = None,
    refuses: Callable[[CallSpec], str | None] | None = None,
    workspace: Callable[[CallSpec], int] | None = None,
) -> Kernel:
    """The kernel `<op>.<kind>`. `grids` stays reachable through `grids_of`, for the audit and the tuner."""

    def launches(call: CallSpec, given: Given, scratch: torch.Tensor | None) -> list[Launch]:
        generation = generation_of(next(value.device for value in given.values() if value is not None))
        return [_launch(one, given, scratch, generation) for one in grids(call, generation) if all(one.grid)]

    kernel = gpu_kernel(op, kind, launches, invariant_rows=invariant_rows, refuses=refuses, workspace=workspace)
    _GRIDS[kernel.name] = grids
    return kernel


_GRIDS: dict[str, Grids] = {}


def grids_of(kernel: str) -> Grids:
    """The grids of the kernel called `kernel`."""
    return _GRIDS[kernel]


def _launch(one: Grid, given: Given, workspace: torch.Tensor | None, generation: str) -> Launch:
    arguments: dict[str, object] = {}
    for name, value, constant in one.parameters():
        if constant or not isinstance(value, (str, Scratch)):
            arguments[name] = value
        else:
            arguments[name] = given[value] if isinstance(value, str) else value.within(workspace)
    if generation == INTERPRETER:
        from slotwise.backends.cuda_triton.interpreter import interpret  # a GPU needs nothing of Triton's interpreter

        return functools.partial(interpret, one.function, one.grid, arguments)
    launcher = one.function[(*one.grid, 1, 1)[:3]]
    return functools.partial(
        launcher,
        **arguments,
        num_warps=one.configuration.num_warps,
        num_stages=one.configuration.num_stages,
    )
