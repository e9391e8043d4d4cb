"""Kernels in another memory than the engine: everything that either writes reaches the other."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slotwise.core.specs import DType, TensorSpec
from slotwise.engine import executor as executor_module
from slotwise.engine.arrays import Arrays, Layout, lay_out

from .tiny import DraftChoice, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}


class Apart(Arrays):
    """The copying of a GPU's memory, between two places on the CPU."""

    def __init__(self, layout: Layout, *, separate: bool) -> None:
        super().__init__(layout, separate=True)
        for name, view in self._views.items():
            assert view.ctypes.data != layout.buffers[name].data_ptr() or not view.size, name


def _laid_out(written: tuple[str, ...] = ()) -> Layout:
    specs = {
        "logits": TensorSpec(DType.F32, (2, 3)),
        "positions": TensorSpec(DType.I32, (2,)),
        "seed": TensorSpec(DType.I64, (3,)),
        "sampled": TensorSpec(DType.I32, (2,)),
        "ok": TensorSpec(DType.BOOL, (2,)),
    }
    return lay_out(specs.items(), written, torch.device("cpu"))


class Copies(TorchDispatchMode):
    """Counts tensors copied into others."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "copy_" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("sampling", "handed_over"), [({}, 2), ({"temperature": 0.8}, 3)])
def test_a_decode_step_fetches_once_and_hands_over_what_is_short_at_once(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, float], handed_over: int
) -> None:
    monkeypatch.setattr(executor_module, "Arrays", Apart)
    engine = tiny_engine(MODEL, None)
    sequences = [engine.add(request(prompt_of(4, n), 9, logprobs=None, **sampling)) for n in range(3)]
    while any(s.state != "decode" for s in sequences):
        engine.step()
    for key, bound in engine.executor._launches.items():
        engine.executor._launches[key] = tuple(lambda: None for _ in bound)  # kernels of the reference copy too
    engine.executor.buffers["ok"].fill_(True)
    with Copies() as copies:
        engine.step()
    # For the model its rows and the page table, for the sampler its controls; back come the tokens with their `ok`.
    assert copies.count == handed_over + 1


def test_arrays_of_a_block_do_not_overlap_and_are_aligned() -> None:
    layout = _laid_out(("logits", "sampled", "ok"))
    assert set(layout.given.offsets) == {"positions", "seed"}
    assert set(layout.results.offsets) == {"sampled", "ok"}
    spans = sorted((b.data_ptr(), b.data_ptr() + b.numel() * b.element_size()) for b in layout.buffers.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for block in (layout.given, layout.results):
        assert all(offset % 256 == 0 for offset in block.offsets.values())


def test_results_are_fetched_together_and_what_is_given_is_handed_over_together() -> None:
    layout = _laid_out(("logits", "sampled", "ok"))
    arrays = Arrays(layout, separate=True)
    arrays["positions"][:] = [3, 4]
    arrays["seed"][:] = [5, 6, 7]
    arrays.before(["positions"], 2)
    assert layout.buffers["positions"].tolist() == [3, 4]
    assert layout.buffers["seed"].tolist() == [5, 6, 7]
    layout.buffers["sampled"].copy_(torch.tensor([8, 9]))
    layout.buffers["ok"].fill_(True)
    arrays.after(["sampled", "ok"])
    assert arrays["sampled"].tolist() == [8, 9]
    assert arrays._host["ok"].tolist() == [True, True]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.8, "repetition_penalty": 1.3, "logprobs": 2}],
    ids=["greedy", "sampled", "edited"],
)
def test_tokens_do_not_depend_on_where_kernels_keep_their_tensors(
    monkeypatch: pytest.MonkeyPatch, draft: str, acceptance: str, sampling: dict[str, float]
) -> None:
    def outcomes() -> list[tuple[object, ...]]:
        requests = [request(prompt_of(4 + 20 * n, n), 9, **sampling) for n in range(3)]
        return [outcome(c) for c in run(tiny_engine(MODEL, DRAFTS[draft], acceptance=acceptance), requests)]

    together = outcomes()
    monkeypatch.setattr(executor_module, "Arrays", Apart)
    assert outcomes() == together


def test_what_a_program_wrote_is_fetched_when_it_is_asked_for_and_not_before() -> None:
    layout = _laid_out(("logits",))
    buffers, arrays = layout.buffers, Arrays(layout, separate=True)
    buffers["logits"].fill_(5.0)
    arrays.after(["logits"])
    assert arrays._host["logits"].eq(0).all()
    assert (arrays["logits"] == 5.0).all()


def test_what_the_host_did_not_touch_is_not_handed_back_over_what_a_program_wrote() -> None:
    layout = _laid_out(("logits",))
    buffers, arrays = layout.buffers, Arrays(layout, separate=True)
    buffers["logits"].fill_(5.0)
    arrays.after(["logits"])
    arrays.before(["logits"], 2)
    assert buffers["logits"].eq(5).all()
    arrays["logits"][0, 0] = 7.0
    arrays.before(["logits"], 2)
    assert buffers["logits"].flatten().tolist() == [7, 5, 5, 5, 5, 5]
