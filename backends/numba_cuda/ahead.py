"""Compiling kernels for GPUs that are not here.

Owns `compile_call`. What always holds: the launches compiled are those that `launch.py` would make for the call with
aligned tensors, with the argument types that `native.py` passes; each kernel is compiled once for a generation, however
many calls lead to it. Numba-CUDA compiles to PTX, and nvJitLink, which comes with it, assembles that: neither needs a
GPU or a driver.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from slotwise.backends._gpu.kernels import Scratch
from slotwise.backends.numba_cuda.launch import Grid, array_type, grids_of
from slotwise.core.backend import CallSpec
from slotwise.core.errors import BackendError
from slotwise.core.machine_code import MachineCode

GENERATIONS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


def choices(generation: str) -> frozenset[str]:
    """Configurations of a table of them: this backend has none, what a kernel is follows from its call."""
    return frozenset()


def compile_call(kernel: str, call: CallSpec, generation: str) -> Iterator[MachineCode]:
    """The machine code of every launch of `kernel` for `call` on `generation` (`sm_90`).

    Raises BackendError where Numba-CUDA or its compilers are not installed.
    """
    for one in grids_of(kernel)(call, True):
        yield MachineCode(
            kernel,
            one.kernel.__name__,
            call.dtype.value,
            f"{one.threads} threads",
            generation,
            _cubin(one.kernel, types_of(one, call), generation),
            one.threads,
            0,
        )


def types_of(one: Grid, call: CallSpec) -> tuple[str, ...]:
    """What each argument is: a numpy type's name, and `[]` behind it for an array."""
    contract = call.contract
    names = (argument.name for argument in (*contract.inputs, *contract.outputs))
    specs = dict(zip(names, (*call.inputs, *call.outputs), strict=True))
    found = []
    for value in one.arguments:
        if isinstance(value, str):
            spec = specs[value]
            assert spec is not None  # a kernel names the arguments that its call has
            found.append(f"{np.dtype(array_type(spec.dtype)).name}[]")
        elif isinstance(value, Scratch):
            found.append(f"{np.dtype(array_type(value.dtype)).name}[]")
        else:
            found.append("float32" if isinstance(value, float) else "int64")
    return tuple(found)


@functools.cache
def _cubin(kernel: Any, types: tuple[str, ...], generation: str) -> bytes:
    ptx = ptx_of(kernel, types, generation)
    from cuda.core import Linker, LinkerOptions, ObjectCode

    linked = Linker(ObjectCode.from_ptx(ptx.encode()), options=LinkerOptions(arch=generation)).link("cubin")
    return bytes(linked.code)


def ptx_of(kernel: Any, types: tuple[str, ...], generation: str) -> str:
    """What Numba-CUDA compiles `kernel` to, for arguments of these types (`types_of`); raises as `compile_call`."""
    try:
        import cuda.core  # noqa: F401  (comes with the compilers)
        from numba import cuda as numba_cuda
        from numba.cuda import dispatcher
        from numba.cuda import types as numba_types
    except ImportError as error:
        raise BackendError(
            f"Numba-CUDA and CUDA's compilers are needed to compile for a GPU ({error}); pip install 'numba-cuda[cu13]'"
        ) from error
    signature = tuple(
        numba_types.Array(getattr(numba_types, name[:-2]), 1, "C")
        if name.endswith("[]")
        else getattr(numba_types, name)
        for name in types
    )
    digits = generation.removeprefix("sm_")
    capability = (int(digits[:-1]), int(digits[-1]))
    # Numba-CUDA compiles a kernel for the capability that it is told, and asks the GPU at hand, which need not be
    # there, about the functions that it calls. Those become LLVM's language alone, in which generations are alike.
    at_hand = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
    try:
        ptx: str = numba_cuda.compile_ptx(kernel.function(), signature, cc=capability, **kernel.options)[0]
    finally:
        dispatcher.get_current_device = at_hand
    return ptx
