"""An index outside its array or a wide access out of line, planted: found, and named with array, index and thread."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import (
    Misaligned,
    OutOfBounds,
    cuda,
    intrinsic,
    kernel,
)

from .planted import fault, floats


@kernel
def past_the_end(x, out):
    i = cuda.grid(1)
    out[i] = x[i + 1]


def test_an_index_past_the_end_names_array_index_shape_thread_and_line() -> None:
    text = fault(OutOfBounds, past_the_end.simulate, 2, 8, floats(16), floats(16))
    assert "array x[16] is outside its shape (16,)" in text
    assert "block (1, 0, 0), thread (7, 0, 0)" in text
    assert "test_bounds.py" in text
    assert "out[i] = x[i + 1]" in text


@kernel
def before_the_start(x, out):
    i = cuda.threadIdx.x
    if i < 2:
        out[i] = x[i - 1]


def test_a_negative_index_is_outside() -> None:
    text = fault(OutOfBounds, before_the_start.simulate, 1, 8, floats(16), floats(16))
    assert "x[-1]" in text
    assert "thread (0, 0, 0)" in text


@kernel
def one_number_for_all(out):
    out[out.shape[0]] = np.float32(1)


def test_an_index_that_all_threads_share_is_checked_too() -> None:
    assert "out[3]" in fault(OutOfBounds, one_number_for_all.simulate, 1, 1, floats(3))


@kernel
def second_axis(x):
    i = cuda.threadIdx.x
    x[i % 2, i] = np.float32(1)


def test_each_axis_is_checked_by_itself() -> None:
    text = fault(OutOfBounds, second_axis.simulate, 1, 8, floats(8, 4))
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
    assert text in fault(OutOfBounds, in_shared_and_local.simulate, 1, 5, floats(1), which)


@kernel
def slice_too_long(x):
    part = x[2:9]
    part[0] = np.float32(1)


def test_a_slice_past_the_end_is_outside() -> None:
    assert "x[2:9]" in fault(OutOfBounds, slice_too_long.simulate, 1, 1, floats(8))


def test_indices_are_checked_without_the_race_checker_too() -> None:
    fault(OutOfBounds, past_the_end.simulate, 2, 8, floats(16), floats(16), checks=False)


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
    wide.simulate(1, 8, (_at_16(32), floats(8), 0))
    text = fault(Misaligned, wide.simulate, 1, 7, _at_16(32), floats(8), 1)
    assert "global array x[1] is accessed 16 bytes at a time" in text
    fault(Misaligned, wide.simulate, 1, 7, _at_16(32)[1:], floats(8), 0)


def test_a_wide_access_over_the_end_is_outside() -> None:
    text = fault(OutOfBounds, wide.simulate, 1, 8, _at_16(30), floats(8), 0)
    assert "x[31] is outside its shape (30,)" in text


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
    assert "make it with alignment=16" in fault(Misaligned, wide_shared.simulate, 1, 32, floats(8))
