"""What the simulator cannot run is refused by name and line, and a kernel without fault is not reported."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import numpy as np

from slotwise.backends.numba_cuda.simulator import (
    BadLaunch,
    UnsupportedKernel,
    cuda,
    intrinsic,
    kernel,
)

from .planted import fault, floats


@intrinsic(numba=lambda: None, memory="r")
def writes_in_secret(active, array, index):
    active.store(array, index, np.float32(1))


@kernel
def secret(x):
    writes_in_secret(x, cuda.threadIdx.x)


def test_an_intrinsic_that_writes_must_say_so() -> None:
    assert "memory='w'" in fault(UnsupportedKernel, secret.simulate, 1, 2, floats(2))


def test_what_the_simulator_does_not_know_is_refused_by_name_and_line() -> None:
    @kernel
    def builds_a_dict(out):
        found = {1: 2}
        out[0] = found

    assert "{1: 2}" in fault(UnsupportedKernel, builds_a_dict.simulate, 1, 1, floats(1))


@kernel
def all_write_one(out):
    out[0] = np.float32(cuda.threadIdx.x)


def test_launches_that_no_gpu_takes_are_refused() -> None:
    assert "1024" in fault(BadLaunch, all_write_one.simulate, 1, 2048, floats(1))
    assert "takes 1 arguments, found 2" in fault(BadLaunch, all_write_one.simulate, 1, 1, floats(1), 3)
    fault(BadLaunch, all_write_one.simulate, 0, 1, floats(1))


def test_nothing_is_reported_of_a_kernel_withoutfault() -> None:
    @kernel
    def transposes(x, out):
        tile = cuda.shared.array((16, 17), np.float32)
        i, j = cuda.threadIdx.x, cuda.threadIdx.y
        for block in range(2):
            tile[j, i] = x[j, block * 16 + i]
            cuda.syncthreads()
            out[block * 16 + j, i] = tile[i, j]
            cuda.syncthreads()

    x, out = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32), floats(32, 16)
    transposes.simulate(1, (16, 16), (x, out))
    assert np.array_equal(out, x.T)
