"""Data races and reads of what nobody wrote, planted: found, with both threads and both lines."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import re

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import (
    DataRace,
    UninitialisedRead,
    cuda,
    device,
    kernel,
)

from .planted import fault, floats


@kernel
def neighbour_without_barrier(x, out):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    out[i] = tile[(i + 32) % 64]


def test_a_race_in_shared_memory_names_both_lines_and_threads() -> None:
    text = fault(DataRace, neighbour_without_barrier.simulate, 1, 64, floats(64), floats(64))
    assert "shared array tile[32]" in text
    assert re.search(r"thread \(0, 0, 0\) reads it at .*out\[i\] = tile", text)
    assert re.search(r"thread \(32, 0, 0\) wrote it at .*tile\[i\] = x\[i\]", text)


@device
def put_neighbour(out, i, value):
    out[(i + 1) % 64] = value


@kernel
def writes_through_a_function(out):
    i = cuda.threadIdx.x
    out[i] = np.float32(0)
    put_neighbour(out, i, np.float32(1))


def test_a_device_function_that_writes_the_kernels_array_races_where_both_lines_say() -> None:
    text = fault(DataRace, writes_through_a_function.simulate, 1, 64, floats(64))
    assert "global array out[" in text
    assert re.search(r"writes it at .*test_races\.py.*put_neighbour.*out\[\(i \+ 1\) % 64\] = value", text)
    assert re.search(r"wrote it at .*test_races\.py.*writes_through_a_function.*out\[i\] = np\.float32\(0\)", text)


@kernel
def write_after_read(x, out):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    cuda.syncthreads()
    out[i] = tile[63 - i]
    tile[i] = np.float32(2)


def test_a_write_after_another_thread_has_read_is_a_race() -> None:
    text = fault(DataRace, write_after_read.simulate, 1, 64, floats(64), floats(64))
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
    assert "read it at" in fault(
        DataRace, everyone_reads_one_writes.simulate, 1, 64, floats(64), writer, int(synchronised)
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
    text = fault(DataRace, reads_in_turn.simulate, 1, 64, floats(3))
    assert re.search(r"thread \(40, 0, 0\) writes it", text)
    assert re.search(r"thread \(3, 0, 0\) read it", text)


@pytest.mark.parametrize("writer", [0, 17, 31])
def test_a_warp_barrier_orders_the_lanes_of_its_warp(writer: int) -> None:
    everyone_reads_one_writes.simulate(1, 32, (floats(32), writer, 1))
    fault(DataRace, everyone_reads_one_writes.simulate, 1, 32, floats(32), writer, 0)


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
    out = floats(1)
    partial_warp_barriers.simulate(1, 32, (out, 0b011, 0b110))
    assert out[0] == 7
    fault(DataRace, partial_warp_barriers.simulate, 1, 32, out, 0b110, 0b011)


@kernel
def shuffles_order_nothing(out):
    tile = cuda.shared.array(32, np.float32)
    i = cuda.threadIdx.x
    tile[i] = np.float32(i)
    cuda.shfl_xor_sync(0xFFFFFFFF, i, 1)
    out[i] = tile[31 - i]


def test_a_shuffle_orders_no_memory() -> None:
    fault(DataRace, shuffles_order_nothing.simulate, 1, 32, floats(32))


@kernel
def all_write_one(out):
    out[0] = np.float32(cuda.threadIdx.x)


def test_two_threads_that_write_one_element_at_once_race() -> None:
    assert "writes at once" in fault(DataRace, all_write_one.simulate, 1, 2, floats(1))


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
    text = fault(DataRace, neighbour_block.simulate, blocks, block, floats(blocks * block))
    assert "global array x[" in text


@kernel
def reads_what_a_later_block_writes(x, out):
    i = cuda.grid(1)
    out[i] = x[(i + cuda.blockDim.x) % x.shape[0]]
    cuda.syncthreads()
    x[i] = np.float32(1)


def test_a_reader_in_an_earlier_block_is_not_forgotten() -> None:
    text = fault(DataRace, reads_what_a_later_block_writes.simulate, 20, 1024, floats(20480), floats(20480))
    assert "read it at" in text


@kernel
def same_memory(source, target):
    i = cuda.threadIdx.x
    target[i] = source[i] + np.float32(1)


def test_one_buffer_under_two_names_is_one_memory() -> None:
    x = floats(9)
    same_memory.simulate(1, 8, (x[:8], x[:8]))  # each thread its own element
    fault(DataRace, same_memory.simulate, 1, 8, x[:8], x[1:])
    as_bytes = x[:1].view(np.uint8)
    fault(DataRace, same_memory.simulate, 1, 4, x[:4], as_bytes)


@kernel
def counts(out, plain):
    cuda.atomic.add(out, 0, 1)
    if plain and cuda.grid(1) == 3:
        out[0] = 5


def test_atomic_operations_do_not_race_with_each_other_and_do_with_plain_ones() -> None:
    out = np.zeros(1, np.int32)
    counts.simulate(3, 32, (out, 0))
    assert out[0] == 96
    assert "changed atomically" in fault(DataRace, counts.simulate, 3, 32, out, 1)


@kernel
def never_written(out, upto):
    tile = cuda.shared.array((4, 8), np.float32)
    i = cuda.threadIdx.x
    if i < upto:
        tile[i // 8, i % 8] = np.float32(i)
    cuda.syncthreads()
    out[i] = tile[i // 8, i % 8]


def test_a_read_of_shared_memory_that_nobody_wrote_is_found() -> None:
    out = floats(32)
    never_written.simulate(1, 32, (out, 32))
    assert out.tolist() == list(range(32))
    text = fault(UninitialisedRead, never_written.simulate, 1, 32, out, 30)
    assert "shared array tile[3, 6] is read" in text
    assert "thread (30, 0, 0)" in text


def test_shared_memory_of_one_block_is_not_that_of_the_next() -> None:
    @kernel
    def first_block_writes(out):
        tile = cuda.shared.array(1, np.float32)
        if cuda.blockIdx.x == 0:
            tile[0] = np.float32(1)
        out[cuda.blockIdx.x] = tile[0]

    text = fault(UninitialisedRead, first_block_writes.simulate, 2, 1, floats(2))
    assert "block (1, 0, 0)" in text
