"""Kernels in another memory than the engine: everything that either writes reaches the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch

from slotwise.core.backend import load_backend
from slotwise.core.errors import PlanError
from slotwise.engine import executor as executor_module
from slotwise.engine.arrays import Arrays, memory_of

from .tiny import DraftChoice, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}


class Apart(Arrays):
    """The copying of a GPU's memory, between two places on the CPU."""

    def __init__(self, buffers: Mapping[str, torch.Tensor], *, separate: bool) -> None:
        super().__init__(buffers, separate=True)
        for name, view in self._views.items():
            assert view.ctypes.data != buffers[name].data_ptr() or not view.size, name


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
    buffers = {"logits": torch.zeros(2, 3)}
    arrays = Arrays(buffers, separate=True)
    buffers["logits"].fill_(5.0)
    arrays.after(["logits"])
    assert arrays._host["logits"].eq(0).all()
    assert (arrays["logits"] == 5.0).all()


def test_what_the_host_did_not_touch_is_not_handed_back_over_what_a_program_wrote() -> None:
    buffers = {"logits": torch.zeros(2, 3)}
    arrays = Arrays(buffers, separate=True)
    buffers["logits"].fill_(5.0)
    arrays.after(["logits"])
    arrays.before(["logits"])
    assert buffers["logits"].eq(5).all()
    arrays["logits"][0, 0] = 7.0
    arrays.before(["logits"])
    assert buffers["logits"].flatten().tolist() == [7, 5, 5, 5, 5, 5]


def test_a_plan_whose_kernels_need_two_memories_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny_engine(MODEL, None).executor.plan
    assert memory_of(plan) == torch.device("cpu")
    (first, *rest) = plan.programs
    (node, *nodes) = first.graph.nodes
    assert node.selection is not None
    moved = dataclasses.replace(node, selection=dataclasses.replace(node.selection, kernel="elsewhere:any"))
    graph = dataclasses.replace(first.graph, nodes=(moved, *nodes))
    mixed = dataclasses.replace(plan, programs=(dataclasses.replace(first, graph=graph), *rest))
    far = dataclasses.replace(load_backend("reference"), name="elsewhere", device="cuda")
    monkeypatch.setattr(
        "slotwise.engine.arrays.load_backend", lambda name: far if name == "elsewhere" else load_backend(name)
    )
    with pytest.raises(PlanError, match="elsewhere on cuda, reference on cpu"):
        memory_of(mixed)
