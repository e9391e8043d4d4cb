"""Runs a page: its commands and its Python, in order, in a folder that holds what they name.

What always holds: nothing is written into the checkout. `slotwise` commands run in this process through the command
line's own `main`, Python blocks of one page in one namespace, all else (a variable set first, `python FILE`, scripts)
as processes; output and error stream are kept as one text, in order, as a terminal shows them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from slotwise.cli import main

from .pages import REPOSITORY

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", "COLUMNS": "160", "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
"""Set for everything that runs; off the network, so that no page depends on it unseen."""

COMPARING = {"bisect", "diff", "lockstep", "replay", "xval"}
"""Commands that end with 1 when they found a difference."""

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Ran:
    """What came of a command or a block: its exit code, and all that it printed."""

    code: int
    printed: str
    compares: bool = False

    @property
    def lines(self) -> list[str]:
        """What was printed, line by line."""
        return self.printed.splitlines()

    @property
    def failed(self) -> bool:
        """Whether it ended badly. A command that compares ends with 1 when it found a difference: that is a result."""
        wrong = re.search(r"^(slotwise [\w ]*: error: |Traceback )", self.printed, re.MULTILINE)
        return self.code != 0 and not (self.compares and self.code == 1 and wrong is None)


def furnish(folder: Path) -> Path:
    """Fill a page's folder with what pages name: the checkout's folders, a checkpoint with a chat template.

    `benchmarks` is a copy, as its scripts write beside themselves.
    """
    folder.mkdir(exist_ok=True)
    shutil.copytree(REPOSITORY / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "scripts", folder / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("examples", "core", "slots", "proving", "models", "plans", "backends", "engine", "slotwise"):
        (folder / name).symlink_to(REPOSITORY / name)
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "Makefile"):
        shutil.copy(REPOSITORY / name, folder / name)
    talkative = folder / "with-template"
    shutil.copytree(REPOSITORY / "examples" / "models" / "stories", talkative)
    (talkative / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    _installed(folder)
    return folder


def _installed(folder: Path) -> None:
    """Make `scripts/environment.sh` find an installation of this folder: this process's own."""
    binaries = folder / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "slotwise"):
        # No link: a Python knows its environment by the folder that it was started from.
        (binaries / name).write_text(f'#!/bin/sh\nexec "{Path(sys.executable).parent / name}" "$@"\n')
        (binaries / name).chmod(0o755)
    script = "source scripts/environment.sh && fingerprint python"
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    stamp = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    for name in (".installed", ".installed-dev"):
        (folder / ".venv" / name).write_text(stamp.stdout, encoding="utf-8")


@dataclass
class Runner:
    """One page's folder and names; the last thing printed, which an output block is compared with."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: list[str] = field(default_factory=list)

    def command(self, words: list[str]) -> Ran:
        """Run one command line, which may set variables first and send its output to a file."""
        environment, target = dict(ENVIRONMENT), None
        start = self._slotwise if words[0] == "slotwise" else self._process
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environment[name] = value
        if ">" in words:
            at = words.index(">")
            target, words = self.folder / words[at + 1], words[:at]
        ran = replace(start(words, environment), compares=bool(COMPARING.intersection(words)))
        if target:
            target.write_text(ran.printed, encoding="utf-8")
        self.printed = ran.lines
        return ran

    def python(self, source: str) -> Ran:
        """Run a Python block with the names that the page's blocks before it made, from a file, as kernels need one."""
        path = self.folder / f"block{len(list(self.folder.glob('block*.py')))}.py"
        path.write_text(source, encoding="utf-8")
        with self._inside(ENVIRONMENT) as stream:
            try:
                exec(compile(source, path, "exec"), self.names)
                code = 0
            except Exception:
                traceback.print_exc()
                code = 1
        ran = Ran(code, stream.getvalue())
        self.printed = ran.lines
        return ran

    def _slotwise(self, words: list[str], environment: dict[str, str]) -> Ran:
        with self._inside(environment) as stream:
            try:
                code = main(words[1:])
            except SystemExit as error:  # argparse, for --help and wrong use
                code = int(error.code or 0)
        return Ran(code, stream.getvalue())

    def _process(self, words: list[str], environment: dict[str, str]) -> Ran:
        binaries = f"{self.folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            words,
            cwd=self.folder,
            env={**os.environ, **environment, "PATH": binaries, "PYTHON": "python"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Ran(done.returncode, done.stdout)

    @contextlib.contextmanager
    def _inside(self, environment: dict[str, str]) -> Iterator[io.StringIO]:
        stream = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.chdir(self.folder)
            patch.setattr(sys, "stdin", io.StringIO())
            with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
                yield stream
