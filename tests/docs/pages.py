"""The Markdown pages of the repository as blocks, commands and the marks that say how each is tried.

A mark is an HTML comment on lines of its own before a block; a reader of the page does not see it. What always holds:
a mark is one of `MARKS`; whatever stands in other words is a `PageError`, and so is a mark that names nothing in its
block.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

MARKS = {
    "not run": re.compile(r"not run(?: `(?P<command>[^`]+)`)?: (?P<reason>.+)", re.DOTALL),
    "run as": re.compile(r"run `(?P<command>[^`]+)` as `(?P<instead>[^`]+)`: (?P<reason>.+)", re.DOTALL),
    "where": re.compile(r"where (?P<word>[A-Z]+) is (?P<value>.+)"),
    "printed": re.compile(r"printed(?: by `(?P<command>[^`]+)`)?"),
    "file": re.compile(r"file: (?P<name>[\w.]+)"),
}
"""What a mark may say. In "not run" and "run as" the command is named by how it begins."""

COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)


class PageError(Exception):
    """A page holds a block or a mark that this room cannot read; says where and why."""


@dataclass(frozen=True)
class Mark:
    """One comment before a block: which of `MARKS` it is, and its parts."""

    kind: str
    parts: dict[str, str | None]

    @property
    def reason(self) -> str:
        """Why a block is not run, or not as it stands."""
        return " ".join((self.parts.get("reason") or "").split())


@dataclass(frozen=True)
class Command:
    """One command of a block: what is shown, what is tried in its place, why it is not run, and what it prints."""

    shown: str
    tried: str
    left_out: str = ""
    output: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """As a shell would split it, without the comment at its end."""
        return shlex.split(self.tried, comments=True)


@dataclass(frozen=True)
class Block:
    """A fenced block: where it begins, its language, its text without the fences, and its marks."""

    page: str
    line: int
    language: str
    text: str
    marks: tuple[Mark, ...] = field(default=())

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def mark(self, kind: str) -> Mark | None:
        """The first mark of this kind."""
        return next((mark for mark in self.marks if mark.kind == kind), None)

    @property
    def left_out(self) -> str:
        """Why the whole block is not run; empty when it is."""
        return next((m.reason for m in self.marks if m.kind == "not run" and not m.parts["command"]), "")

    def commands(self) -> tuple[Command, ...]:
        """The commands of an `sh` block (a line each) or a `console` block (`$ ` and what is printed)."""
        text = self.text.replace("\\\n", " ")
        if self.language == "sh":
            shown = [(line, ()) for line in text.splitlines() if line.strip()]
        else:
            first, *parts = re.split(r"^\$ ", text, flags=re.MULTILINE)
            if first.strip():
                raise PageError(f"{self}: a console block begins with a command, `$ ...`; this one with {first!r}")
            split = [part.partition("\n") for part in parts]
            shown = [(command, tuple(output.splitlines())) for command, _, output in split]
        found = tuple(self._command(command.strip(), output) for command, output in shown)
        for mark in self.marks:
            start = mark.parts.get("command")
            if mark.kind in ("not run", "run as") and start and not any(c.shown.startswith(start) for c in found):
                raise PageError(
                    f"{self}: the mark `{mark.kind}` names {start!r}, and no command of the block begins so"
                )
        return found

    def _command(self, shown: str, output: tuple[str, ...]) -> Command:
        tried, left_out = shown, self.left_out
        for mark in self.marks:
            start = mark.parts.get("command")
            if mark.kind == "where":
                word, value = str(mark.parts["word"]), str(mark.parts["value"])
                tried = re.sub(rf"\b{word}\b", lambda _, value=value: value.strip(), tried)
            elif start and shown.startswith(start):
                if mark.kind == "run as":
                    tried = str(mark.parts["instead"])
                elif mark.kind == "not run":
                    left_out = mark.reason
        return Command(shown, tried, left_out, output)


def read_mark(text: str, where: str) -> Mark:
    """A comment as a mark; raises `PageError` when it is none of `MARKS`."""
    said = text.strip()
    for kind, pattern in MARKS.items():
        found = pattern.fullmatch(said)
        if found:
            return Mark(kind, found.groupdict())
    raise PageError(f"{where}: <!-- {said} --> is none of the marks {', '.join(MARKS)} (or lacks its reason)")


def read_page(name: str, text: str) -> tuple[Block, ...]:
    """The blocks of a page, in order. Raises `PageError` for a comment that is no mark, or a mark before no block."""
    blocks: list[Block] = []
    waiting: list[Mark] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        line, here = lines[at], f"{name}:{at + 1}"
        if line.startswith("<!--"):
            end = next((i for i in range(at, len(lines)) if "-->" in lines[i]), None)
            if end is None:
                raise PageError(f"{here}: a comment that never ends")
            waiting += [read_mark(said, here) for said in COMMENT.findall("\n".join(lines[at : end + 1]))]
            at = end
        elif line.startswith("```"):
            end = next((i for i in range(at + 1, len(lines)) if lines[i].startswith("```")), None)
            if end is None:
                raise PageError(f"{here}: a block that never ends")
            body = "".join(f"{each}\n" for each in lines[at + 1 : end])
            blocks.append(Block(name, at + 1, line[3:].strip(), body, tuple(waiting)))
            waiting, at = [], end
        elif line.strip() and waiting:
            raise PageError(f"{here}: the mark before this line stands before no block")
        at += 1
    if waiting:
        raise PageError(f"{name}: its last mark stands before no block")
    return tuple(blocks)


def spans(text: str) -> list[tuple[int, str]]:
    """What stands in backticks outside blocks and comments: (line, text), a span over two lines in one piece."""
    bare = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    bare = COMMENT.sub(lambda m: "\n" * m[0].count("\n"), bare)
    found = re.finditer(r"(?<!`)`([^`]+)`(?!`)", bare)
    return [(bare.count("\n", 0, m.start()) + 1, " ".join(m[1].split())) for m in found]


def page_names() -> list[str]:
    """Every Markdown file of the repository, as git knows them; in a tree without git, all that lie there."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return sorted(name for name in listed.stdout.split() if (REPOSITORY / name).is_file())
    hidden = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*.md"))
    return sorted(str(path) for path in hidden if not any(part.startswith((".", "build")) for part in path.parts))


def text_of(name: str) -> str:
    """A page's text."""
    return (REPOSITORY / name).read_text(encoding="utf-8")
