"""Launching kernels on a GPU.

Owns `native_launch`. What always holds: a kernel is compiled for its argument types when it is bound, and its
parameters are laid out in memory then, as Numba-CUDA passes them; a launch hands the driver an address and no more.
The driver says which parameters the kernel has: where those are others, or Numba-CUDA has no such kernel object to
show, the launch is Numba-CUDA's own. Launches go to PyTorch's current stream, without Numba's waiting for it, so that
CUDA graphs capture them as any.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numba import cuda

from slotwise.core.backend import Launch
from slotwise.core.errors import BackendError

_wrapped: weakref.WeakValueDictionary[tuple[int, int, torch.dtype], Any] = weakref.WeakValueDictionary()


def native_launch(kernel: Any, grid: tuple[int, ...], threads: int, arguments: Sequence[Any]) -> Launch:
    """A launch of `kernel` with these tensors and numbers; compiles it when no call of its kind was bound before."""
    ready = tuple(_wrap(value) if isinstance(value, torch.Tensor) else value for value in arguments)
    specialised = kernel.compiled().specialize(*ready)
    device = next(value.device.index for value in arguments if isinstance(value, torch.Tensor))
    parameters = tuple(_parameters(arguments))
    function = _function(specialised, [ctypes.sizeof(value) for value in parameters])
    if function is None:
        return _ordinary_launch(specialised, grid, threads, ready, device)
    return PreparedLaunch(function, (*grid, 1, 1)[:3], threads, parameters, device, (specialised, *arguments))


def _wrap(tensor: torch.Tensor) -> Any:
    """Numba's view of the tensor, which keeps the tensor's memory."""
    key = (tensor.data_ptr(), tensor.numel(), tensor.dtype)
    found = _wrapped.get(key)
    if found is None:
        found = cuda.as_cuda_array(tensor, sync=False)
        _wrapped[key] = found
    return found


def _parameters(arguments: Sequence[Any]) -> Iterator[Any]:
    """What a kernel of Numba's gets, in its order.

    Of an array with one dimension: two addresses that only memory of Numba's own has, its elements, an element's bytes,
    its address, its elements again, and the bytes from one to the next.
    """
    for value in arguments:
        if isinstance(value, torch.Tensor):
            count, item = value.numel(), value.element_size()
            yield from map(ctypes.c_int64, (0, 0, count, item, value.data_ptr(), count, item))
        else:
            yield ctypes.c_float(float(value)) if isinstance(value, np.float32) else ctypes.c_int64(int(value))


def _function(specialised: Any, sizes: Sequence[int]) -> Any:
    """The driver's handle of the one kernel in `specialised`, if its parameters are of these bytes; else None."""
    try:
        from cuda.bindings import driver

        (definition,) = specialised.overloads.values()
        found = definition.library.get_cufunc().kernel
        if [parameter.size for parameter in found.arguments_info] == list(sizes):
            return driver.CUfunction(int(found.handle))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):  # another Numba-CUDA, or an older CUDA
        pass
    return None


class PreparedLaunch:
    """A launch whose parameters lie ready in memory. `held` is what must live as long: tensors, the kernel's code."""

    def __init__(
        self,
        function: Any,
        grid: Sequence[int],
        threads: int,
        parameters: Sequence[Any],
        device: int,
        held: Sequence[Any],
    ) -> None:
        from cuda.bindings import driver

        self._start, self._codes = driver.cuLaunchKernel, driver.CUresult
        self._shape = (function, *grid, threads, 1, 1, 0)
        self._device, self._held = device, (*held, *parameters)
        self._addresses = (ctypes.c_void_p * len(parameters))(*map(ctypes.addressof, parameters))
        self._parameters = ctypes.addressof(self._addresses)

    def __call__(self) -> None:
        """Starts it on PyTorch's current stream; raises BackendError when the driver refuses."""
        (error,) = self._start(*self._shape, _driver_stream(_stream_of(self._device)), self._parameters, 0)
        if error == self._codes.CUDA_ERROR_INVALID_CONTEXT:
            cuda.current_context()  # a thread that has not used the GPU yet
            (error,) = self._start(*self._shape, _driver_stream(_stream_of(self._device)), self._parameters, 0)
        if error != self._codes.CUDA_SUCCESS:
            raise BackendError(
                f"the driver refuses a launch of {self._shape[1:4]} blocks of {self._shape[4]} threads: {error.name}; "
                "where an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which"
            )


def _ordinary_launch(
    specialised: Any, grid: tuple[int, ...], threads: int, ready: Sequence[Any], device: int
) -> Launch:
    """Numba-CUDA's launch, configured once a stream; it lays the parameters out each time."""
    configured: dict[int, Any] = {}

    def launch() -> None:
        stream = _stream_of(device)
        if stream not in configured:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # one about small grids, which a few rows have
                configured[stream] = specialised[grid, threads, _numba_stream(stream)]
        configured[stream](*ready)

    return launch


def _stream_of(device: int) -> int:
    """PyTorch's current stream on the device, as the driver knows it."""
    return int(torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _numba_stream(handle: int) -> Any:
    return cuda.external_stream(handle)


@functools.cache
def _driver_stream(handle: int) -> Any:
    from cuda.bindings import driver

    return driver.CUstream(handle)
