"""The room's own rules: a block neither run nor marked, a mark without a reason, another output are all found."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from .pages import Block, PageError, read_page, spans
from .parsing import refusal
from .printed import difference, same
from .running import Runner, furnish
from .test_pages import try_block, understood


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(furnish(tmp_path / "folder"))


def block(text: str) -> Block:
    (found,) = read_page("page.md", text)
    return found


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("```text\na diagram\n```\n", "neither printed by anything nor marked"),
        ("<!-- not run: a diagram -->\n```text\nslotwise doctor\n```\n", "it holds a command"),
        ("<!-- not run: a sketch -->\n```python\nx = 1\n```\n", "and it runs"),
        ("<!-- not run: needs a network -->\n```sh\nslotwise --version\n```\n", "ran without a network"),
        ("<!-- not run: installs something -->\n```sh\nslotwise --version\n```\n", "it installs nothing"),
        ("<!-- not run: takes an hour -->\n```sh\nslotwise doctor\n```\n", "give it a reduced form"),
        ("<!-- not run: dull -->\n```sh\nslotwise doctor\n```\n", "is none of the reasons"),
        ("```sh\nslotwise doctor --loud\n```\n", "has no option --loud"),
        ("<!-- run `slotwise xval` as `slotwise --version`: long -->\n```sh\nslotwise xval --bad\n```\n", "--bad"),
        ("```sh\nslotwise plan show nowhere\n```\n", "exit code 1"),
        ("```sh\nfalse\n```\n", "exit code 1"),
        ("```console\n$ slotwise --version\nslotwise 9.9\n```\n", "shown and not printed"),
        ("```console\n$ slotwise --version\n```\n", "printed and not shown"),
        ("<!-- printed by `slotwise --version` -->\n```text\nslotwise 9.9\n```\n", "shown and not printed"),
        ("```python\nprint(undefined)\n```\n", "NameError"),
        ("```toml\nx = 1\n```\n", "is a file of the page's folder"),
    ],
)
def test_a_block_that_does_not_hold_is_found(page: str, complaint: str, runner: Runner) -> None:
    with pytest.raises(AssertionError, match=complaint):
        try_block(block(page), runner)


@pytest.mark.parametrize(
    ("page", "complaint"),
    [
        ("<!-- not run -->\n```sh\nslotwise\n```\n", "lacks its reason"),
        ("<!-- run `a` as `b` -->\n```sh\na\n```\n", "lacks its reason"),
        ("<!-- to do -->\n", "is none of the marks"),
        ("<!-- not run: needs a GPU -->\nwords\n", "stands before no block"),
        ("<!-- not run: needs a GPU -->\n", "stands before no block"),
        ("```sh\nslotwise\n", "never ends"),
        ("<!-- not run: needs\n", "never ends"),
    ],
)
def test_a_page_that_cannot_be_read_is_refused(page: str, complaint: str) -> None:
    with pytest.raises(PageError, match=complaint):
        read_page("page.md", page)


def test_a_mark_for_a_command_that_is_not_there_is_refused() -> None:
    with pytest.raises(PageError, match="no command of the block begins so"):
        block("<!-- not run `slotwise tune`: needs a GPU -->\n```sh\nslotwise doctor\n```\n").commands()


def test_blocks_of_a_page_share_names_folder_and_what_was_printed(runner: Runner) -> None:
    page = (
        "```python\nimport pathlib\n\nname = 'a.txt'\n```\n"
        "```python\npathlib.Path(name).write_text('b\\n')\nprint('seen', name)\n```\n"
        "<!-- printed -->\n```text\nseen a.txt\n```\n"
        "<!-- where FILE is a.txt -->\n```console\n$ python -c \"print(open('FILE').read(), end='')\"\nb\n```\n"
    )
    for each in read_page("page.md", page):
        try_block(each, runner)


def test_a_reduced_form_runs_in_the_place_of_what_is_shown() -> None:
    marks = "<!-- where MODEL is a b -->\n<!-- run `slotwise xval` as `slotwise xval --op add`: minutes -->\n"
    first, second = block(f"{marks}```sh\nslotwise xval    # all\nslotwise plan \\\n  show MODEL\n```\n").commands()
    assert first.words == ["slotwise", "xval", "--op", "add"]
    assert second.words == ["slotwise", "plan", "show", "a", "b"]


def test_commands_in_sentences_are_found_and_blocks_and_comments_are_not() -> None:
    text = "One `slotwise\ndoctor`.\n<!-- `no` -->\n```sh\n`no`\n```\n`b`, ``c ` d``\n"
    assert spans(text) == [(1, "slotwise doctor"), (7, "b")]


@pytest.mark.parametrize(
    "command",
    [
        "slotwise generate MODEL --prompt TEXT --ledger",
        "slotwise plan show",
        "slotwise COMMAND --help",
        "slotwise generate MODEL --threads N",
        "slotwise plan diff MODEL --against --speculate 0",
        "python benchmarks/drafting.py --repeats 7",
        "DEBUG=2 slotwise doctor",
    ],
)
def test_a_command_named_with_what_it_has_is_understood(command: str) -> None:
    assert understood(command) == ""


@pytest.mark.parametrize(
    "command",
    [
        "slotwise generat MODEL",
        "slotwise plan show --nonsense",
        "slotwise generate MODEL --thread 1",
        "slotwise generate MODEL --threads x",
        "slotwise plan diff MODEL --against --spec 0",
        "python benchmarks/drafting.py --repeat 7",
        "python benchmarks/drafting.py --repeats x",
        "python benchmarks/no.py",
    ],
)
def test_a_command_named_with_what_it_lacks_is_not(command: str) -> None:
    assert refusal(command.split()) != ""


@given(st.text(st.characters(codec="ascii", exclude_characters="\r\n"), max_size=60))
def test_every_line_is_the_same_as_itself(line: str) -> None:
    assert same(line, line)


@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_whole_numbers_are_held_exactly(shown: int, given: int) -> None:
    assert same(f"reserved {shown}, released 3", f"reserved {given}, released 3") == (shown == given)
    assert same(f"target[{shown}..9)", f"target[{given}..9)") == (shown == given)


@pytest.mark.parametrize(
    ("shown", "given", "expected"),
    [
        ("took 3.4 ms", "took 12 s", True),
        ("took 3.4 ms", "took 3.4 GB/s", False),
        ("linear   84   3.4 ms    2%", "linear  84  400 us  13%", True),
        ("linear   84   3.4 ms    2%", "linear  85  400 us  13%", False),
        ("off by 0.0947", "off by 0.0946", True),
        ("off by 0.0947", "off by 0.0847", False),
        ("last 2.24e-03", "last 2.23e-03", True),
        ("seed 7", "seed 8", False),
        ("seed 123456789", "seed 987654321", True),
        ("a  b", "a b", True),
        ("  a", "a", False),
        ("slotwise 0.1.0", "slotwise 0.2.0", False),
    ],
)
def test_what_is_measured_stands_apart_and_nothing_else_does(shown: str, given: str, expected: bool) -> None:
    assert same(shown, given) is expected


def test_lines_left_out_are_any_lines_and_an_excerpt_lies_anywhere() -> None:
    given = ["a 1", "b", "a 1", "c"]
    assert difference(["a 1", "...", "c"], given) == ""
    assert difference(["a 1", "c"], given) == "shown and not printed there: 'c'"
    assert difference(["a 1", "b"], given) == "printed and not shown: 'a 1'"
    assert difference(["...", "d"], given) == "shown and not printed there: 'd'"
    assert difference(["a 1", "c"], given, excerpt=True) == ""
    assert difference(["b", "c"], given, excerpt=True) != ""
    assert difference(["b", "..."], ["a", "b"], excerpt=True) == ""
