"""Compiling kernels for GPUs that are not here.

Owns `compile_call`. What always holds: the launches compiled are those that `launch.py` would make for the call, with
the same constants, and with sizes and pointers specialised as Triton's launcher does for aligned tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slotwise.backends._gpu.kernels import Scratch
from slotwise.backends.cuda_triton.configurations import GENERATIONS, capability, choices
from slotwise.backends.cuda_triton.launch import Grid, grids_of
from slotwise.core.backend import CallSpec
from slotwise.core.machine_code import MachineCode
from slotwise.core.specs import DType

__all__ = ["GENERATIONS", "choices", "compile_call"]

_POINTERS = {
    DType.F32: "*fp32",
    DType.F16: "*fp16",
    DType.BF16: "*bf16",
    DType.I64: "*i64",
    DType.I32: "*i32",
    DType.I8: "*i8",
    DType.U8: "*u8",
    DType.BOOL: "*i1",
}
_ALIGNED = [["tt.divisibility", 16]]


def compile_call(kernel: str, call: CallSpec, generation: str) -> Iterator[MachineCode]:
    """The machine code of every launch of `kernel` for `call` on `generation` (`sm_90`)."""
    for one in grids_of(kernel)(call, generation):
        yield compile_grid(kernel, one, call, generation)


def compile_grid(kernel: str, one: Grid, call: CallSpec, generation: str) -> MachineCode:
    """The machine code of one launch."""
    chosen = one.configuration
    target = GPUTarget("cuda", capability(generation), 32)
    made = triton.compile(
        source_of(one, call), target=target, options={"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    )
    return MachineCode(
        kernel,
        one.function.fn.__name__,
        call.dtype.value,
        str(chosen),
        generation,
        made.asm["cubin"],
        32 * made.metadata.num_warps,
        made.metadata.shared,
    )


def source_of(one: Grid, call: CallSpec) -> ASTSource:
    """The function with its parameters' types, constants and alignment."""
    contract = call.contract
    specs = dict(
        zip((a.name for a in (*contract.inputs, *contract.outputs)), (*call.inputs, *call.outputs), strict=True)
    )
    signature: dict[str, str] = {}
    constants: dict[str, object] = {}
    aligned: dict[tuple[int, ...], object] = {}
    for place, (name, value, constant) in enumerate(one.parameters()):
        spec = specs[value] if isinstance(value, str) and not constant else None
        if (
            constant
            or value is None
            or (isinstance(value, str) and spec is None)
            or (type(value) is int and value == 1)
        ):
            signature[name], constants[name] = "constexpr", None if isinstance(value, str) and not constant else value
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned[place,] = _ALIGNED
        else:
            dtype = value.dtype if isinstance(value, Scratch) else spec.dtype if spec is not None else DType.F32
            signature[name] = _POINTERS[dtype]
            aligned[place,] = _ALIGNED
    return ASTSource(one.function, signature, constants, aligned)
