"""Every block of every page is run, and prints what the page shows; what cannot run says why, and truly cannot.

CONTRIBUTING.md, "Documentation that runs", says how a block is marked. What each reason for not running must stand up
to is in `REASONS`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .pages import Block, Command, page_names, read_page, spans, text_of
from .parsing import refusal
from .printed import difference
from .running import Runner, furnish

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGES = page_names()
LANGUAGES = ("sh", "console", "python", "toml", "text")
PROGRAMS = re.compile(r"^(\$ |slotwise |python |pip |make |scripts/|\.venv/|git )", re.MULTILINE)
INSTALLS = re.compile(r"^(make (demo|test|quick)|scripts/(demo|test)\.sh|(\w+=\S+ )*pip install)\b")


def without_gpu(command: Command, runner: Runner) -> str:
    """A command that needs a GPU is refused on a machine without, and runs on one with."""
    if torch.cuda.is_available():
        ran = runner.command(command.words)
        return f"there is a GPU here, and it failed:\n{ran.printed}" if ran.failed else ""
    ran = runner.command(command.words)
    return "" if ran.code != 0 and "GPU" in ran.printed else f"it ran without a GPU:\n{ran.printed}"


def without_network(command: Command, runner: Runner) -> str:
    """A command that fetches something is refused without a network."""
    ran = runner.command(command.words)
    return "" if ran.code != 0 else f"it ran without a network:\n{ran.printed}"


def installs(command: Command, runner: Runner) -> str:
    """A command that would change this very environment; each of these is what ran these tests, or runs in them."""
    return "" if INSTALLS.match(command.shown) else "it installs nothing into the environment"


def takes_long(command: Command, runner: Runner) -> str:
    """Only measurements may say that they take long; `slotwise` commands have a reduced form (`run as`)."""
    return "" if re.match(r"(\.venv/bin/)?python (benchmarks|scripts)/", command.shown) else "give it a reduced form"


REASONS: dict[str, Callable[[Command, Runner], str]] = {
    "needs a GPU": without_gpu,
    "needs a network": without_network,
    "installs": installs,
    "takes": takes_long,
}
"""How a reason begins -> what tries it: gives what is wrong with it, or nothing."""


def excuse(command: Command, runner: Runner) -> str:
    """What is wrong with a command's reason for not being run; empty when it stands."""
    for start, tries in REASONS.items():
        if command.left_out.startswith(start):
            return tries(command, runner)
    return f"{command.left_out!r} is none of the reasons {', '.join(REASONS)}"


def understood(line: str) -> str:
    """What is wrong with a command line by its parser, whether it is run or not."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0].endswith("/python"):
        words = ["python", *words[1:]]
    if words[0] == "slotwise" or (words[0] == "python" and words[1].endswith(".py")):
        return refusal(words[: words.index(">")] if ">" in words else words)
    return ""


def try_block(block: Block, runner: Runner) -> None:
    """Run a block, or see that it rightly is not run."""
    if block.language in ("sh", "console"):
        for command in block.commands():
            for line in (command.shown, command.tried):
                assert understood(line) == "", f"{block}: {line}"
            if command.left_out:
                assert excuse(command, runner) == "", f"{block}: {command.shown}"
                continue
            ran = runner.command(command.words)
            assert not ran.failed, f"{block}: {command.tried}\nexit code {ran.code}\n{ran.printed}"
            if block.language == "console":
                assert difference(command.output, ran.lines) == "", f"{block}: {command.tried}\n{ran.printed}"
    elif block.language == "python":
        ran = runner.python(block.text)
        if block.left_out:
            assert ran.code, f"{block}: marked as not run ({block.left_out}), and it runs"
        else:
            assert ran.code == 0, f"{block}:\n{ran.printed}"
    elif block.language == "toml":
        assert tomllib.loads(block.text)
        mark = block.mark("file")
        assert mark, f"{block}: a TOML block is a file of the page's folder, for a command to read: <!-- file: NAME -->"
        (runner.folder / str(mark.parts["name"])).write_text(block.text, encoding="utf-8")
    else:
        try_text(block, runner)


def try_text(block: Block, runner: Runner) -> None:
    """A block of text is what was printed, or no command."""
    printed = block.mark("printed")
    if printed:
        if printed.parts["command"]:
            ran = runner.command(Command("", str(printed.parts["command"])).words)
            assert not ran.failed, f"{block}: {ran.printed}"
        shown = block.text.splitlines()
        assert difference(shown, runner.printed, excerpt=True) == "", f"{block}\n" + "\n".join(runner.printed)
        return
    assert block.left_out, f"{block}: neither printed by anything nor marked: <!-- not run: REASON -->"
    assert not PROGRAMS.search(block.text), f"{block}: marked as {block.left_out!r}, and it holds a command"


@pytest.mark.parametrize("page", [page for page in PAGES if read_page(page, text_of(page))])
def test_every_block_of_a_page_runs_and_prints_what_is_shown(page: str, tmp_path: Path) -> None:
    runner = Runner(furnish(tmp_path / "folder"))
    for block in read_page(page, text_of(page)):
        assert block.language in LANGUAGES, f"{block}: {block.language!r} is none of {', '.join(LANGUAGES)}"
        try_block(block, runner)


@pytest.mark.parametrize("page", PAGES)
def test_a_command_named_in_a_sentence_has_the_options_that_it_names(page: str) -> None:
    for line, span in spans(text_of(page)):
        if re.match(r"(DEBUG=\d )?(slotwise|python (benchmarks|scripts|examples)/\S+\.py)( |$)", span):
            assert understood(span.replace(" ...", "")) == "", f"{page}:{line}: {span}"
