"""Promises of host memory: zeroed, aligned, handed out once; huge pages where the system has them, and not needed."""

from __future__ import annotations

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.engine.memory import HUGE, Shelf, host_memory


@pytest.mark.parametrize("nbytes", [0, 1, HUGE - 1, HUGE, 3 * HUGE + 5])
def test_memory_is_zeroed_and_as_large_as_asked_for(nbytes: int) -> None:
    found = host_memory(nbytes)
    assert (found.dtype, found.numel()) == (torch.uint8, nbytes)
    assert not found.any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no huge pages on request")
def test_large_memory_begins_at_the_border_of_a_huge_page() -> None:
    assert host_memory(2 * HUGE).data_ptr() % HUGE == 0


def test_a_system_that_refuses_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refusing)
    assert not host_memory(HUGE).any()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert not host_memory(HUGE).any()


def test_memory_lives_as_long_as_a_tensor_in_it() -> None:
    part = host_memory(4 * HUGE)[HUGE : HUGE + 8]
    part.fill_(7)
    others = [host_memory(4 * HUGE).fill_(1) for _ in range(4)]
    assert part.tolist() == [7] * 8, f"{len(others)} others were made"


@given(
    st.lists(st.tuples(st.sampled_from([torch.bfloat16, torch.float32, torch.uint8]), st.integers(0, 700)), max_size=12)
)
def test_a_shelf_keeps_every_tensor_apart_from_the_others(wanted: list[tuple[torch.dtype, int]]) -> None:
    tensors = [torch.full((count,), i + 1.0).to(dtype) for i, (dtype, count) in enumerate(wanted)]
    shelf = Shelf(sum(Shelf.room(tensor.nbytes) for tensor in tensors))
    kept = [shelf.keep(tensor) for tensor in tensors]
    assert all(one.equal(other) for one, other in zip(kept, tensors, strict=True))
    places = [one.data_ptr() for one in kept if one.numel()]
    assert len({place % 256 for place in places}) <= 1
