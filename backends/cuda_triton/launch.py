"""From an op's call to launches of Triton functions.

Owns `Step`, `Scratch` and `triton_kernel`. What always holds: the steps of a call follow from its specs and the table
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

from slotwise.backends.cuda_triton.configurations import INTERPRETER, Configuration, generation_of
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors, wants_rows
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType, TensorSpec

ALIGNMENT = 256
"""Bytes: where each scratch array starts."""

FLOATS = (DType.F32, DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Scratch:
    """An array in the call's workspace, `offset` bytes from its start."""

    offset: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class Step:
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


Steps = Callable[[CallSpec, str], tuple[Step, ...]]
"""(call, GPU generation) -> the launches that compute it."""


def triton_kernel(
    op: str,
    kind: str,
    steps: Steps,
    *,
    invariant_rows: int | None = None,
    refuses: Callable[[CallSpec], str | None] | None = None,
    workspace: Callable[[CallSpec], int] | None = None,
) -> Kernel:
    """The kernel `<op>.<kind>`. `steps` stays reachable through `steps_of`, for the audit and the tuner."""

    def why_not(call: CallSpec) -> str | None:
        if call.dtype not in FLOATS:
            return f"it computes in f32, f16 or bf16, not in {call.dtype.value}"
        return wants_rows(call) or (None if refuses is None else refuses(call))

    bind = functools.partial(_bind, op, steps)
    kernel = Kernel(op, f"{op}.{kind}", bind, why_not, invariant_rows, workspace or (lambda _: 0))
    _STEPS[kernel.name] = steps
    return kernel


_STEPS: dict[str, Steps] = {}


def steps_of(kernel: str) -> Steps:
    """The steps of the kernel called `kernel`."""
    return _STEPS[kernel]


def _bind(
    op: str,
    steps: Steps,
    inputs: Tensors,
    outputs: tuple[torch.Tensor, ...],
    attrs: Mapping[str, Attr],
    workspace: torch.Tensor | None,
) -> Launch:
    contract = contract_of(op)
    names = [argument.name for argument in (*contract.inputs, *contract.outputs)]
    given = dict(zip(names, (*inputs, *outputs), strict=True))
    call = call_of(op, inputs, outputs, attrs)
    device = outputs[0].device if outputs else next(value.device for value in inputs if value is not None)
    generation = generation_of(device)
    launches = [_launch(step, given, workspace, generation) for step in steps(call, generation) if all(step.grid)]
    if len(launches) == 1:
        return launches[0]

    def launch() -> None:
        for each in launches:
            each()

    return launch


def call_of(op: str, inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> CallSpec:
    """The call that these tensors make."""

    def spec(value: torch.Tensor) -> TensorSpec:
        return TensorSpec(DType.of(value), tuple(value.shape))

    return CallSpec(op, tuple(None if v is None else spec(v) for v in inputs), tuple(map(spec, outputs)), attrs)


def _launch(
    step: Step, given: Mapping[str, torch.Tensor | None], workspace: torch.Tensor | None, generation: str
) -> Launch:
    arguments: dict[str, object] = {}
    for name, value, constant in step.parameters():
        if constant or not isinstance(value, (str, Scratch)):
            arguments[name] = value
        elif isinstance(value, str):
            arguments[name] = given[value]
        else:
            assert workspace is not None  # a kernel with scratch arrays declares its workspace
            arguments[name] = (
                workspace[value.offset :].view(torch.uint8)[: _whole(workspace, value)].view(value.dtype.torch)
            )
    if generation == INTERPRETER:
        from slotwise.backends.cuda_triton.interpreter import interpret  # a GPU needs nothing of Triton's interpreter

        return functools.partial(interpret, step.function, step.grid, arguments)
    launcher = step.function[(*step.grid, 1, 1)[:3]]
    return functools.partial(
        launcher,
        **arguments,
        num_warps=step.configuration.num_warps,
        num_stages=step.configuration.num_stages,
    )


def _whole(workspace: torch.Tensor, scratch: Scratch) -> int:
    """Bytes from the scratch array's start to the workspace's end, in whole elements."""
    return (workspace.numel() - scratch.offset) // scratch.dtype.itemsize * scratch.dtype.itemsize
