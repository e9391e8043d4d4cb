"""Running a Triton kernel on the CPU, in the process that also compiles it for GPUs.

Owns `interpret`. What always holds: kernels are ordinary `@triton.jit` functions, and no environment variable is read
or set. Triton's own interpreter does the work; for the length of one launch its language is patched as Triton patches
it, helpers are called as Python functions, and three of its faults are mended: `tl.dot` of bf16 multiplied the raw
bits, any `tl.dot` rounded a row by its place in the tile (as the BLAS below it does), and float32 to bf16 truncated
instead of rounding to nearest even. A load beyond the kernel's tensors is an error, which Triton's interpreter would
not notice, and a GPU only sometimes; for stores, `proving/validate.py` puts guard zones around buffers.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as peer
from triton.runtime.jit import JITFunction

from slotwise.core.errors import BackendError

_LOCK = threading.RLock()  # the patches are seen by the whole process
_MISSING = peer._MISSING
_READABLE: list[tuple[int, int, str]] = []  # (first byte, byte after the last, argument) of the launch that runs


def interpret(function: JITFunction[Any], grid: tuple[int, ...], arguments: Mapping[str, object]) -> None:
    """Run `function` for every program of `grid`, one after another; tensors must be on the CPU.

    Raises BackendError for a load that is not within one tensor, and what the kernel's Python raises.
    """
    sizes = (*grid, 1, 1)[:3]
    constants = {parameter.name for parameter in function.params if parameter.is_constexpr}
    with _LOCK, np.errstate(all="ignore"):
        patches = _patches()
        for target, name, _, new in patches:
            setattr(target, name, new)
        try:
            given = {
                name: value if name in constants or value is None else _as_tensor(value)
                for name, value in arguments.items()
            }
            _READABLE[:] = [
                (value.data_ptr(), value.data_ptr() + value.numel() * value.element_size(), name)
                for name, value in arguments.items()
                if isinstance(value, torch.Tensor)
            ]
            run = rewritten(function.fn)
            peer.interpreter_builder.set_grid_dim(*sizes)
            for place in itertools.product(*map(range, sizes)):
                peer.interpreter_builder.set_grid_idx(*place)
                run(**given)
        finally:
            for target, name, old, _ in reversed(patches):
                if old is _MISSING:
                    delattr(target, name)
                else:
                    setattr(target, name, old)


@functools.cache
def rewritten(function: Callable[..., None]) -> Callable[..., None]:
    """The plain function with assigned values made tensors, as Triton's interpreter needs it."""
    made: Callable[..., None] = peer.FunctionRewriter(function).rewrite_ast()
    return made


def _as_tensor(value: object) -> object:
    return peer._implicit_cvt(value)


@functools.cache
def _patches() -> tuple[tuple[object, str, object, object], ...]:
    """(object, attribute, value outside, value inside) of all that a launch changes, outermost last.

    Triton works the changes out by looking through its whole language, which takes longer than most launches; here they
    are worked out once.
    """
    scopes = [peer._patch_lang(rewritten_from) for rewritten_from in (_sees_language, tl.sum.fn)]
    found: dict[tuple[int, str], tuple[object, str, object, object]] = {}
    for scope in scopes:
        for target, name, old in scope._changes:
            if (id(target), name) not in found:
                found[id(target), name] = (target, name, old, vars(target)[name])
            else:
                first = found[id(target), name]
                found[id(target), name] = (target, name, first[2], vars(target)[name])
    for scope in reversed(scopes):
        scope.restore()
    builder = peer.InterpreterBuilder
    ours: tuple[tuple[object, str, object], ...] = (
        (JITFunction, "__call__", _call_helper),
        (triton.knobs, "propagate_env", False),  # or the next line would set TRITON_INTERPRET, and leave it behind
        (triton.knobs.runtime, "interpret", True),
        (builder, "create_dot", _dot),
        (builder, "create_masked_load", _load),
        (peer, "_convert_float", _convert_float),
    )
    return (*found.values(), *((target, name, _value_of(target, name), new) for target, name, new in ours))


def _value_of(target: object, name: str) -> object:
    return vars(target).get(name, _MISSING)


def _sees_language() -> object:
    """A function whose module has `triton.language` among its globals, which is what is patched."""
    return tl


def _call_helper(self: JITFunction[Any], *arguments: object, **named: object) -> object:
    """A kernel calls another `@triton.jit` function: run that as Python too."""
    named.pop("_semantic", None)
    return rewritten(self.fn)(*arguments, **named)


_convert_of_peer = peer._convert_float
_load_of_peer = peer.InterpreterBuilder.create_masked_load


def _load(self: object, pointers: Any, mask: Any, *rest: object) -> object:
    """What the mask lets through must lie in one of the kernel's tensors."""
    addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
    if addresses.size:
        low, high = int(addresses.min()), int(addresses.max())
        if not any(first <= low and high < last for first, last, _ in _READABLE):
            near = [f"{name} {low - first:+d} of {last - first}" for first, last, name in _READABLE]
            raise BackendError(
                f"a load of {addresses.size} elements, over {high - low + 1} bytes, is in no tensor of the kernel; "
                f"from their starts, in bytes: {', '.join(near)}"
            )
    return _load_of_peer(self, pointers, mask, *rest)


def _dot(self: object, a: Any, b: Any, d: Any, *_: object) -> object:
    """a times b added to d in float32, one k after another, so that a row's bits are its own wherever it lies.

    bf16 is held as raw 16-bit numbers, which must become float32 before they are multiplied. A BLAS, which Triton's
    interpreter calls, rounds a row by its place in the tile; a tensor core does not.
    """
    left, right = _widened(a), _widened(b)
    total = d.data.astype(np.float32, copy=True)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1] * right[k]
    return peer.TensorHandle(total, d.dtype.scalar)


def _widened(operand: Any) -> Any:
    data = _from_bf16(operand.data) if operand.dtype.scalar == tl.bfloat16 else operand.data
    return np.ascontiguousarray(data, dtype=np.float32)


def _from_bf16(raw: Any) -> Any:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _convert_float(data: Any, source: tl.dtype, target: tl.dtype, rounding: object) -> Any:
    if source == tl.float32 and target == tl.bfloat16:
        tensor = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return tensor.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return _from_bf16(np.ascontiguousarray(data)).reshape(data.shape)
    return _convert_of_peer(data, source, target, rounding)
