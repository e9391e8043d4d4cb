"""What lockstep and bisect promise across layouts and plans: calls match by meaning, and nothing else is claimed."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slotwise import LLM, Sampling
from slotwise.core.backend import backend_names, load_backend
from slotwise.core.errors import BackendError
from slotwise.engine.request import Request
from slotwise.inspect.bisect import bisect
from slotwise.inspect.lockstep import Lockstep
from slotwise.inspect.lockstep_run import run_lockstep, run_until, weights_of

from .commands import Run
from .planted import registered, spoiled

SMALL = {"capacity": 48, "max_sequences": 1, "decode_rows": 6, "prefill_chunk": 16, "page_size": 8}
LAYERS, HIDDEN = 6, 192
Load = Callable[..., LLM]


@pytest.fixture(scope="module")
def load(stories: Path, stories_draft: Path) -> Load:
    """Loads the bundled model anew, with its draft model where `speculate` is given."""

    def loaded(backend: str = "reference", **changes: object) -> LLM:
        options = {**SMALL, **changes}
        draft = stories_draft if "speculate" in options else None
        return LLM(stories, draft=draft, backend=backend, threads=1, progress=False, **options)  # type: ignore[arg-type]

    return loaded


def request(llm: LLM, count: int = 4) -> list[Request]:
    """One greedy request."""
    return [Request(tuple(llm.tokenizer.encode("Once upon")), Sampling(max_new_tokens=count, temperature=0))]


def here() -> list[str]:
    """The backends that this machine can run."""
    found = []
    for name in backend_names():
        try:
            if load_backend(name).unavailable() is None:
                found.append(name)
        except BackendError:
            continue
    return found


@pytest.mark.parametrize("draft", [{}, {"speculate": 2}], ids=["alone", "draft"])
@pytest.mark.parametrize("weights", ["native", "int8", "int4", "int4_zp"])
def test_every_call_has_a_partner_in_another_layout(load: Load, weights: str, draft: dict[str, int]) -> None:
    llm = load(weights=weights, **draft)
    report = run_lockstep(llm, {"numba_cpu": "numba_cpu"}, request(llm))
    tally = report.tallies["numba_cpu"]
    assert report.passed, str(report)
    assert not tally.alone
    assert tally.compared > 100
    assert tally.weights.same == sum(len(role.parameters) for role in llm.plan().roles)
    assert not tally.weights.apart
    quantised = {op for op in tally.worst if op.endswith("_q")}
    assert quantised == (set() if weights == "native" else {"linear_qkv_q", "linear_q", "linear_gated_q", "logits_q"})


def pairs() -> list[Any]:
    """Every two backends here; what simulates a GPU takes half a minute."""
    quick = {"numba_cpu", "reference"}
    found = itertools.combinations(here(), 2)
    return [pytest.param(*pair, marks=() if set(pair) <= quick else pytest.mark.slow) for pair in found]


@pytest.mark.parametrize(("one", "other"), pairs())
def test_any_two_backends_here_can_follow_each_other(load: Load, one: str, other: str) -> None:
    for leader, follower in ((one, other), (other, one)):
        llm = load(leader)
        report = run_lockstep(llm, {follower: follower}, request(llm, 2))
        assert report.passed, str(report)
        assert not report.tallies[follower].alone


@pytest.mark.parametrize("draft", [{}, {"speculate": 2}], ids=["alone", "draft"])
@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_a_bug_in_another_layout_is_named_with_op_and_layer(load: Load, weights: str, draft: dict[str, int]) -> None:
    op, layer = "linear_gated" if weights == "native" else "linear_gated_q", 2

    def spoil(inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        outputs[0].neg_()

    bound = itertools.count()

    def in_layer(inputs: tuple[torch.Tensor | None, ...]) -> bool:
        x = inputs[0]
        assert x is not None
        # Each program of the target is bound layer by layer.
        return x.shape[1] == HIDDEN and next(bound) % LAYERS == layer

    with registered(spoiled("wrong", op, spoil, "numba_cpu", in_layer)):
        llm = load(weights=weights, **draft)
        report = run_lockstep(llm, {"wrong": "wrong"}, request(llm))
        assert not report.passed
        assert report.finding is not None
        assert (report.finding.op, report.finding.layer) == (op, layer)
        assert report.finding.at_fault == (f"wrong:{op}",)
        assert f"op {op} of layer {layer} is out of tolerance" in str(report)
        found = bisect(
            lambda: load(weights=weights, **draft),
            lambda: load("wrong", weights=weights, **draft),
            request(llm, 8),
        )
        assert found.verdict == "fault", str(found)
        assert found.finding is not None
        assert (found.finding.op, found.finding.layer) == (op, layer)


def test_a_quantised_product_has_no_native_partner_and_that_is_said(load: Load) -> None:
    llm = load()
    lockstep = Lockstep(llm.engine, {"int4": llm.plan(backend="numba_cpu", weights="int4")}, weights_of(llm))
    run_until(llm.engine, [llm.engine.add(each) for each in request(llm)], lambda: False)
    lockstep.detach()
    tally = lockstep.tallies["int4"]
    assert lockstep.finding is None
    assert {"rms_norm", "attention", "rotary_write"} <= set(tally.worst)
    alone = dict(tally.alone.keys())
    assert set(alone) == {"linear_qkv", "linear", "linear_gated", "logits"}
    assert alone["linear"] == "it runs linear_q: a quantised weight is another function than a native one"


def test_other_pages_leave_out_what_reads_them_alone(load: Load) -> None:
    llm = load()
    lockstep = Lockstep(llm.engine, {"pages": llm.plan(backend="numba_cpu", page_size=4)}, weights_of(llm))
    run_until(llm.engine, [llm.engine.add(each) for each in request(llm)], lambda: False)
    lockstep.detach()
    tally = lockstep.tallies["pages"]
    assert lockstep.finding is None
    assert tally.compared > 100
    assert {op for op, _ in tally.alone} == {"attention", "rotary_write"}
    assert "page_size is 8 here and 4 there" in {reason for _, reason in tally.alone}


def test_a_comparison_of_nothing_fails(load: Load, run: Run, stories: Path) -> None:
    llm = load()
    report = run_lockstep(llm, {"reference": "reference"}, request(llm))
    assert not report.passed
    assert report.compared == 0
    assert "NOTHING was compared with reference" in str(report)
    assert "within tolerance" not in str(report)
    options = ("--capacity", 48, "--max-sequences", 1, "--threads", 1, "--max-new-tokens", 2, "--backend", "reference")
    assert run("lockstep", stories, "--with", "reference", "--prompt", "Once", *options).code == 1


def test_bisect_claims_nothing_of_ops_it_could_not_compare(load: Load) -> None:
    asked = Sampling(max_new_tokens=40, temperature=1.2, seed=3)
    prompt = tuple(load().tokenizer.encode("Once upon"))
    found = bisect(load, lambda: load(weights="int4"), [Request(prompt, asked)])
    assert found.parting is not None
    assert found.verdict == "not compared"
    assert found.compared == 0
    text = str(found)
    assert "weights native and not int4" in text
    assert "the very same kernel" in text
    assert "within tolerance" not in text


def test_a_weight_that_was_laid_out_wrongly_is_named(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from slotwise.engine import weights as loading

    llm = load()
    right = loading.laid_out

    def wrong(matrix: torch.Tensor, word: int, layout: str) -> torch.Tensor:
        made = right(matrix, word, layout).clone()
        if layout == "octets" and tuple(made.shape) == (192, 512):
            made[0, :2] = made[0, :2].flip(0)
        return made

    monkeypatch.setattr(loading, "laid_out", wrong)
    report = run_lockstep(llm, {"numba_cpu": "numba_cpu"}, request(llm))
    assert not report.passed
    assert len(report.tallies["numba_cpu"].weights.apart) == LAYERS
    assert "WEIGHT target layers.0.feed_forward.down (rows) and layers.0.feed_forward.down.octets (octets)" in str(
        report
    )


def test_a_mixed_plan_compares_only_what_runs_on_two_backends(load: Load) -> None:
    twin = replace(load_backend("reference"), name="twin")
    with registered(twin):
        llm = load()
        report = run_lockstep(llm, {"mixed": {"*": "reference", "attention": "twin"}}, request(llm))
    assert report.passed
    assert set(report.tallies["mixed"].worst) == {"attention"}
