"""What the DEBUG ladder promises: each level says what the lower ones say and one thing more, on the error stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slotwise.debug import level

MARKS = {
    1: "plan for stories: drafter ngram",
    2: "bandwidth",
    3: "target.decode linear_qkv: reference:linear_qkv.by_row (choice 1 for *)",
    4: "after fuse_projections, target:",
    5: "step 2, ",
}


@pytest.fixture(scope="module")
def outputs(stories: Path) -> dict[int, subprocess.CompletedProcess[str]]:
    """One small generation at each level."""
    words = [sys.executable, "-m", "slotwise", "generate", str(stories), "--prompt", "Once", "--threads", "1"]
    words += ["--backend", "reference", "--capacity", "32", "--max-sequences", "1", "--max-new-tokens", "5"]
    words += ["--draft", "ngram"]
    found = {}
    for number in (0, 2, 5):
        environment = {**os.environ, "DEBUG": str(number), "OMP_NUM_THREADS": "1"}
        found[number] = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return found


def test_each_level_shows_what_the_lower_ones_do_and_one_thing_more(
    outputs: dict[int, subprocess.CompletedProcess[str]],
) -> None:
    for asked, done in outputs.items():
        for number, mark in MARKS.items():
            assert (mark in done.stderr) == (number <= asked), (asked, number)


def test_results_are_not_touched(outputs: dict[int, subprocess.CompletedProcess[str]]) -> None:
    assert len({done.stdout for done in outputs.values()}) == 1
    assert outputs[0].stderr == ""


def test_the_table_of_times_says_how_calls_were_timed(
    outputs: dict[int, subprocess.CompletedProcess[str]], stories: Path
) -> None:
    assert "calls were launched and timed one by one" in outputs[2].stderr
    words = [sys.executable, "-m", "slotwise", "generate", str(stories), "--prompt", "Once", "--threads", "1"]
    words += ["--backend", "numba_cpu", "--capacity", "32", "--max-sequences", "1", "--max-new-tokens", "5"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "DEBUG": "2"}, check=True)
    assert "calls were timed inside the chains that they run in" in done.stderr
    assert "one by one" not in done.stderr
    assert done.stdout == outputs[0].stdout


def test_the_ledger_is_shown_after_every_step(outputs: dict[int, subprocess.CompletedProcess[str]]) -> None:
    text = outputs[5].stderr
    assert text.count("target: pages of 16: free") == text.count(" bound\n") >= 2


@pytest.mark.parametrize(
    ("value", "expected"), [("", 0), ("1", 1), ("5", 5), ("6", 0), ("-1", 0), ("true", 0), ("express:*", 0), ("²", 0)]
)
def test_another_tools_value_is_no_level(monkeypatch: pytest.MonkeyPatch, value: str, expected: int) -> None:
    monkeypatch.setenv("DEBUG", value)
    assert level() == expected
    monkeypatch.delenv("DEBUG")
    assert level() == 0
