"""Copies that a thread waits for later: what is waited for is there, what is not is a race."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import re

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import DataRace, cuda, intrinsic, kernel


@intrinsic(numba=lambda: None, memory="rw")
def copy_4(active, target, at, source, index):
    active.copy_later(target, at, active.load_vector(source, index, 4))


@intrinsic(numba=lambda: None)
def commit(active):
    active.commit_copies()


@intrinsic(numba=lambda: None)
def all_but_one(active):
    active.wait_copies(newest=1)


@intrinsic(numba=lambda: None)
def all_but_two(active):
    active.wait_copies(newest=2)


@intrinsic(numba=lambda: None)
def all_done(active):
    active.wait_copies()


@kernel
def staged(x, out, stages, waits, barrier, late_barrier):
    """Sums `stages` rows of 128, the next on its way while one is added up."""
    tile = cuda.shared.array((2, 128), np.float32, 16)
    i = cuda.threadIdx.x
    acc = np.float32(0)
    copy_4(tile, 4 * i, x, 4 * i)
    commit()
    for stage in range(stages):
        if stage + 1 < stages:
            copy_4(tile, (stage + 1) % 2 * 128 + 4 * i, x, (stage + 1) * 128 + 4 * i)
        commit()
        if waits == 1:
            all_but_one()
        elif waits == 2:
            all_but_two()  # one group too few is waited for
        if barrier:
            cuda.syncthreads()
        for j in range(4):
            acc += tile[stage % 2, (i + 32 * j) % 128]
        if late_barrier:
            cuda.syncthreads()
    all_done()
    out[i] = acc


def _run(**leave_out: int) -> None:
    raw = np.random.default_rng(0).standard_normal(5 * 128 + 4).astype(np.float32)
    x = raw[-(raw.ctypes.data // 4) % 4 :][: 5 * 128]
    out = np.zeros(32, np.float32)
    chosen = {"waits": 1, "barrier": 1, "late_barrier": 1} | leave_out
    staged.simulate(1, 32, (x, out, 5, *chosen.values()))
    assert np.allclose(out, x.reshape(5, 4, 32).sum((0, 1)), atol=1e-5)


def test_a_group_that_was_waited_for_is_there() -> None:
    _run()


@pytest.mark.parametrize(
    ("left_out", "words"),
    [("waits", "still copies to"), ("barrier", "wrote it at .*copy_4"), ("late_barrier", "read it at")],
)
def test_a_wait_or_a_barrier_left_out_is_a_race(left_out: str, words: str) -> None:
    with pytest.raises(DataRace, match=words):
        _run(**{left_out: 0})


def test_waiting_for_one_group_too_few_reads_a_copy_that_has_not_landed_and_says_so() -> None:
    with pytest.raises(DataRace) as caught:
        _run(waits=2)
    text = str(caught.value)
    assert "shared array tile[" in text
    assert re.search(r"reads it at .*test_copies\.py.*staged.*acc \+= tile\[stage % 2", text)
    assert re.search(r"still copies to it at .*test_copies\.py.*staged.*copy_4\(tile, 4 \* i, x, 4 \* i\)", text)


@kernel
def reads_its_own(x, out, waits):
    tile = cuda.shared.array(128, np.float32, 16)
    i = cuda.threadIdx.x
    copy_4(tile, 4 * i, x, 4 * i)
    if waits:
        all_done()
    out[i] = tile[4 * i]


def test_a_thread_waits_for_its_own_copy_too() -> None:
    raw = np.arange(132, dtype=np.float32)
    x, out = raw[-(raw.ctypes.data // 4) % 4 :][:128], np.zeros(32, np.float32)
    reads_its_own.simulate(1, 32, (x, out, 1))
    assert np.array_equal(out, x[::4])
    with pytest.raises(DataRace, match="still copies to"):
        reads_its_own.simulate(1, 32, (x, out, 0))
