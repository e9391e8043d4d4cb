"""Threads that a barrier, a warp or a wait would miss, planted: found, and named with each thread's line."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import re

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import (
    DivergentBarrier,
    DivergentWarp,
    EndlessLoop,
    cuda,
    device,
    intrinsic,
    kernel,
    masks,
)

from .planted import fault, floats


@kernel
def some_take_the_barrier(out):
    i = cuda.threadIdx.x
    if i >= 5:
        cuda.syncthreads()
    out[i] = np.float32(i)


def test_a_barrier_in_one_side_of_a_branch_is_a_deadlock_and_names_both_lines() -> None:
    text = fault(DivergentBarrier, some_take_the_barrier.simulate, 2, 8, floats(16))
    assert "deadlock in block (0, 0, 0): a barrier that 3 of its 8 threads reach" in text
    assert re.search(r"threads 5 to 7 wait at .*cuda\.syncthreads\(\)", text)
    assert re.search(r"threads 0 to 4 took the other way at .*if i >= 5:", text)


@kernel
def barrier_in_each_side(out):
    if cuda.threadIdx.x < 4:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def test_a_barrier_of_its_own_in_each_side_is_a_deadlock() -> None:
    fault(DivergentBarrier, barrier_in_each_side.simulate, 1, 8, floats(1))


@kernel
def some_return(x, out):
    i = cuda.grid(1)
    if i >= x.shape[0]:
        return
    cuda.syncthreads()
    out[i] = x[i]


def test_a_barrier_after_some_threads_returned_is_a_deadlock() -> None:
    text = fault(DivergentBarrier, some_return.simulate, 2, 8, floats(12), floats(16))
    assert "block (1, 0, 0)" in text
    assert re.search(r"threads 4 to 7 returned at .*return", text)


def test_a_barrier_that_whole_blocks_miss_is_none() -> None:
    out = floats(16)
    some_return.simulate(2, 8, (np.ones(8, np.float32), out))
    assert out.tolist() == [1.0] * 8 + [0.0] * 8


@kernel
def uneven_rounds(out):
    for _ in range(cuda.threadIdx.x // 4 + 1):
        cuda.syncthreads()


def test_a_loop_with_a_barrier_that_some_leave_sooner_is_a_deadlock() -> None:
    text = fault(DivergentBarrier, uneven_rounds.simulate, 1, 8, floats(1))
    assert re.search(r"threads 0 to 3 have left the loop at .*for _ in range", text)


@device
def with_a_barrier(x):
    cuda.syncthreads()
    return x


@kernel
def barrier_in_a_call(out):
    i = cuda.threadIdx.x
    out[i] = with_a_barrier(i) if i % 2 == 0 else i


def test_a_barrier_in_a_device_function_that_some_call_is_a_deadlock() -> None:
    text = fault(DivergentBarrier, barrier_in_a_call.simulate, 1, 4, floats(4))
    assert "threads 0, 2 wait at" in text
    assert "with_a_barrier" in text
    assert re.search(r"threads 1, 3 took the other way at .*out\[i\] = with_a_barrier", text)


@kernel
def half_a_warp_shuffles(out):
    i = cuda.threadIdx.x
    if i < 16:
        out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, i, 1)


def test_a_shuffle_whose_mask_names_absent_lanes_is_found() -> None:
    text = fault(DivergentWarp, half_a_warp_shuffles.simulate, 1, 64, floats(64))
    assert "the mask 0xffffffff, and lanes [16, 17" in text
    assert "shfl_xor_sync" in text


@kernel
def masks_that_differ(out):
    i = cuda.threadIdx.x
    mask = 0xFFFFFFFF
    if i >= 8:
        mask = 0xFFFFFF00
    out[i] = cuda.shfl_sync(mask, i, 8)


def test_a_shuffle_whose_lanes_give_different_masks_is_found() -> None:
    text = fault(DivergentWarp, masks_that_differ.simulate, 1, 32, floats(32))
    assert "lanes [8, 9" in text
    assert "give other masks (0xffffff00)" in text


@kernel
def outside_its_mask(out):
    i = cuda.threadIdx.x
    out[i] = cuda.any_sync(0x0000FFFF, i == 3)


def test_a_lane_outside_its_own_mask_is_found() -> None:
    assert "lane 16" in fault(DivergentWarp, outside_its_mask.simulate, 1, 32, floats(32))


@kernel
def reads_an_absent_lane(out):
    i = cuda.threadIdx.x
    if i < 4:
        out[i] = cuda.shfl_down_sync(0xF, i, 2)


def test_a_shuffle_that_reads_a_lane_which_takes_no_part_is_found() -> None:
    text = fault(DivergentWarp, reads_an_absent_lane.simulate, 1, 32, floats(32))
    assert "lane 2 reads the value of lane 4, which takes no part" in text


@kernel
def warp_barrier_for_some(out):
    if cuda.threadIdx.x % 2 == 0:
        cuda.syncwarp()


def test_a_warp_barrier_that_lanes_miss_is_found() -> None:
    fault(DivergentWarp, warp_barrier_for_some.simulate, 1, 32, floats(1))


@intrinsic(numba=lambda: None, warp=True)
def warp_total(active, x):
    return np.repeat(x.sum(1, keepdims=True), 32, 1)


@kernel
def total_of_some(x, out, upto):
    i = cuda.threadIdx.x
    if i < upto:
        out[i] = warp_total(x[i])


def test_a_warp_intrinsic_needs_all_lanes() -> None:
    x, out = np.arange(64, dtype=np.float32), floats(64)
    total_of_some.simulate(1, 64, (x, out, 32))
    assert out[:32].tolist() == [496.0] * 32
    assert not out[32:].any()
    assert "warp_total needs all 32 lanes of a warp, and 8 are here" in fault(
        DivergentWarp, total_of_some.simulate, 1, 64, x, out, 40
    )


@kernel
def spins(flag, out):
    i = cuda.threadIdx.x
    if i == 0:
        while cuda.atomic.add(flag, 0, 0) == 0:
            pass
    else:
        cuda.atomic.add(flag, 0, 1)


def test_a_wait_for_a_thread_that_has_parted_is_a_loop_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "ENDLESS", 1000)
    assert "spins: while" in fault(EndlessLoop, spins.simulate, 1, 2, np.zeros(1, np.int32), floats(1))
