"""What cross-validation promises: wrong kernels fail, tolerated failures cite a reason, nothing is passed over."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slotwise import Plan, crossvalidate, progress
from slotwise.core.backend import Backend, CallSpec, load_backend
from slotwise.core.errors import BackendError, OptionError
from slotwise.core.ops import contracts
from slotwise.inspect.crossvalidate_report import CrossValidation
from slotwise.inspect.waivers import Waiver, read_waivers
from slotwise.planning import plan_model
from slotwise.proving.validate import cases_of

from .commands import Run
from .planted import last_row_off, registered, spoiled

every = functools.partial(crossvalidate, quick=False)
WAIVER = '[[waiver]]\nop = "add"\nbackend = "planted"\ncheck = "oracle"\nreason = "issue 12: last row"\n'


@pytest.fixture(scope="module")
def planted() -> Iterator[Backend]:
    """A backend whose addition is wrong in its last row, known by its name."""
    with registered(spoiled("planted", "add", last_row_off(0.5))) as backend:
        yield backend


@pytest.fixture(scope="module")
def found(planted: Backend) -> CrossValidation:
    """Additions of the planted backend and of the reference."""
    return every(backends=[planted, "reference"], ops="add")


def test_every_op_is_tried_on_every_case() -> None:
    wanted = {name: contract for name, contract in contracts().items() if not contract.logical}
    assert {kernel.op for kernel in load_backend("reference").kernels} == wanted.keys()
    # These take long, and tests/backends has every kernel; that they are found is seen without running them.
    quick = [name for name in wanted if name != "attention" and not name.endswith("_q")]
    done = every(backends="reference", ops=quick, timed=False, dtypes="f32")
    assert done.passed
    for name in quick:
        assert {check.case for check in done.checks if check.op == name} == {
            case.name for case in cases_of(wanted[name])
        }
    assert {check.check for check in done.checks} == {"oracle", "rows"}


def test_a_wrong_kernel_fails_and_is_measured(found: CrossValidation) -> None:
    assert not found.passed
    assert {(check.backend, check.op) for check in found.wrong} == {("planted", "add")}
    wrong = [check for check in found.wrong if check.check == "oracle"]
    assert {check.rule for check in wrong} == {"oracle"}
    assert all(check.max_abs and check.max_rel and check.ulps and check.seconds for check in wrong)
    assert all(check.max_rel == pytest.approx(0.5, rel=0.02) for check in wrong)
    right = [check for check in found.checks if check.backend == "reference"]
    assert right
    assert all(check.verdict == "ok" for check in right)
    assert all(check.cosine == pytest.approx(1, abs=1e-4) for check in right if check.check == "oracle")


def test_a_row_that_depends_on_its_company_fails(found: CrossValidation) -> None:
    assert {check.rule for check in found.wrong if check.check == "rows"} == {"row invariance"}


def test_backends_are_compared_with_each_other(found: CrossValidation) -> None:
    assert {(a.left, a.right) for a in found.agreements} == {("planted:add.whole", "reference:add.whole")}
    assert all(not each.is_bit_equal and each.max_abs > 0.1 for each in found.agreements)
    twin = replace(load_backend("reference"), name="twin")
    same = every(backends=[twin, "reference"], ops="add", timed=False)
    assert all(each.is_bit_equal and each.max_abs == 0 for each in same.agreements)


def test_a_waived_failure_cites_its_reason_and_passes(planted: Backend, tmp_path: Path) -> None:
    file = tmp_path / "waivers.toml"
    file.write_text(WAIVER + WAIVER.replace("oracle", "rows").replace("12", "13"))
    done = every(backends=[planted], ops="add", waivers=file, timed=False)
    assert done.passed
    assert {check.reason for check in done.checks if check.check == "oracle"} == {"issue 12: last row"}
    assert "issue 13" in str(done)


def test_an_unexpected_pass_fails() -> None:
    waiver = Waiver(op="add", backend="reference", reason="was wrong once")
    done = every(backends="reference", ops="add", waivers=[waiver], timed=False)
    assert not done.passed
    assert {check.verdict for check in done.checks} == {"unexpected pass"}
    assert "remove its waiver (was wrong once)" in str(done)


def test_a_waiver_excuses_only_what_it_names(planted: Backend) -> None:
    waiver = Waiver(op="add", backend="planted", dtype="bf16", reason="half")
    done = every(backends=[planted], ops="add", waivers=[waiver], timed=False)
    assert {(check.dtype == "bf16") == (check.verdict == "waived") for check in done.checks} == {True}
    assert {check.dtype for check in done.wrong} == {"f32", "f16"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[waiver]]\nop = 'add'\nbackend = 'reference'\n", "reason is missing"),
        ("[[waiver]]\nop = 'add'\nbackend = 'reference'\nreason = ' '\n", "reason must be text"),
        ("[[waiver]]\nop = 'add'\nbackend = 'b'\nreason = 'r'\nkernl = 'k'\n", "did you mean 'kernel'"),
        ("[[waiver]]\nop = 'add'\nbackend = 'b'\nreason = 'r'\ncheck = 'speed'\n", "check must be one of oracle, rows"),
        ("[waivers]\n", "expected [[waiver]] tables alone"),
        ("waiver = 3\n", "expected [[waiver]] tables alone"),
        ("waiver = [3]\n", "expected a table"),
        ("not toml", "cannot be read"),
    ],
)
def test_a_waiver_file_that_says_too_little_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "waivers.toml"
    file.write_text(text)
    with pytest.raises(OptionError, match=r"waiver file .*waivers\.toml") as refused:
        read_waivers(file)
    assert words in str(refused.value)


def test_filters_choose_and_a_filter_that_matches_nothing_is_refused() -> None:
    cases = ["odd sizes", "ragged rows"]
    done = every(backends="reference", ops=["linea?", "add"], dtypes=["bf16"], cases=cases, timed=False)
    assert {check.dtype for check in done.checks} == {"bf16"}
    assert {(check.op, check.case) for check in done.checks} == {("linear", "odd sizes"), ("add", "ragged rows")}
    with pytest.raises(OptionError, match=r"no op here matches .linaer. .did you mean .linear"):
        every(backends="reference", ops="linaer")
    with pytest.raises(OptionError, match="no case here matches 'nowhere'"):
        every(backends="reference", ops="add", cases="nowhere")


def test_another_seed_draws_other_inputs() -> None:
    one, same, other = (every(backends="reference", ops="linear", seed=s, timed=False) for s in (1, 1, 2))
    assert one == same
    assert [check.max_abs for check in one.checks] != [check.max_abs for check in other.checks]


def test_a_backend_that_cannot_run_is_named_or_refused(planted: Backend) -> None:
    away = replace(planted, name="away", unavailable=lambda: "there is no such machine")
    with registered(away):
        done = every(ops="add", dtypes="f32", timed=False)
        assert done.missing["away"] == "there is no such machine"
        assert "not here: away: there is no such machine" in str(done)
        with pytest.raises(BackendError, match="'away' cannot run here: there is no such machine"):
            every(backends="away")


def test_a_refusal_is_no_pass_and_keeps_its_reason() -> None:
    reference = load_backend("reference")
    picky = replace(
        reference,
        name="picky",
        kernels=tuple(
            replace(k, refuses=lambda call: "takes no call") if k.op == "add" else k for k in reference.kernels
        ),
    )
    done = every(backends=[picky], ops="add", timed=False)
    assert {(check.verdict, check.reason) for check in done.checks} == {("refused", "takes no call")}


@pytest.fixture(scope="module")
def plan(stories: Path) -> Plan:
    """A small plan of the bundled target."""
    return plan_model(
        stories,
        capacity=48,
        max_sequences=1,
        decode_rows=4,
        prefill_chunk=16,
        speculate=3,
        draft="ngram",
        dtype="float32",
        backend="reference",
    )


def test_a_plans_own_calls_are_validated(plan: Plan) -> None:
    done = every(plan, timed=False)
    assert done.passed, str(done)
    distinct = {(node.op, node.selection.kernel) for p in plan.programs for node in p.graph.nodes if node.selection}
    assert {(check.op, f"{check.backend}:{check.kernel}") for check in done.checks} == distinct
    assert {check.case.partition(" call ")[0] for check in done.checks} <= {program.name for program in plan.programs}


@pytest.mark.parametrize("weights", ["int8", "int4_zp"])
def test_quantised_calls_of_a_plan_are_validated(stories: Path, weights: str) -> None:
    small = {"capacity": 48, "max_sequences": 1, "decode_rows": 2, "prefill_chunk": 16, "speculate": 0}
    plan = plan_model(stories, dtype="float32", backend="reference", weights=weights, **small)
    done = every(plan, ops="linear*_q", timed=False)
    assert done.passed, str(done)
    assert {check.op for check in done.checks} >= {"linear_q", "linear_qkv_q", "linear_gated_q"}


def test_a_plans_calls_find_a_bug_that_no_case_has(plan: Plan) -> None:
    def spoil(inputs: tuple[torch.Tensor | None, ...], outputs: tuple[torch.Tensor, ...]) -> None:
        if outputs[0].shape == (4, 192):  # a bucket of this plan, which no case has
            outputs[0][-1, -1] += 1

    with registered(spoiled("narrow", "add_rms_norm", spoil)) as narrow:
        cases = every(backends=[narrow], ops="add_rms_norm", dtypes="f32", timed=False)
        of_plan = every(plan, backends=[narrow], ops="add_rms_norm", timed=False)
    assert cases.passed
    assert not of_plan.passed


def test_the_command_prints_a_table_and_fails_when_something_is_wrong(run: Run, planted: Backend) -> None:
    done = run("xval", "--backend", "planted", "--op", "add", "--dtype", "f32", "--all")
    assert done.code == 1
    assert "FAILED: add planted:add.whole f32 case" in done.out
    assert "checks of the contracts' cases, seed 0" in done.out
    good = run("xval", "--backend", "reference", "--op", "add", "--every-case", "--no-time", "--all")
    assert good.code == 0
    assert re.fullmatch(r"slotwise: \d+ trials, about 1 s\n", good.err)
    assert "ragged rows" in good.out


def test_a_quick_run_has_every_kernel_in_every_dtype_once() -> None:
    done = crossvalidate(backends=["numba_cpu", "reference"], ops=["linear", "add"], timed=False)
    tried = [(c.op, c.backend, c.kernel, c.dtype) for c in done.checks if c.check == "oracle"]
    assert len(tried) == len(set(tried))
    wanted = {
        (op, name, kernel.name, dtype)
        for op in ("linear", "add")
        for name in ("numba_cpu", "reference")
        for kernel in load_backend(name).kernels_for(op)
        for dtype in ("f32", "bf16", "f16")
    }
    assert set(tried) == wanted
    cases = {op: len(cases_of(contracts()[op])) for op in ("linear", "add")}
    assert done.left_out == sum(cases[op] - 1 for op, *_ in tried)


def test_a_quick_run_chooses_by_the_seed_alone_and_backends_meet_on_one_case() -> None:
    def cases(seed: int) -> dict[str, set[str]]:
        done = crossvalidate(backends=["reference", "numba_cpu"], ops="rms_norm", seed=seed, timed=False)
        assert done.agreements
        return {check.dtype: {c.case for c in done.checks if c.dtype == check.dtype} for check in done.checks}

    assert all(len(names) == 1 for names in cases(0).values())
    assert cases(0) == cases(0)
    assert len({str(cases(seed)) for seed in range(4)}) > 1


def test_a_quick_run_takes_a_case_that_a_kernel_does_not_refuse() -> None:
    added = cases_of(contracts()["add"])
    names, rows = [case.name for case in added], [len(case.inputs[0]) for case in added if case.inputs[0] is not None]

    def refuses(call: CallSpec) -> str | None:
        return None if call.rows == max(rows) else "takes the largest alone"

    kernels = tuple(replace(k, refuses=refuses) if k.op == "add" else k for k in load_backend("reference").kernels)
    large = replace(load_backend("reference"), name="large", kernels=kernels)
    done = crossvalidate(backends=[large], ops="add", dtypes="f32", timed=False)
    assert {check.verdict for check in done.checks} == {"ok"}
    assert {check.case for check in done.checks} < set(names)


def test_the_command_says_first_how_much_there_is_and_samples_unless_told(run: Run) -> None:
    quick = run("xval", "--backend", "reference", "--op", "add", "--no-time")
    assert re.match(r"slotwise: 3 trials of \d+ \(a sample: every kernel and dtype once\), about 1 s\n", quick.err)
    assert "more trials with --all" in quick.out
    assert run("xval", "--backend", "reference", "--op", "add", "--no-time", "--quick").out == quick.out
    named = run("xval", "--backend", "reference", "--op", "add", "--no-time", "--case", "ragged rows")
    assert "more trials" not in named.out
    assert "leave it out with --plan and --case" in run("xval", "--quick", "--case", "x").err


def test_progress_is_lines_off_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with progress.lines() as report:
        for done in range(1, 4):
            report("validating", done, 3)
    shown = capsys.readouterr().err.splitlines()
    assert [line.partition(" after")[0] for line in shown] == [f"slotwise: validating: {n} of 3" for n in (1, 2, 3)]
    monkeypatch.setattr(progress, "LINE_EVERY", 60.0)
    with progress.lines() as report:
        report("validating", 1, 3)
    assert capsys.readouterr().err == ""


def test_the_command_prints_json_and_writes_a_page(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run("xval", "--backend", "reference", "--op", "add", "--json", "--html", page)
    data = json.loads(done.out)
    assert (data["slotwise_xval"], data["passed"]) == (1, True)
    assert {"max_abs", "max_rel", "ulps", "cosine", "seconds", "verdict"} <= data["checks"][0].keys()
    text = page.read_text(encoding="utf-8")
    inside = text.partition('id="data">')[2].partition("</script>")[0]
    assert len(json.loads(inside)["checks"]) == len(data["checks"])
    assert not any(word in text for word in ("http://", "https://", "src=", "@import", "url("))


def test_the_command_says_what_is_wrong_with_its_options(run: Run, tmp_path: Path) -> None:
    assert "no such" not in run("xval", "--help").out
    done = run("xval", "--backend", "refrence")
    assert (done.code, "did you mean 'reference'" in done.err) == (1, True)
    assert "cannot be read" in run("xval", "--plan", tmp_path / "none.json").err
    assert "cannot be written" in run("xval", "--op", "add", "--html", tmp_path / "no" / "x.html").err
