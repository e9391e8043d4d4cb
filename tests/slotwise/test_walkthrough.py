"""The commands of docs/debugging.md do what that page shows: every one is run, and its output compared.

Numbers are not compared, since last bits and times differ between machines; words are. A line `...` stands for any
lines.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "debugging.md"
NUMBER = re.compile(r"[-+]?\d[\d.,]*(?:e[-+]?\d+)?%?")


@dataclass(frozen=True)
class Shown:
    """A command of the page and the output that it shows."""

    command: str
    output: tuple[str, ...]


def _shown() -> list[Shown]:
    """Every `$ command` of the page's console blocks, in order; a line that ends with a backslash goes on."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.replace("\\\n", " ").partition("\n")
            found.append(Shown(command, tuple(output.splitlines())))
    return found


def _words(line: str) -> str:
    return " ".join(NUMBER.sub("N", line).split())


def _follows(shown: tuple[str, ...], given: list[str]) -> str:
    """Which shown line is not in the output, in order; empty when all are."""
    at, skip = 0, False
    lines = [_words(line) for line in given]
    for line in shown:
        if line.strip() == "...":
            skip = True
            continue
        wanted = _words(line)
        place = next((i for i in range(at, len(lines)) if lines[i] == wanted), None) if skip else at
        if place is None or place >= len(lines) or lines[place] != wanted:
            return line
        at, skip = place + 1, False
    return ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: a folder with the examples in it, as a checkout has."""
    made = tmp_path_factory.mktemp("walkthrough")
    (made / "examples").symlink_to(REPOSITORY / "examples")
    return made


def test_every_command_of_the_page_gives_the_output_that_it_shows(folder: Path) -> None:
    shown = _shown()
    assert len(shown) >= 6
    for each in shown:
        words = shlex.split(each.command)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "160"}
        while "=" in words[0]:
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        assert words[0] in ("python", "slotwise"), each.command
        start = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "slotwise"]
        done = subprocess.run(
            [*start, *words[1:]], cwd=folder, capture_output=True, text=True, env=environment, check=False
        )
        assert "Traceback" not in done.stderr, done.stderr
        given = (done.stdout + done.stderr).splitlines()
        assert _follows(each.output, given) == "", f"$ {each.command}\n" + "\n".join(given)


def test_a_page_that_shows_something_else_would_be_found() -> None:
    given = ["a 1", "b 2.5e-3", "c"]
    assert _follows(("a 9", "...", "c"), given) == ""
    assert _follows(("a 1", "c"), given) == "c"
    assert _follows(("...", "d"), given) == "d"
    assert _follows(("a", "..."), given) == "a"
