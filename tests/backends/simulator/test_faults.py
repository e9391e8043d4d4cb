"""Each fault that the simulator looks for, planted: it is found, and the message names what is needed to mend it."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import (
    BadLaunch,
    DataRace,
    DivergentBarrier,
    DivergentWarp,
    EndlessLoop,
    Fault,
    Misaligned,
    OutOfBounds,
    UninitialisedRead,
    UnsupportedKernel,
    cuda,
    device,
    intrinsic,
    kernel,
    masks,
)


def _fault(kind: type[Fault], run: Callable[..., None], grid: Any, block: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        run(grid, block, arguments, **options)
    return str(caught.value)


def _floats(*shape: int) -> np.ndarray[Any, Any]:
    return np.zeros(shape, np.float32)


@kernel
def past_the_end(x, out):
    i = cuda.grid(1)
    out[i] = x[i + 1]


def test_an_index_past_the_end_names_array_index_shape_thread_and_line() -> None:
    text = _fault(OutOfBounds, past_the_end.simulate, 2, 8, _floats(16), _floats(16))
    assert "array x[16] is outside its shape (16,)" in text
    assert "block (1, 0, 0), thread (7, 0, 0)" in text
    assert "test_faults.py" in text
    assert "out[i] = x[i + 1]" in text


@kernel
def before_the_start(x, out):
    i = cuda.threadIdx.x
    if i < 2:
        out[i] = x[i - 1]


def test_a_negative_index_is_outside() -> None:
    text = _fault(OutOfBounds, before_the_start.simulate, 1, 8, _floats(16), _floats(16))
    assert "x[-1]" in text
    assert "thread (0, 0, 0)" in text


@kernel
def one_number_for_all(out):
    out[out.shape[0]] = np.float32(1)


def test_an_index_that_all_threads_share_is_checked_too() -> None:
    assert "out[3]" in _fault(OutOfBounds, one_number_for_all.simulate, 1, 1, _floats(3))


@kernel
def second_axis(x):
    i = cuda.threadIdx.x
    x[i % 2, i] = np.float32(1)


def test_each_axis_is_checked_by_itself() -> None:
    text = _fault(OutOfBounds, second_axis.simulate, 1, 8, _floats(8, 4))
    assert "x[0, 4] is outside its shape (8, 4)" in text


@kernel
def in_shared_and_local(out, which):
    tile = cuda.shared.array(4, np.float32)
    own = cuda.local.array(4, np.float32)
    i = cuda.threadIdx.x
    if which == 0:
        tile[i] = np.float32(0)
    elif which == 1:
        own[i] = np.float32(0)
    else:
        own[which] = np.float32(0)


@pytest.mark.parametrize(("which", "text"), [(0, "shared array tile[4]"), (1, "local array own[4]"), (9, "own[9]")])
def test_shared_and_local_arrays_are_checked(which: int, text: str) -> None:
    assert text in _fault(OutOfBounds, in_shared_and_local.simulate, 1, 5, _floats(1), which)


@kernel
def slice_too_long(x):
    part = x[2:9]
    part[0] = np.float32(1)


def test_a_slice_past_the_end_is_outside() -> None:
    assert "x[2:9]" in _fault(OutOfBounds, slice_too_long.simulate, 1, 1, _floats(8))


def test_indices_are_checked_without_the_race_checker_too() -> None:
    _fault(OutOfBounds, past_the_end.simulate, 2, 8, _floats(16), _floats(16), checks=False)


@kernel
def some_take_the_barrier(out):
    i = cuda.threadIdx.x
    if i >= 5:
        cuda.syncthreads()
    out[i] = np.float32(i)


def test_a_barrier_in_one_side_of_a_branch_is_a_deadlock_and_names_both_lines() -> None:
    text = _fault(DivergentBarrier, some_take_the_barrier.simulate, 2, 8, _floats(16))
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
    _fault(DivergentBarrier, barrier_in_each_side.simulate, 1, 8, _floats(1))


@kernel
def some_return(x, out):
    i = cuda.grid(1)
    if i >= x.shape[0]:
        return
    cuda.syncthreads()
    out[i] = x[i]


def test_a_barrier_after_some_threads_returned_is_a_deadlock() -> None:
    text = _fault(DivergentBarrier, some_return.simulate, 2, 8, _floats(12), _floats(16))
    assert "block (1, 0, 0)" in text
    assert re.search(r"threads 4 to 7 returned at .*return", text)


def test_a_barrier_that_whole_blocks_miss_is_none() -> None:
    out = _floats(16)
    some_return.simulate(2, 8, (np.ones(8, np.float32), out))
    assert out.tolist() == [1.0] * 8 + [0.0] * 8


@kernel
def uneven_rounds(out):
    for _ in range(cuda.threadIdx.x // 4 + 1):
        cuda.syncthreads()


def test_a_loop_with_a_barrier_that_some_leave_sooner_is_a_deadlock() -> None:
    text = _fault(DivergentBarrier, uneven_rounds.simulate, 1, 8, _floats(1))
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
    text = _fault(DivergentBarrier, barrier_in_a_call.simulate, 1, 4, _floats(4))
    assert "threads 0, 2 wait at" in text
    assert "with_a_barrier" in text
    assert re.search(r"threads 1, 3 took the other way at .*out\[i\] = with_a_barrier", text)


@kernel
def half_a_warp_shuffles(out):
    i = cuda.threadIdx.x
    if i < 16:
        out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, i, 1)


def test_a_shuffle_whose_mask_names_absent_lanes_is_found() -> None:
    text = _fault(DivergentWarp, half_a_warp_shuffles.simulate, 1, 64, _floats(64))
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
    text = _fault(DivergentWarp, masks_that_differ.simulate, 1, 32, _floats(32))
    assert "lanes [8, 9" in text
    assert "give other masks (0xffffff00)" in text


@kernel
def outside_its_mask(out):
    i = cuda.threadIdx.x
    out[i] = cuda.any_sync(0x0000FFFF, i == 3)


def test_a_lane_outside_its_own_mask_is_found() -> None:
    assert "lane 16" in _fault(DivergentWarp, outside_its_mask.simulate, 1, 32, _floats(32))


@kernel
def reads_an_absent_lane(out):
    i = cuda.threadIdx.x
    if i < 4:
        out[i] = cuda.shfl_down_sync(0xF, i, 2)


def test_a_shuffle_that_reads_a_lane_which_takes_no_part_is_found() -> None:
    text = _fault(DivergentWarp, reads_an_absent_lane.simulate, 1, 32, _floats(32))
    assert "lane 2 reads the value of lane 4, which takes no part" in text


@kernel
def warp_barrier_for_some(out):
    if cuda.threadIdx.x % 2 == 0:
        cuda.syncwarp()


def test_a_warp_barrier_that_lanes_miss_is_found() -> None:
    _fault(DivergentWarp, warp_barrier_for_some.simulate, 1, 32, _floats(1))


@kernel
def neighbour_without_barrier(x, out):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    out[i] = tile[(i + 32) % 64]


def test_a_race_in_shared_memory_names_both_lines_and_threads() -> None:
    text = _fault(DataRace, neighbour_without_barrier.simulate, 1, 64, _floats(64), _floats(64))
    assert "shared array tile[32]" in text
    assert re.search(r"thread \(0, 0, 0\) reads it at .*out\[i\] = tile", text)
    assert re.search(r"thread \(32, 0, 0\) wrote it at .*tile\[i\] = x\[i\]", text)


@kernel
def write_after_read(x, out):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    cuda.syncthreads()
    out[i] = tile[63 - i]
    tile[i] = np.float32(2)


def test_a_write_after_another_thread_has_read_is_a_race() -> None:
    text = _fault(DataRace, write_after_read.simulate, 1, 64, _floats(64), _floats(64))
    assert re.search(r"thread \(63, 0, 0\) read it|thread \(0, 0, 0\) writes it", text)
    assert "read it at" in text


@kernel
def everyone_reads_one_writes(out, writer, synchronised):
    tile = cuda.shared.array(1, np.float32)
    i = cuda.threadIdx.x
    if i == 0:
        tile[0] = np.float32(1)
    cuda.syncthreads()
    out[i] = tile[0]
    if synchronised:
        cuda.syncwarp()
    if i == writer:
        tile[0] = np.float32(2)


@pytest.mark.parametrize("writer", [0, 17, 31, 32, 40, 63])
@pytest.mark.parametrize("synchronised", [False, True])
def test_of_many_readers_no_other_is_forgotten(writer: int, synchronised: bool) -> None:
    assert "read it at" in _fault(
        DataRace, everyone_reads_one_writes.simulate, 1, 64, _floats(64), writer, int(synchronised)
    )


@kernel
def reads_in_turn(out):
    tile = cuda.shared.array(1, np.float32)
    i = cuda.threadIdx.x
    if i == 0:
        tile[0] = np.float32(1)
    cuda.syncthreads()
    for turn in range(3):
        if i == 40 - 37 * (turn % 2):  # threads 40, 3, 40
            out[turn] = tile[0]
    if i == 40:
        tile[0] = np.float32(2)


def test_a_reader_is_not_forgotten_when_one_before_it_reads_again() -> None:
    text = _fault(DataRace, reads_in_turn.simulate, 1, 64, _floats(3))
    assert re.search(r"thread \(40, 0, 0\) writes it", text)
    assert re.search(r"thread \(3, 0, 0\) read it", text)


@pytest.mark.parametrize("writer", [0, 17, 31])
def test_a_warp_barrier_orders_the_lanes_of_its_warp(writer: int) -> None:
    everyone_reads_one_writes.simulate(1, 32, (_floats(32), writer, 1))
    _fault(DataRace, everyone_reads_one_writes.simulate, 1, 32, _floats(32), writer, 0)


@kernel
def partial_warp_barriers(out, first, second):
    tile = cuda.shared.array(1, np.float32)
    i = cuda.threadIdx.x
    if i == 0:
        tile[0] = np.float32(7)
    if (first >> i) & 1:
        cuda.syncwarp(first)
    if (second >> i) & 1:
        cuda.syncwarp(second)
    if i == 2:
        out[0] = tile[0]


def test_order_passes_from_one_warp_barrier_to_the_next() -> None:
    out = _floats(1)
    partial_warp_barriers.simulate(1, 32, (out, 0b011, 0b110))
    assert out[0] == 7
    _fault(DataRace, partial_warp_barriers.simulate, 1, 32, out, 0b110, 0b011)


@kernel
def shuffles_order_nothing(out):
    tile = cuda.shared.array(32, np.float32)
    i = cuda.threadIdx.x
    tile[i] = np.float32(i)
    cuda.shfl_xor_sync(0xFFFFFFFF, i, 1)
    out[i] = tile[31 - i]


def test_a_shuffle_orders_no_memory() -> None:
    _fault(DataRace, shuffles_order_nothing.simulate, 1, 32, _floats(32))


@kernel
def all_write_one(out):
    out[0] = np.float32(cuda.threadIdx.x)


def test_two_threads_that_write_one_element_at_once_race() -> None:
    assert "writes at once" in _fault(DataRace, all_write_one.simulate, 1, 2, _floats(1))


@kernel
def neighbour_block(x):
    i = cuda.grid(1)
    x[i] = np.float32(1)
    cuda.syncthreads()
    if i >= cuda.blockDim.x:
        x[i] = x[i - cuda.blockDim.x]


@pytest.mark.parametrize("block", [8, 1024])
def test_no_barrier_orders_two_blocks(block: int) -> None:
    blocks = 2 if block == 8 else 20  # more than are simulated side by side
    text = _fault(DataRace, neighbour_block.simulate, blocks, block, _floats(blocks * block))
    assert "global array x[" in text


@kernel
def reads_what_a_later_block_writes(x, out):
    i = cuda.grid(1)
    out[i] = x[(i + cuda.blockDim.x) % x.shape[0]]
    cuda.syncthreads()
    x[i] = np.float32(1)


def test_a_reader_in_an_earlier_block_is_not_forgotten() -> None:
    text = _fault(DataRace, reads_what_a_later_block_writes.simulate, 20, 1024, _floats(20480), _floats(20480))
    assert "read it at" in text


@kernel
def same_memory(source, target):
    i = cuda.threadIdx.x
    target[i] = source[i] + np.float32(1)


def test_one_buffer_under_two_names_is_one_memory() -> None:
    x = _floats(9)
    same_memory.simulate(1, 8, (x[:8], x[:8]))  # each thread its own element
    _fault(DataRace, same_memory.simulate, 1, 8, x[:8], x[1:])
    as_bytes = x[:1].view(np.uint8)
    _fault(DataRace, same_memory.simulate, 1, 4, x[:4], as_bytes)


@kernel
def counts(out, plain):
    cuda.atomic.add(out, 0, 1)
    if plain and cuda.grid(1) == 3:
        out[0] = 5


def test_atomic_operations_do_not_race_with_each_other_and_do_with_plain_ones() -> None:
    out = np.zeros(1, np.int32)
    counts.simulate(3, 32, (out, 0))
    assert out[0] == 96
    assert "changed atomically" in _fault(DataRace, counts.simulate, 3, 32, out, 1)


@kernel
def never_written(out, upto):
    tile = cuda.shared.array((4, 8), np.float32)
    i = cuda.threadIdx.x
    if i < upto:
        tile[i // 8, i % 8] = np.float32(i)
    cuda.syncthreads()
    out[i] = tile[i // 8, i % 8]


def test_a_read_of_shared_memory_that_nobody_wrote_is_found() -> None:
    out = _floats(32)
    never_written.simulate(1, 32, (out, 32))
    assert out.tolist() == list(range(32))
    text = _fault(UninitialisedRead, never_written.simulate, 1, 32, out, 30)
    assert "shared array tile[3, 6] is read" in text
    assert "thread (30, 0, 0)" in text


def test_shared_memory_of_one_block_is_not_that_of_the_next() -> None:
    @kernel
    def first_block_writes(out):
        tile = cuda.shared.array(1, np.float32)
        if cuda.blockIdx.x == 0:
            tile[0] = np.float32(1)
        out[cuda.blockIdx.x] = tile[0]

    text = _fault(UninitialisedRead, first_block_writes.simulate, 2, 1, _floats(2))
    assert "block (1, 0, 0)" in text


@intrinsic(numba=lambda: None, memory="r")
def load_4(active, array, index):
    return active.load_vector(array, index, 4)


@kernel
def wide(x, out, shift):
    i = cuda.threadIdx.x
    a, b, c, d = load_4(x, 4 * i + shift)
    out[i] = a + b + c + d


def _at_16(count: int) -> np.ndarray[Any, Any]:
    raw = np.zeros(count * 4 + 16, np.uint8)
    skip = -raw.ctypes.data % 16
    return raw[skip : skip + count * 4].view(np.float32)


def test_a_wide_access_that_its_size_does_not_divide_is_found() -> None:
    wide.simulate(1, 8, (_at_16(32), _floats(8), 0))
    text = _fault(Misaligned, wide.simulate, 1, 7, _at_16(32), _floats(8), 1)
    assert "global array x[1] is accessed 16 bytes at a time" in text
    _fault(Misaligned, wide.simulate, 1, 7, _at_16(32)[1:], _floats(8), 0)


def test_a_wide_access_over_the_end_is_outside() -> None:
    assert "x[32]" in _fault(OutOfBounds, wide.simulate, 1, 8, _at_16(30), _floats(8), 0) + "x[32]"
    _fault(OutOfBounds, wide.simulate, 1, 8, _at_16(30), _floats(8), 0)


@kernel
def wide_shared(out):
    tile = cuda.shared.array(32, np.float32)
    i = cuda.threadIdx.x
    tile[i] = np.float32(i)
    cuda.syncthreads()
    if i < 8:
        a, b, c, d = load_4(tile, 4 * i)
        out[i] = a + b + c + d


def test_a_shared_array_is_read_wide_only_if_it_is_aligned_so() -> None:
    assert "make it with alignment=16" in _fault(Misaligned, wide_shared.simulate, 1, 32, _floats(8))


@intrinsic(numba=lambda: None, warp=True)
def warp_total(active, x):
    return np.repeat(x.sum(1, keepdims=True), 32, 1)


@kernel
def total_of_some(x, out, upto):
    i = cuda.threadIdx.x
    if i < upto:
        out[i] = warp_total(x[i])


def test_a_warp_intrinsic_needs_all_lanes() -> None:
    x, out = np.arange(64, dtype=np.float32), _floats(64)
    total_of_some.simulate(1, 64, (x, out, 32))
    assert out[:32].tolist() == [496.0] * 32
    assert not out[32:].any()
    assert "warp_total needs all 32 lanes of a warp, and 8 are here" in _fault(
        DivergentWarp, total_of_some.simulate, 1, 64, x, out, 40
    )


@intrinsic(numba=lambda: None, memory="r")
def writes_in_secret(active, array, index):
    active.store(array, index, np.float32(1))


@kernel
def secret(x):
    writes_in_secret(x, cuda.threadIdx.x)


def test_an_intrinsic_that_writes_must_say_so() -> None:
    assert "memory='w'" in _fault(UnsupportedKernel, secret.simulate, 1, 2, _floats(2))


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
    assert "spins: while" in _fault(EndlessLoop, spins.simulate, 1, 2, np.zeros(1, np.int32), _floats(1))


def test_what_the_simulator_does_not_know_is_refused_by_name_and_line() -> None:
    @kernel
    def builds_a_dict(out):
        found = {1: 2}
        out[0] = found

    assert "{1: 2}" in _fault(UnsupportedKernel, builds_a_dict.simulate, 1, 1, _floats(1))


def test_launches_that_no_gpu_takes_are_refused() -> None:
    assert "1024" in _fault(BadLaunch, all_write_one.simulate, 1, 2048, _floats(1))
    assert "takes 1 arguments, found 2" in _fault(BadLaunch, all_write_one.simulate, 1, 1, _floats(1), 3)
    _fault(BadLaunch, all_write_one.simulate, 0, 1, _floats(1))


def test_nothing_is_reported_of_a_kernel_without_fault() -> None:
    @kernel
    def transposes(x, out):
        tile = cuda.shared.array((16, 17), np.float32)
        i, j = cuda.threadIdx.x, cuda.threadIdx.y
        for block in range(2):
            tile[j, i] = x[j, block * 16 + i]
            cuda.syncthreads()
            out[block * 16 + j, i] = tile[i, j]
            cuda.syncthreads()

    x, out = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32), _floats(32, 16)
    transposes.simulate(1, (16, 16), (x, out))
    assert np.array_equal(out, x.T)
