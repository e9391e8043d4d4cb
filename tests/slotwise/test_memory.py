"""Memory that is given: plans are made within it, or refused before a byte of weights is read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, OptionError, PlanError
from slotwise.inspect.fit import fit_json, fit_table
from slotwise.models.checkpoint import Checkpoint
from slotwise.planning import open_models, plan_model, subject_of
from slotwise.plans.fit import Row
from slotwise.plans.memory import Budget, need_of
from slotwise.plans.options import WEIGHTS

from .commands import Run

SMALL: dict[str, Any] = {"max_sequences": 2, "prefill_chunk": 16, "decode_rows": 8, "backend": "reference"}
WORDS = ("--max-sequences", 2, "--prefill-chunk", 16, "--decode-rows", 8, "--backend", "reference")


def _bytes_of(folder: Path, capacity: int, **changes: Any) -> int:
    return need_of(plan_model(folder, capacity=capacity, **{**SMALL, **changes})).peak


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose tensors must not be touched."""

    def refuse(checkpoint: Checkpoint, name: str) -> None:
        raise AssertionError(f"tensor {name} was read")

    monkeypatch.setattr(Checkpoint, "tensor", refuse)


def test_a_model_is_planned_within_the_memory_given(stories: Path) -> None:
    enough = _bytes_of(stories, 128)
    with LLM(stories, memory=enough, threads=1, **SMALL) as llm:
        assert llm.plan().options.capacity == 128
        assert need_of(llm.plan()).peak <= enough < _bytes_of(stories, 144)
        assert llm.generate("Once upon a time").token_ids
        assert llm.plan(max_sequences=1).options.capacity > 128
    assert plan_model(stories, memory="1GiB", **SMALL).options.capacity == 512, "the model's own maximum"


def test_a_capacity_is_kept_and_the_pool_made_to_fit(stories: Path) -> None:
    enough = _bytes_of(stories, 512, pages=40)
    plan = plan_model(stories, memory=enough, capacity=512, **SMALL)
    assert (plan.options.capacity, plan.options.pages) == (512, 40)
    both = plan_model(stories, memory=enough, pages=40, **SMALL)
    assert (both.options.capacity, both.options.pages) == (512, 40)


@pytest.mark.usefixtures("unread")
def test_what_does_not_fit_is_refused_before_a_weight_is_read_and_what_does_is_named(stories: Path) -> None:
    memory = _bytes_of(stories, 320)
    with pytest.raises(PlanError) as caught:
        LLM(stories, memory=memory, capacity=512, pages=64, threads=1, **SMALL)
    said = str(caught.value)
    assert f"memory is {memory / 2**20:.1f} MiB ({memory} bytes)" in said
    capacity = re.search(r"what fits: capacity=(\d+) ", said)
    assert capacity is not None
    assert int(capacity[1]) == 320
    for other in ("pages=", "max_sequences=1 ", "weights='int4' "):
        assert other in said


@pytest.mark.usefixtures("unread")
def test_what_this_machine_lacks_is_refused_so_whatever_is_given(
    stories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = Budget(_bytes_of(stories, 64), "this machine has")
    monkeypatch.setattr(Budget, "here", lambda device: present)
    with pytest.raises(PlanError, match=r"this machine has .* what fits: capacity=64 "):
        LLM(stories, capacity=512, threads=1, **SMALL)
    with pytest.raises(AssertionError, match="was read"):  # planned within what there is, it goes on to load
        LLM(stories, memory="1TiB", threads=1, **SMALL)


def test_memory_beside_a_saved_plan_is_checked_and_changes_nothing(stories: Path, run: Run, tmp_path: Path) -> None:
    plan, file = plan_model(stories, capacity=64, **SMALL), tmp_path / "plan.json"
    plan.save(file)
    need = need_of(plan).peak
    with LLM(stories, plan=file, memory=need, threads=1) as llm:
        assert llm.plan() == plan
    with pytest.raises(PlanError, match=rf"memory is .* \({need - 1} bytes\).* what fits: capacity=48 "):
        LLM(stories, plan=file, memory=need - 1, threads=1)
    assert run("plan", "verify", file, "--memory", need).code == 0
    refused = run("plan", "verify", file, "--memory", need - 1)
    assert (refused.code, refused.out) == (1, "")
    assert f"({need - 1} bytes)" in refused.err


@pytest.mark.parametrize("memory", ["24gib", "much", 0, -1, 2.5, True])
def test_a_size_that_is_none_is_named(stories: Path, memory: Any) -> None:
    for plan in (lambda: LLM(stories, memory=memory), lambda: plan_model(stories, memory=memory)):
        with pytest.raises(OptionError, match=r"^memory .*" + re.escape(repr(memory).strip("'"))):
            plan()


@pytest.mark.usefixtures("unread")
def test_the_command_shows_every_form_of_weights_from_headers_alone(stories: Path, run: Run) -> None:
    memory = _bytes_of(stories, 128)
    done = run("plan", "fit", stories, "--memory", memory, *WORDS)
    assert (done.code, done.err) == (0, "")
    found = json.loads(run("plan", "fit", stories, "--memory", memory, "--json", *WORDS).out)
    assert found["memory"] == {"bytes": memory, "of": "memory is"}
    assert [each["format"] for each in found["weights"]] == list(WEIGHTS)
    native, *others = found["weights"]
    assert native["largest_capacity"] == 128
    assert native["bytes"] == memory == sum(part["bytes"] for part in native["parts"]) + native["loading"]
    assert all(each["fits"] == (each["bytes"] <= memory) == bool(each["largest_capacity"]) for each in others)
    lines = {line[:32].strip(): line.split()[-4:] for line in done.out.splitlines()}
    shown = [each["largest_capacity"] or "none" for each in found["weights"]]
    assert lines["largest capacity that fits"] == list(map(str, shown))
    assert "target weights" in lines
    assert "target states, 6 layers of k, v" in lines
    assert "Not counted" in done.out


def test_the_command_says_whether_a_capacity_fits_for_so_many_sequences(stories: Path, run: Run) -> None:
    memory = _bytes_of(stories, 512, max_sequences=3, pages=70)
    words = ("--memory", memory, *WORDS[2:], "--sequences", 3, "--capacity", 512, "--weights", "native")
    done = run("plan", "fit", stories, *words)
    assert done.code == 1
    lines = {line[:32].strip(): line.split()[-1] for line in done.out.splitlines() if line}
    assert lines["capacity 512 fits"] == "no"
    assert (lines["pages"], lines["pages that fit"]) == ("96", "70")
    (row,) = json.loads(run("plan", "fit", stories, *words, "--json").out)["weights"]
    assert (row["fits"], row["largest_pages"]) == (False, 70)


def test_without_memory_the_command_states_this_machines(stories: Path, run: Run) -> None:
    here = Budget.here("cpu")
    assert here is not None
    done = run("plan", "fit", stories, "--weights", "native", *WORDS)
    assert done.code == 0
    assert done.out.splitlines()[0].endswith(f"this machine has {here.nbytes / 2**30:.2f} GiB")


def test_a_form_that_a_model_cannot_have_says_why(stories: Path) -> None:
    loaded, drafter, options = open_models(stories, None, None, SMALL)
    rows = [
        Row("native", plan_model(stories, capacity=32, **SMALL), True, 32, 4),
        Row("int8", None, refused="odd sizes"),
    ]
    subject, budget = subject_of(loaded, drafter), Budget.given("1GiB")
    lines = fit_table(subject, options, budget, rows).splitlines()
    assert "int8: odd sizes" in lines
    assert {line.split()[-1] for line in lines if line.strip().startswith(("all", "arena", "pages"))} == {"-"}
    assert json.loads(fit_json(subject, options, budget, rows))["weights"][1] == {
        "format": "int8",
        "largest_capacity": None,
        "refused": "odd sizes",
    }


def test_a_wrong_size_on_the_command_line_is_wrong_use(stories: Path, run: Run) -> None:
    done = run("plan", "fit", stories, "--memory", "24gib")
    assert (done.code, done.out) == (2, "")
    assert "did you mean 'GiB'" in done.err
