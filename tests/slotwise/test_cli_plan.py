"""What `slotwise plan` promises: plans shown, saved, compared and checked, from files and from folders alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slotwise import Plan
from slotwise.plans.compile import pass_names
from slotwise.plans.record import SCHEMA

from .commands import Run

SMALL = ("--capacity", 64, "--max-sequences", 1, "--prefill-chunk", 16)


@pytest.fixture(scope="module")
def saved(stories: Path, stories_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan file of the bundled pair."""
    from slotwise.planning import plan_model

    path = tmp_path_factory.mktemp("plans") / "plan.json"
    plan_model(stories, draft=stories_draft, capacity=64, max_sequences=1, prefill_chunk=16).save(path)
    return path


def test_show_prints_a_folders_plan(run: Run, stories: Path, stories_draft: Path, saved: Path) -> None:
    done = run("plan", "show", stories, "--draft", stories_draft, *SMALL)
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{Plan.load(saved)}\n"
    for word in ("plan for stories: drafter model", "step decode", "%1 = draft", "programs", "arena"):
        assert word in done.out


def test_show_saves_what_load_reads(run: Run, stories: Path, stories_draft: Path, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.json"
    done = run("plan", "show", stories, "--draft", stories_draft, *SMALL, "--save", path)
    assert done.err == f"saved to {path}\n"
    assert path.read_bytes() == saved.read_bytes()
    assert run("plan", "show", path).out == done.out


def test_show_prints_json(run: Run, saved: Path) -> None:
    done = run("plan", "show", saved, "--json")
    assert done.out == saved.read_text()
    assert json.loads(done.out)["slotwise_plan"] == SCHEMA


def test_show_prints_every_call(run: Run, saved: Path) -> None:
    brief, whole = run("plan", "show", saved), run("plan", "show", saved, "--programs")
    assert whole.out.startswith(brief.out.rstrip("\n"))
    assert whole.out.count("\nprogram ") == len(Plan.load(saved).programs)


def test_show_prints_one_program_and_why_its_kernels(run: Run, saved: Path) -> None:
    done = run("plan", "show", saved, "--program", "draft.decode.1")
    assert done.out.startswith("program draft.decode.1: arena ")
    assert "attention" in done.out
    wrong = run("plan", "show", saved, "--program", "draft.decod.1")
    assert wrong.code == 2
    assert "no such program (did you mean 'draft.decode.1'?); there are target.decode.1" in wrong.err


@pytest.mark.parametrize("name", pass_names())
def test_show_prints_the_graph_after_any_pass(run: Run, stories: Path, name: str) -> None:
    done = run("plan", "show", stories, *SMALL, "--print-after", name)
    assert done.code == 0
    assert done.out.startswith(f"after {name}, target")
    assert "linear" in done.out
    assert "plan for" not in done.out


def test_diff_is_silent_and_0_for_equal_plans(run: Run, stories: Path, stories_draft: Path, saved: Path) -> None:
    done = run("plan", "diff", saved, saved)
    assert (done.code, done.out, done.err) == (0, "", "the plans are equal\n")


def test_diff_names_differences_and_exits_with_1(run: Run, stories: Path, stories_draft: Path) -> None:
    done = run("plan", "diff", stories, "--draft", stories_draft, *SMALL, "--against", "--speculate", 0)
    assert done.code == 1
    assert "drafter: model -> none" in done.out
    assert "speculate: 5 -> 0" in done.out
    other = run("plan", "diff", stories, stories_draft, *SMALL)
    assert other.code == 1
    assert "target: stories -> stories-draft" in other.out


def test_options_after_against_change_the_second_plan_alone(run: Run, stories: Path) -> None:
    words = ("--page-size", 8, "--against", "--capacity", 64, "--page-size", 4)
    done = run("plan", "diff", stories, *SMALL, *words)
    assert "page_size: 8 -> 4" in done.out
    assert "\n  capacity:" not in done.out
    wrong = run("plan", "diff", stories, *SMALL, "--against", "--pagesize", 4)
    assert wrong.code == 2
    assert "--pagesize" in wrong.err


def test_verify_says_what_was_checked(run: Run, saved: Path, stories: Path) -> None:
    for source, options in ((saved, ()), (stories, SMALL)):
        done = run("plan", "verify", source, *options)
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith("verified: ")
        assert "steps proved in bounds, backends numba_cpu" in done.out


def broken(saved: Path, how: str) -> str:
    text = saved.read_text()
    return {
        "edited": text.replace('"capacity": 64', '"capacity": 65', 1),
        "cut short": text[: len(text) // 2],
        "newer": text.replace(f'"slotwise_plan": {SCHEMA}', f'"slotwise_plan": {SCHEMA + 1}', 1),
        "older": text.replace(f'"slotwise_plan": {SCHEMA}', f'"slotwise_plan": {SCHEMA - 1}', 1),
        "no plan": '{"model_type": "llama"}',
        "a list": "[1, 2]",
        "empty": "",
    }[how]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("edited", "damaged or was edited"),
        ("cut short", "it is not JSON"),
        ("newer", f"schema {SCHEMA + 1}, this version reads schema {SCHEMA}; update Slotwise"),
        ("older", f"schema {SCHEMA - 1}, this version reads schema {SCHEMA}; compile it again"),
        ("no plan", "'slotwise_plan' is missing; make one with `slotwise plan show --save`"),
        ("a list", "'slotwise_plan' is missing"),
        ("empty", "it is not JSON"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(run: Run, saved: Path, tmp_path: Path, how: str, words: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(broken(saved, how))
    for part in ("verify", "show"):
        done = run("plan", part, path)
        assert (done.code, done.out) == (1, "")
        assert f"plan file {path}: " in done.err
        assert words in done.err


@pytest.mark.parametrize(
    ("code", "words", "fragments"),
    [
        (2, ("show", "{plan}", "--capacity", 9), ("is a plan file, which has its options in it; leave out capacity",)),
        (2, ("show", "{plan}", "--print-after", "schedule"), ("needs a checkpoint folder", "is a finished plan")),
        (
            2,
            ("show", "{model}", "--print-after", "schedul"),
            ("did you mean 'schedule'", "the passes are fuse"),
        ),
        (1, ("show", "nowhere"), ("nowhere does not exist; give a plan file or a checkpoint folder",)),
        (1, ("diff", "{plan}", "nowhere"), ("nowhere does not exist",)),
        (1, ("show", "{plan}", "--save", "/no/such/folder/x"), ("--save /no/such/folder/x: cannot be written",)),
    ],
)
def test_wrong_words_are_explained(
    run: Run, saved: Path, stories: Path, code: int, words: tuple[str, ...], fragments: tuple[str, ...]
) -> None:
    done = run("plan", *(str(word).format(plan=saved, model=stories) for word in words))
    assert done.code == code
    assert done.err.startswith("slotwise plan: error: ")
    for fragment in fragments:
        assert fragment in done.err
