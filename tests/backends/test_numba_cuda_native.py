"""What a GPU would be asked to do: parameters as Numba-CUDA passes them, prepared once, and its own launch otherwise.

No GPU is needed: the parameters are held to those of Numba-CUDA's own code and to its PTX; the driver is a recorder
with the driver's signature.
"""

from __future__ import annotations

import ctypes
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from slotwise.audit.calls import calls_of
from slotwise.backends.numba_cuda.launch import grids_of
from slotwise.core.errors import BackendError
from slotwise.core.specs import DType

native = pytest.importorskip("slotwise.backends.numba_cuda.native", reason="needs Numba-CUDA")
driver = pytest.importorskip("cuda.bindings.driver", reason="needs CUDA's bindings")

ParamInfo = namedtuple("ParamInfo", ["offset", "size"])
NUMBERS = (np.int64(7), np.float32(0.5))
SIZES = [8] * 7 + [8, 4]
"""Bytes of the parameters of a kernel that takes an array and `NUMBERS`."""


class Gpu:
    """Records what Numba-CUDA, PyTorch and the driver are asked for; the kernel has parameters of `sizes` bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sizes: Sequence[int] | None) -> None:
        self.done: list[tuple[Any, ...]] = []
        self.stream = SimpleNamespace(cuda_stream=11)
        self.errors: list[Any] = []
        if sizes is not None:
            shown = SimpleNamespace(arguments_info=[ParamInfo(0, size) for size in sizes], handle=77)
            library = SimpleNamespace(get_cufunc=lambda: SimpleNamespace(kernel=shown))
            self.overloads = {"its signature": SimpleNamespace(library=library)}
        monkeypatch.setattr(native.cuda, "as_cuda_array", self._wrap)
        monkeypatch.setattr(native.cuda, "external_stream", lambda handle: f"stream {handle}")
        monkeypatch.setattr(native.cuda, "current_context", lambda: self.done.append(("context",)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(driver, "cuLaunchKernel", self._launch)
        native._numba_stream.cache_clear()

    def _wrap(self, tensor: torch.Tensor, sync: bool) -> Any:
        self.done.append(("wrapped", sync))
        return _View()

    def compiled(self) -> Gpu:
        return self

    def specialize(self, *arguments: object) -> Gpu:
        self.done.append(("compiled", *arguments))
        return self

    def __getitem__(self, configuration: tuple[object, ...]) -> Callable[..., None]:
        self.done.append(("configured", *configuration))
        return lambda *arguments: self.done.append(("launched", *arguments))

    def _launch(self, f, x, y, z, block_x, block_y, block_z, shared, stream, parameters, extra):  # type: ignore[no-untyped-def]
        assert isinstance(f, driver.CUfunction)
        self.done.append(("driver", int(f), (x, y, z), (block_x, block_y, block_z), shared, int(stream), parameters))
        return (self.errors.pop(0) if self.errors else driver.CUresult.CUDA_SUCCESS,)


class _View:
    """Numba's view of a tensor."""


@pytest.fixture(autouse=True)
def _no_stream_is_kept() -> Iterator[None]:
    yield
    native._numba_stream.cache_clear()


def _at(address: int, kinds: Sequence[Any]) -> list[Any]:
    """What the parameters are that the addresses from `address` on point to."""
    pointers = (ctypes.c_void_p * len(kinds)).from_address(address)
    return [kind.from_address(pointer).value for kind, pointer in zip(kinds, pointers, strict=True)]


def test_parameters_are_those_that_numba_cuda_passes() -> None:
    from numba.cuda import dispatcher, types
    from numba.cuda.cudadrv.devicearray import DeviceNDArray

    marshal = getattr(getattr(dispatcher, "_Kernel", None), "_prepare_args", None)
    if marshal is None:
        pytest.skip("this Numba-CUDA marshals arguments elsewhere")
    for tensor, kind in ((torch.zeros(40, dtype=torch.uint16), types.uint16), (torch.zeros(9), types.float32)):
        memory = SimpleNamespace(
            device_ctypes_pointer=ctypes.c_void_p(tensor.data_ptr()), device_pointer_value=tensor.data_ptr()
        )
        item = tensor.element_size()
        array = DeviceNDArray((tensor.numel(),), (item,), str(kind), gpu_data=memory)
        expected: list[Any] = []
        for what, value in zip((types.Array(kind, 1, "C"), types.int64, types.float32), (array, *NUMBERS), strict=True):
            marshal(SimpleNamespace(extensions=[]), what, value, 0, [], expected)
        ours = list(native._parameters([tensor, *NUMBERS]))
        assert [p.value for p in ours] == [int(p) if isinstance(p, int) else p.value for p in expected]
        assert [type(p) for p in ours[7:]] == [type(p) for p in expected[7:]]


def test_numba_cuda_shows_the_kernel_that_a_prepared_launch_needs() -> None:
    """Of the version installed here; with another, launches are Numba-CUDA's own, and slower."""
    from numba.cuda import codegen, dispatcher
    from numba.cuda.cudadrv.driver import CudaPythonFunction

    core = pytest.importorskip("cuda.core")
    assert isinstance(dispatcher._Kernel.library, property)
    assert callable(codegen.CUDACodeLibrary.get_cufunc)
    assert "kernel" in CudaPythonFunction.__slots__
    assert {"arguments_info", "handle"} <= set(dir(core.Kernel))


@pytest.mark.parametrize(("op", "kernel"), [("add", "add.flat"), ("rms_norm", "rms_norm.rows")])
def test_parameters_have_the_sizes_that_the_ptx_declares(op: str, kernel: str) -> None:
    ahead = pytest.importorskip("slotwise.backends.numba_cuda.ahead")
    call = next(iter(calls_of(op, DType.BF16)))
    (one,) = grids_of(kernel)(call, True)
    declared = re.findall(r"\.param \.[a-z](\d+) ", ahead.ptx_of(one.kernel, ahead.types_of(one, call), "sm_80"))
    numbers = {int: np.int64, float: np.float32}
    given = [torch.zeros(8) if isinstance(a, str) else numbers[type(a)](a) for a in one.arguments]  # type: ignore[index]
    assert [8 * ctypes.sizeof(value) for value in native._parameters(given)] == [int(bits) for bits in declared]


def test_a_launch_hands_the_driver_what_was_prepared_and_follows_pytorchs_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, x = Gpu(monkeypatch, SIZES), torch.zeros(4)
    first, second = (native.native_launch(gpu, (2, 3), 64, [x, *NUMBERS]) for _ in range(2))
    assert [event[0] for event in gpu.done] == ["wrapped", "compiled", "compiled"]
    gpu.done.clear()
    first()
    gpu.stream.cuda_stream = 12  # a graph is captured on a stream of its own
    first()
    second()
    assert [event[:-1] for event in gpu.done] == [
        ("driver", 77, (2, 3, 1), (64, 1, 1), 0, stream) for stream in (11, 12, 12)
    ]
    places = [event[-1] for event in gpu.done]
    assert places[0] == places[1] != places[2], "laid out when bound, not when launched"
    expected = [0, 0, 4, 4, x.data_ptr(), 4, 4, 7, 0.5]
    for place in places:
        assert _at(place, [*[ctypes.c_int64] * 8, ctypes.c_float]) == expected


def test_what_a_launch_points_to_lives_as_long_as_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, SIZES)
    launches = [native.native_launch(gpu, (1,), 32, [torch.full((64,), float(i)), *NUMBERS]) for i in range(50)]
    gpu.done.clear()
    for launch in launches:
        launch()
    for i, event in enumerate(gpu.done):
        address = _at(event[-1], [ctypes.c_int64] * 5)[4]
        assert list((ctypes.c_float * 64).from_address(address)) == [float(i)] * 64


@pytest.mark.parametrize("sizes", [None, SIZES[:-1], [*SIZES[:-1], 8]], ids=["not shown", "fewer", "of other sizes"])
def test_other_parameters_are_left_to_numba_cuda(monkeypatch: pytest.MonkeyPatch, sizes: list[int] | None) -> None:
    gpu = Gpu(monkeypatch, sizes)
    launch = native.native_launch(gpu, (2, 3), 64, [torch.zeros(4), *NUMBERS])
    gpu.done.clear()
    launch()
    launch()
    gpu.stream.cuda_stream = 12
    launch()
    kinds = [event[0] for event in gpu.done]
    assert kinds == ["configured", "launched", "launched", "configured", "launched"]
    assert gpu.done[0] == ("configured", (2, 3), 64, "stream 11")
    assert gpu.done[3] == ("configured", (2, 3), 64, "stream 12")
    assert isinstance(gpu.done[1][1], _View)
    assert gpu.done[1][2:] == NUMBERS


def test_a_tensor_is_wrapped_once_for_all_launches_that_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, x = Gpu(monkeypatch, None), torch.zeros(4)
    kept = [native.native_launch(gpu, (1,), 64, [x, *NUMBERS]) for _ in range(3)]
    assert [event for event in gpu.done if event[0] == "wrapped"] == [("wrapped", False)]
    assert len(kept) == 3


def test_a_refused_launch_is_an_error_and_a_new_thread_gets_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, SIZES)
    launch = native.native_launch(gpu, (2,), 64, [torch.zeros(4), *NUMBERS])
    gpu.done.clear()
    gpu.errors = [driver.CUresult.CUDA_ERROR_INVALID_CONTEXT]
    launch()
    assert [event[0] for event in gpu.done] == ["driver", "context", "driver"]
    gpu.errors = [driver.CUresult.CUDA_ERROR_LAUNCH_FAILED]
    with pytest.raises(BackendError, match=r"\(2, 1, 1\) blocks of 64 threads: CUDA_ERROR_LAUNCH_FAILED"):
        launch()
