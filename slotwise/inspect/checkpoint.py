"""What a checkpoint says of itself, and what is made of it: the sections of `slotwise doctor MODEL`.

Owns `SECTIONS`; a part that has something to tell adds a function there. What always holds: config and headers are
read, no weight; a section that cannot be told holds the reason, and the others stand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from slotwise.core.errors import CheckpointError
from slotwise.core.sizes import size
from slotwise.engine.sampling import Sampling
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.generation_config import GenerationDefaults
from slotwise.models.load import LoadedModel, load_model
from slotwise.models.special_tokens import SpecialToken
from slotwise.models.tokenizer import Tokenizer
from slotwise.models.tokenizer_classes import GENERIC, LLAMA
from slotwise.requests import default_sampling

Lines = Iterator[tuple[str, str]]
_SHOWN = 8


@dataclass(frozen=True)
class Checkpoint:
    """A folder to be told about; its parts are read when a section first asks."""

    folder: Path

    @cached_property
    def model(self) -> LoadedModel:
        """Config and headers, checked against each other."""
        return load_model(self.folder)

    @cached_property
    def rows(self) -> int | None:
        """How many ids the model has; None where it cannot be read."""
        try:
            return self.model.spec.vocab_size
        except CheckpointError:
            return None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, as the model's."""
        return Tokenizer.load(self.folder, rows=self.rows)


@dataclass(frozen=True)
class Section:
    """A title, lines of a name and what is said of it, and the error that ended them."""

    title: str
    lines: tuple[tuple[str, str], ...]
    error: CheckpointError | None = None

    def __str__(self) -> str:
        width = max([18, *(len(name) for name, _ in self.lines)])
        told = [f"  {name:<{width}} {text}".rstrip() for name, text in self.lines]
        return "\n".join([self.title, *told, *([f"  refused: {self.error}"] if self.error else [])])


def describe(folder: str | os.PathLike[str]) -> list[Section]:
    """Every section about the checkpoint in `folder`."""
    checkpoint = Checkpoint(Path(folder))
    found = []
    for title, section in SECTIONS:
        lines: list[tuple[str, str]] = []
        error = None
        try:
            lines.extend(section(checkpoint))
        except CheckpointError as refused:
            error = refused
        found.append(Section(title, tuple(lines), error))
    return found


def _model(checkpoint: Checkpoint) -> Lines:
    spec = checkpoint.model.spec
    yield "architecture", spec.architecture
    yield "vocabulary", f"{spec.vocab_size} ids"
    yield "positions", str(spec.max_positions)
    yield "computed in", spec.dtype.value
    yield "weights", size(checkpoint.model.checkpoint.total_bytes)


def _tokenizer(checkpoint: Checkpoint) -> Lines:
    tokenizer = checkpoint.tokenizer
    made = (
        "rebuilt from its class, as transformers does" if tokenizer.class_name == LLAMA else "as tokenizer.json has it"
    )
    yield "class", f"{tokenizer.class_name}, {made}" if tokenizer.class_name != GENERIC else f"any, {made}"
    yield "ids", f"up to {tokenizer.vocab_size - 1}{_beyond(tokenizer.vocab_size - 1, checkpoint)}"
    around = [f"{tokenizer.token(index)!r} {index}" for index in tokenizer.encode("")]
    yield "around a prompt", ", ".join(around) or "nothing"


def _special(checkpoint: Checkpoint) -> Lines:
    special = checkpoint.tokenizer.special_tokens
    for name, token in special.named.items():
        yield name, _told(token, checkpoint)
    shown = special.listed[:_SHOWN]
    for token in shown:
        yield "without a name", _told(token, checkpoint)
    known = {token.content for token in (*special.named.values(), *special.listed)}
    others = [f"{content!r} {index}" for content, index in special.special.items() if content not in known]
    more = len(special.listed) - len(shown)
    if more or others:
        rest = f"{more} more of lists" if more else ""
        in_file = f"{len(others)} of tokenizer.json: {', '.join(others[:_SHOWN])}" if others else ""
        yield "also", "; ".join(filter(None, (rest, in_file))) + (", ..." if len(others) > _SHOWN else "")
    for note in special.notes:
        yield "note", note


def _ends(checkpoint: Checkpoint) -> Lines:
    ends = checkpoint.tokenizer.special_tokens.ends
    for end in ends:
        text = "no token" if end.content is None else repr(end.content)
        yield str(end.id), f"{text}, named by {', '.join(end.sources)}{_beyond(end.id, checkpoint)}"
    if not ends:
        yield "none", "no file names an end: a text goes on to its budget or a stop of the request"


def _templates(checkpoint: Checkpoint) -> Lines:
    template = ChatTemplate.load(checkpoint.folder, checkpoint.tokenizer.special_tokens.variables)
    names = [*(["default"] if template.source is not None else []), *sorted(template.named)]
    yield ("templates", f"{', '.join(names)} ({Path(template.origin).name})") if names else ("templates", "none")


def _generation(checkpoint: Checkpoint) -> Lines:
    sampling = default_sampling(
        GenerationDefaults.load(checkpoint.folder), tuple(end.id for end in checkpoint.tokenizer.special_tokens.ends)
    )
    plain = Sampling()
    changed = [each.name for each in fields(Sampling) if getattr(sampling, each.name) != getattr(plain, each.name)]
    for name in changed:
        yield name, f"{getattr(sampling, name)!r}"
    if not changed:
        yield "greedy", "generation_config.json changes nothing"


def _told(token: SpecialToken, checkpoint: Checkpoint) -> str:
    is_shown = token.content not in checkpoint.tokenizer.special_tokens.special
    text = ", shown as text" if is_shown else ""
    return f"{token.content!r} {token.id} ({token.source}){text}{_beyond(token.id, checkpoint)}"


def _beyond(index: int, checkpoint: Checkpoint) -> str:
    rows = checkpoint.rows
    return "" if rows is None or index < rows else f"; beyond the model's {rows} ids, so it never draws it"


SECTIONS: Sequence[tuple[str, Callable[[Checkpoint], Lines]]] = (
    ("model", _model),
    ("tokenizer", _tokenizer),
    ("special tokens", _special),
    ("ends of text", _ends),
    ("chat", _templates),
    ("generation defaults", _generation),
)
"""What is told of a checkpoint, in order."""
