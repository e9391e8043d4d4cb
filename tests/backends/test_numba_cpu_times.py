"""What timing from within a chain promises: a call is charged its own time, together no more than the chain took."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from slotwise.backends.numba_cpu.calls import Call, Chain, Part, _idle
from slotwise.backends.numba_cpu.compiled import compile_kernel
from slotwise.backends.numba_cpu.memory import int64s
from slotwise.backends.numba_cpu.threads import FAULT, FIRST_FIELD
from slotwise.core.backend import TimedLaunch, load_backend
from slotwise.core.errors import BackendError

NOTHING = 2e-6
"""Seconds that a call which does nothing is charged at most."""


def norms(count: int, rows: int, width: int) -> list[Call]:
    """So many launches of a norm, each of the last one's output."""
    kernel = load_backend("numba_cpu").kernels_for("rms_norm")[0]
    values = [torch.randn(rows, width) for _ in range(count + 1)]
    weight, attrs = torch.ones(width), {"eps": 1e-6, "weight_offset": 0.0}
    return [kernel.bind((x, weight), (y,), attrs, None) for x, y in itertools.pairwise(values)]  # type: ignore[misc]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_that_does_nothing_is_charged_next_to_nothing(threads: int) -> None:
    """The least of many runs: what else the machine does can only add to it."""
    chain = Chain([Call(Part("nothing", _idle(), ())) for _ in range(8)], threads)
    best = [min(column) for column in zip(*(chain.timed()[1] for _ in range(2000)), strict=True)]
    assert len(best) == 8
    assert all(0 < seconds < NOTHING for seconds in best), best


def test_calls_are_charged_no_more_than_their_chain_took() -> None:
    """Whatever else the machine does: both clocks see it. They may differ by a thousandth."""
    chain = Chain(norms(16, 64, 4096), 1)
    for _ in range(30):
        start = time.perf_counter()
        begun, each = chain.timed()
        took = time.perf_counter() - start
        assert len(each) == 16
        assert all(seconds > 0 for seconds in each)
        assert begun + sum(each) <= took * 1.001


def test_timing_changes_no_result_and_a_call_of_several_parts_is_one() -> None:
    calls = norms(3, 5, 128)
    together = Call(*calls[1].parts, *calls[2].parts)
    plain, timed = Chain(calls, 1), Chain([calls[0], together], 1)
    assert isinstance(plain, TimedLaunch)
    out = next(part.fields for part in calls[2].parts)
    tensors = [field for field in out if isinstance(field, torch.Tensor)]
    plain()
    expected = [tensor.clone() for tensor in tensors]
    tensors[-1].zero_()
    _, each = timed.timed()
    assert len(each) == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_a_fault_in_a_timed_chain_names_its_op_and_the_next_run_is_clean() -> None:
    fault, first = FAULT, FIRST_FIELD

    def faulty(call: int, thread: int, threads: int) -> None:
        words = int64s(call, first + 1)
        if words[first] != 0:
            words[fault] = 1

    address = compile_kernel(faulty)
    given = torch.ones(1)
    idle = Call(Part("nothing", _idle(), ()))
    chain = Chain([idle, Call(Part("second", address, (given,), "it is at fault")), idle], 1)
    with pytest.raises(BackendError, match="op second: it is at fault"):
        chain.timed()
    with pytest.raises(BackendError, match="op second: it is at fault"):
        chain()
    healthy = Chain([idle, Call(Part("second", address, (None,)))], 1)
    healthy.timed()
    healthy()
