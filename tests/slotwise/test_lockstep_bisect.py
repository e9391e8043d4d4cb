"""What lockstep and bisect promise: the first wrong op is named, with who is at fault; a near-tie is no fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slotwise import LLM, Sampling
from slotwise.core.backend import load_backend
from slotwise.core.errors import BackendError, PlanError
from slotwise.core.ops import contract_of
from slotwise.engine.request import Request
from slotwise.inspect.bisect import bisect
from slotwise.inspect.lockstep import Lockstep
from slotwise.inspect.lockstep_run import plot, run_lockstep, weights_of

from .commands import Run
from .planted import registered, spoiled

SMALL = {"capacity": 64, "max_sequences": 2, "decode_rows": 6, "prefill_chunk": 16, "speculate": 2, "page_size": 4}
Load = Callable[..., LLM]


@pytest.fixture(scope="module")
def load(stories: Path, stories_draft: Path) -> Load:
    """Loads the bundled pair anew."""

    def loaded(backend: str = "reference", **changes: object) -> LLM:
        options = {**SMALL, **changes}
        return LLM(stories, draft=stories_draft, backend=backend, threads=1, progress=False, **options)  # type: ignore[arg-type]

    return loaded


def requests(llm: LLM, count: int = 8, **sampling: object) -> list[Request]:
    """Two prompts."""
    asked = Sampling(**{"max_new_tokens": count, "seed": 5, **sampling})  # type: ignore[arg-type]
    return [Request(tuple(llm.tokenizer.encode(text)), asked) for text in ("Once upon a time", "The dog")]


def test_backends_that_agree_run_to_the_end_and_change_nothing(load: Load) -> None:
    expected = [
        list(out.token_ids) for out in load().generate(["Once upon a time", "The dog"], Sampling(max_new_tokens=8))
    ]
    twin = replace(load_backend("reference"), name="twin")
    with registered(twin):
        llm = load()
        report = run_lockstep(llm, {"twin": "twin"}, requests(llm))
    assert report.passed
    assert report.compared > 500
    assert report.tokens == sum(map(len, expected)) == 16
    tally = report.tallies["twin"]
    assert set(tally.worst) >= {"attention", "rotary_write", "logits"}
    assert not any(tally.worst.values())
    assert not tally.alone
    assert "every op that was compared is within tolerance" in str(report)
    again = llm.generate(["Once upon a time", "The dog"], Sampling(max_new_tokens=8))
    assert [list(out.token_ids) for out in again] == expected


@pytest.mark.parametrize("op", ["attention", "linear_gated", "sample", "rotary_write"])
def test_the_first_wrong_op_is_named_with_who_is_at_fault(load: Load, op: str) -> None:
    calls = {"count": 0}

    def spoil(inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        calls["count"] += 1
        if calls["count"] > 3:
            outputs[0].flatten()[0] += 3

    with registered(spoiled("wrong", op, spoil)):
        llm = load()
        report = run_lockstep(llm, {"wrong": "wrong"}, requests(llm, temperature=0.9))
    finding = report.finding
    assert finding is not None
    assert finding.op == op
    assert finding.at_fault == (finding.kernels[1],)
    assert finding.kernels[1].startswith("wrong:")
    assert finding.index[0] == 0
    assert abs(finding.follower - finding.leader) > 1
    text = str(report)
    where = "" if finding.layer is None else f" of layer {finding.layer}"
    assert (finding.layer is None) == (op == "sample")
    assert f"op {op}{where} is out of tolerance" in text
    assert all(f"input {argument.name} = " in text for argument in contract_of(op).inputs if not argument.optional)
    assert "-> " in text
    assert calls["count"] == 4


def test_a_leader_at_fault_is_blamed_too(load: Load) -> None:
    with registered(spoiled("wrong", "rms_norm", lambda _, outputs: outputs[0][0].mul_(2))):
        llm = load("wrong")
        report = run_lockstep(llm, {"reference": "reference"}, requests(llm))
    assert report.finding is not None
    assert report.finding.at_fault == (report.finding.kernels[0],)
    assert report.finding.kernels[0].startswith("wrong:")


def test_a_write_to_a_strange_slot_is_found(load: Load) -> None:
    def spoil(inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        k_cache = inputs[6]
        assert k_cache is not None
        k_cache[-1, 0, 0] = 1

    with registered(spoiled("wrong", "rotary_write", spoil)):
        llm = load()
        report = run_lockstep(llm, {"wrong": "wrong"}, requests(llm))
    assert report.finding is not None
    assert (report.finding.output, report.finding.index[1:]) == ("k_cache", (0, 0))
    assert report.finding.want == 0


def test_a_free_run_lets_errors_grow_with_depth(load: Load) -> None:
    with registered(spoiled("rough", "add_rms_norm", lambda _, outputs: outputs[1].mul_(1.001))):
        llm = load(dtype="float32")
        report = run_lockstep(llm, {"rough": "rough"}, requests(llm), free_run=True)
    assert report.passed
    drifts = report.tallies["rough"].drifts
    of_step = [d for d in drifts if d.step == drifts[-1].step and d.program.startswith("target")]
    assert of_step[0].error == 0  # the embedding has met no spoiled op yet
    assert 0 < of_step[-1].error < 1
    assert max(d.error for d in of_step) > 1e-3
    text = str(report)
    assert "relative error of the logits, step by step" in text
    page = report.to_html()
    assert json.loads(page.partition('id="data">')[2].partition("</script>")[0])["free_run"] is True
    assert not any(word in page for word in ("src=", "@import", "url(", "https://"))


def test_a_plan_with_other_pages_cannot_run_freely(load: Load) -> None:
    llm = load()
    other = llm.plan(page_size=8)
    with pytest.raises(PlanError, match="other cannot run freely beside the leader"):
        Lockstep(llm.engine, {"other": other}, weights_of(llm), free_run=True)
    assert llm.engine.executor.conductor is None
    with pytest.raises(BackendError, match="did you mean 'reference'"):
        run_lockstep(llm, {"x": "refrence"}, requests(llm))


def test_bisect_finds_no_difference_where_there_is_none(load: Load) -> None:
    found = bisect(load, lambda: load(speculate=0), requests(load()))
    assert found.verdict == "same"
    assert "the same 16 tokens" in str(found)
    assert "no op is compared" in str(found)


def test_bisect_names_the_first_step_and_op_of_a_fault(load: Load) -> None:
    def spoil(inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        lengths = inputs[4]
        assert lengths is not None
        if int(lengths.max()) > 12:  # wrong in long sequences alone
            outputs[0][: len(outputs[0]) // 2 + 1] *= -3

    with registered(spoiled("long", "attention", spoil)):
        found = bisect(load, lambda: load("long"), requests(load(), 12))
        assert found.verdict == "fault"
        assert found.finding is not None
        assert found.parting is not None
        assert found.step is not None
        assert (found.finding.op, found.finding.step <= found.step) == ("attention", True)
        assert found.finding.at_fault == ("long:attention.by_row",)
        assert found.parting.index >= 1
        assert "verdict: a fault" in str(found)


def test_bisect_calls_a_near_tie_what_it_is(load: Load) -> None:
    """Two tokens are made equal but for the last bits, one way round on each backend."""
    llm = load()
    best, second = llm.logits(llm.tokenizer.encode("Once upon a time"))[-1].topk(2).indices.tolist()

    def tie(sign: float) -> Callable[[object, tuple[torch.Tensor, ...]], None]:
        def spoil(_: object, outputs: tuple[torch.Tensor, ...]) -> None:
            outputs[0][:, second] = outputs[0][:, best] + sign * 1e-5

        return spoil

    with registered(spoiled("up", "logits", tie(1))), registered(spoiled("down", "logits", tie(-1))):
        found = bisect(lambda: load("down"), lambda: load("up"), requests(llm, 2)[:1])
    assert found.parting is not None
    assert (found.parting.one, found.parting.other) == (best, second)
    assert found.parting.is_near_tie
    assert found.verdict == "near-tie"
    assert found.gap is not None
    assert found.gap.left < 1e-3


def test_bisect_compares_under_the_left_options_and_says_so(load: Load) -> None:
    with registered(spoiled("off", "logits", lambda _, outputs: outputs[0][:, 9].add_(30))):
        found = bisect(load, lambda: load("off", page_size=8), requests(load(), 3))
    assert found.parting is not None
    assert found.verdict == "fault"  # the left plan's own calls, on the right plan's backend
    assert found.finding is not None
    assert found.finding.op == "logits"
    assert "under the left run's options (page_size 4 and not 8, " in str(found)


def test_a_plot_keeps_peaks_and_says_its_range() -> None:
    line = plot([1e-6] * 300 + [1e-2] + [1e-6] * 300)
    assert line.count("█") == 1
    assert "1e-6.0 to 1e-2.0" in line
    assert plot([]) == "(nothing ran)"
    assert plot([0.0, 0.0, 1e-3, 1e-1]) == "··▁█  1e-3.0 to 1e-1.0"
    assert plot([0.0]) == "·  no difference"


def test_the_commands_report_and_fail(run: Run, stories: Path, tmp_path: Path) -> None:
    options = ("--capacity", 48, "--max-sequences", 1, "--threads", 1, "--max-new-tokens", 4, "--backend", "reference")
    with registered(spoiled("wrong", "add_rms_norm", lambda _, outputs: outputs[0][0].mul_(2))):
        done = run("lockstep", stories, "--with", "wrong", "--prompt", "Once", *options)
        assert done.code == 1
        assert "op add_rms_norm of layer 0 is out of tolerance" in done.out
        page = tmp_path / "drift.html"
        free = run(
            "lockstep", stories, "--with", "wrong", "--prompt", "Once", "--free-run", "--html", page, "--json", *options
        )
        assert free.code == 0
        assert json.loads(free.out)["free_run"] is True
        assert page.exists()
    with registered(spoiled("off", "logits", lambda _, outputs: outputs[0][:, 9].add_(30))):
        part = run("bisect", stories, "--prompt", "Once upon", *options, "--against", "--backend", "off")
        assert part.code == 1
        assert "verdict: a fault" in part.out
    assert "nothing to compare with" in run("bisect", stories, "--prompt", "x").err
    same = run("bisect", stories, "--prompt", "Once", *options, "--against", "--speculate", 0)
    assert (same.code, "verdict: no difference" in same.out) == (0, True)
