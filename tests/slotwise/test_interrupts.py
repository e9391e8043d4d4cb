"""Ctrl-C on the command line ends cleanly whenever it comes: exit code 130, one line, no traceback.

Each test has the process interrupt itself at a named moment, so that none depends on time. What comes while a request
runs is in `test_cli_generate.py` and `test_streams_and_turns.py`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .commands import Run

START = """
import os, signal, sys

def interrupt():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10**6):  # where Python looks for signals
            pass
    except BaseException:
        pass  # as whoever is imported may do with an exception that it did not expect

{moment}
sys.argv = ["slotwise", *{words!r}]
from slotwise.cli import main
sys.exit(main())
"""

WHEN_IMPORTED = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            interrupt()
sys.meta_path.insert(0, Finder())
"""

WHEN_CALLED = """
import {module}
def called(*_, **__):
    interrupt()
    raise SystemExit("the interrupt was swallowed")
{module}.{name} = called
"""

AT_THE_END = """
import atexit
atexit.register(interrupt)
"""


def started(moment: str, *words: object, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    script = START.format(moment=moment, words=[str(word) for word in words])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if cache is not None:
        environment["SLOTWISE_CACHE"] = str(cache)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=240)


def generating(stories: Path) -> tuple[object, ...]:
    quick = ("--max-new-tokens", 4, "--capacity", 32, "--max-sequences", 1, "--prefill-chunk", 16, "--threads", 1)
    return ("generate", stories, "--prompt", "Once", *quick)


@pytest.mark.parametrize(
    "name",
    ["slotwise.cli.generate", "slotwise.llm", "numpy", "torch", "torch._C", "numba", "slotwise.backends.numba_cpu"],
)
def test_while_something_is_imported(stories: Path, name: str) -> None:
    done = started(WHEN_IMPORTED.format(name=name), *generating(stories))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("slotwise.plans.compile", "compile_plan"),
        ("slotwise.engine.executor", "load_weights"),
        ("slotwise.backends.numba_cpu.compiled", "_say_compiling"),
    ],
)
def test_while_a_model_is_read_planned_and_compiled(stories: Path, tmp_path: Path, module: str, name: str) -> None:
    moment = WHEN_CALLED.format(module=module, name=name)
    done = started(moment, *generating(stories), cache=tmp_path / "cache")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_while_a_command_without_a_model_works(stories: Path) -> None:
    done = started(WHEN_CALLED.format(module="slotwise.plans.compile", name="compile_plan"), "plan", "show", stories)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")


def test_while_the_process_ends(stories: Path) -> None:
    done = started(AT_THE_END, *generating(stories))
    assert (done.returncode, done.stderr) == (130, "\ninterrupted\n")
    assert done.stdout.startswith("Once")


def test_who_has_it_ignored_is_left_alone(stories: Path) -> None:
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    done = started(ignored + WHEN_IMPORTED.format(name="torch"), *generating(stories))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_that_is_called_from_python_leaves_signals_alone(run: Run) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run("--version").code == 0
    assert run("generate", "nowhere", "--prompt", "x").code == 1
    assert signal.getsignal(signal.SIGINT) is before
