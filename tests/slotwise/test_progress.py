"""Progress bars: on a terminal, for work that takes a moment, gone when it ends. News: a line, anywhere."""

from __future__ import annotations

import io
import logging
import os
import pty
import subprocess
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
    for what in ("loading target", "preparing kernels"):
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


# News

NEWS = """
import logging, sys
{before}
from slotwise.progress import news_for
with news_for({wanted}), news_for({wanted}):
    logging.getLogger("slotwise.backends.any").info("kernels are compiled, and kept in %s", "there")
    logging.getLogger("slotwise.backends.any").debug("nobody asks for this")
    logging.getLogger("another").info("nor for this")
logging.getLogger("slotwise.backends.any").info("too late")
"""


def told(wanted: bool | None, before: str = "") -> str:
    """What a process of its own (pytest has set up logging in this one) writes on its error stream."""
    script = NEWS.format(wanted=wanted, before=before)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("wanted", [None, True])
def test_news_is_one_line_off_a_terminal_too(wanted: bool | None) -> None:
    assert told(wanted) == "slotwise: kernels are compiled, and kept in there\n"


def test_news_can_be_turned_off() -> None:
    assert told(False) == ""


def test_every_command_tells_news() -> None:
    script = """
import logging, sys
from slotwise.cli import doctor, main
doctor.run = lambda parsed: logging.getLogger("slotwise.backends.any").info("kernels are compiled") or 0
sys.argv = ["slotwise", "doctor"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "slotwise: kernels are compiled\n")


def test_news_goes_where_the_program_logs() -> None:
    before = "logging.basicConfig(level=logging.INFO, format='%(levelname)s %(message)s')"
    assert told(None, before).splitlines()[0] == "INFO kernels are compiled, and kept in there"


def test_news_stands_above_the_bar_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    record = logging.makeLogRecord({"msg": "kernels are compiled", "levelno": logging.INFO})
    with progress_for(None) as report:
        assert report is not None
        report("preparing kernels", 1, 9)
        progress._news.emit(record)
    assert "slotwise: kernels are compiled\n" in terminal.getvalue().replace("\x1b[2K", "").replace("\r", "")
    assert left_on_screen(terminal.getvalue()) == ""


@pytest.mark.slow
def test_a_first_start_whose_kernels_cannot_be_kept_says_so_in_one_line(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ("--max-new-tokens", 6, "--capacity", 64, "--max-sequences", 1, "--threads", 1)
    process = start("generate", stories, "--prompt", "Once", *words, cache=tmp_path / "file" / "cache")
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out[:4]) == (0, "Once")
    assert err.startswith("slotwise: kernels are compiled at every start: they cannot be kept in ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_process_that_ends_at_once_leaves_no_bar_and_shows_the_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = terminal_for(monkeypatch)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    with progress_for(None) as report:
        assert report is not None
        report("loading", 1, 3)
        assert terminal.getvalue().rpartition("\x1b[?25")[2].startswith("l")
        progress.end_all()
        assert terminal.getvalue().rpartition("\x1b[?25")[2].startswith("h")
        assert left_on_screen(terminal.getvalue()) == ""
