"""Launching kernels on a GPU.

Owns `native_launch`. What always holds: a kernel is compiled for its argument types when it is bound; a tensor is
wrapped once for all launches that use it, and a launch is configured once a stream (both take longer than launching);
launches go to PyTorch's current stream, without Numba's waiting for it, so that CUDA graphs capture them as any.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from numba import cuda

from slotwise.core.backend import Launch

_wrapped: weakref.WeakValueDictionary[tuple[int, int, torch.dtype], Any] = weakref.WeakValueDictionary()


def native_launch(kernel: Any, grid: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> Launch:
    """A launch of `kernel` with these tensors and numbers; compiles it when no call of its kind was bound before."""
    ready = tuple(_wrap(value) if isinstance(value, torch.Tensor) else value for value in arguments)
    specialised = kernel.compiled().specialize(*ready)
    configured: dict[int, Any] = {}

    def launch() -> None:
        stream = torch.cuda.current_stream().cuda_stream
        if stream not in configured:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one about small grids, which a few rows have
                configured[stream] = specialised[grid, threads, _stream(stream)]
        configured[stream](*ready)

    return launch


@functools.cache
def _stream(handle: int) -> Any:
    return cuda.external_stream(handle)


def _wrap(tensor: torch.Tensor) -> Any:
    """Numba's view of the tensor, which keeps the tensor's memory."""
    key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
    found = _wrapped.get(key)
    if found is None:
        found = cuda.as_cuda_array(tensor, sync=False)
        _wrapped[key] = found
    return found
