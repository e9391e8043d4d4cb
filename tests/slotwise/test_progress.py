"""Progress bars: on a terminal, for work that takes a moment, gone when it ends; never in a pipe."""

from __future__ import annotations

import io
import os
import pty
import sys
from pathlib import Path

import pytest

from slotwise import LLM, Sampling, progress
from slotwise.progress import Bars, progress_for

from .commands import start


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal_for(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make the error stream a terminal. (No fixture: pytest sets its own streams between setup and call.)"""
    fake = Terminal()
    monkeypatch.setattr(sys, "stderr", fake)
    monkeypatch.setenv("TERM", "xterm")
    return fake


def left_on_screen(written: str) -> str:
    """What remains to be seen: all after the last erased line, without cursor controls."""
    return written.rpartition("\x1b[2K")[2].replace("\x1b[?25h", "").replace("\r", "")


def work(wanted: bool | None) -> None:
    with progress_for(wanted) as report:
        for done in range(1, 4):
            if report is not None:
                report("loading", done, 3)


def test_long_work_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    work(None)
    assert "loading" in terminal.getvalue()
    assert left_on_screen(terminal.getvalue()) == ""


def test_quick_work_leaves_the_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    work(None)
    assert terminal.getvalue() == ""


def test_a_pipe_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    work(None)
    assert pipe.getvalue() == ""


def test_bars_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    work(False)
    assert terminal.getvalue() == ""


def test_bars_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_for(True) as report:
        assert report is not None


def test_loading_and_prompts_are_reported(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal_for(monkeypatch)
    seen: dict[str, list[tuple[int, int]]] = {}
    monkeypatch.setattr(Bars, "report", lambda self, what, done, total: seen.setdefault(what, []).append((done, total)))
    llm = LLM(random_checkpoint, prefill_chunk=8, max_sequences=1, threads=1)
    for what in ("loading target", "binding kernels"):
        done, total = seen[what][-1]
        assert done == total
    next(llm.stream([1] * 30, Sampling(max_new_tokens=2)))
    assert seen["reading the prompt"][:3] == [(8, 30), (16, 30), (24, 30)]


def test_a_terminal_sees_the_prompt_and_the_text_and_no_bar_remains(stories: Path) -> None:
    ours, theirs = pty.openpty()
    words = ("--max-new-tokens", 6, "--capacity", 64, "--max-sequences", 1, "--threads", 1)
    process = start("generate", stories, "--prompt", "Once upon a time", *words, terminal=theirs)
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    shown = left_on_screen(seen.decode())
    assert shown.startswith("Once upon a time,")
    assert shown.count("\n") == 1
