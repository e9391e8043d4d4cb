"""Copies of what callers hand in, made of Python's own plain types alone, for a stranger's program to read.

What always holds: a copy shares nothing with its original and has no method or attribute that JSON data lacks, so that
a template can neither change a caller's data nor find a way out through it. What has no such copy is refused by place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from slotwise.core.errors import RequestError

_MAX_DEPTH = 64


class WrittenMapping(dict[str, object]):
    """A mapping that came as JSON text, and prints as that text.

    Some templates take the arguments of a tool call as a mapping (`arguments | tojson`, `arguments | items`), others
    as text (`'```json\\n' + arguments`). Both see here what they expect.
    """

    def __init__(self, entries: Mapping[str, object], text: str) -> None:
        super().__init__(entries)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __add__(self, other: object) -> str:
        return self.text + other if isinstance(other, str) else NotImplemented

    def __radd__(self, other: object) -> str:
        return other + self.text if isinstance(other, str) else NotImplemented


def plain(value: object, where: str, depth: int = 0) -> object:
    """A plain copy of JSON-like data; `where` names it in errors.

    Records that give their fields as a mapping (data classes, `model_dump()` as Pydantic has it) become mappings, and
    text and numbers of a class of their own (enumerations, numpy's scalars) Python's. Raises RequestError for anything
    else, and for what is nested more than 64 deep.
    """
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} deep; flatten it")
    if value is None or type(value) in (str, int, float, bool, WrittenMapping):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list | tuple):
        entries = [plain(entry, f"{where}[{position}]", depth + 1) for position, entry in enumerate(value)]
        return entries if isinstance(value, list) else tuple(entries)
    fields = as_mapping(value)
    if fields is not None:
        if not all(isinstance(key, str) for key in fields):
            raise RequestError(f"{where} has a key that is not a string; use JSON data")
        return {str.__str__(key): plain(entry, f"{where}[{key!r}]", depth + 1) for key, entry in fields.items()}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), where, depth + 1)
    raise RequestError(f"{where} is {kind(value)}; expected JSON data (text, numbers, lists, mappings)")


def as_mapping(value: object) -> Mapping[str, object] | None:
    """The fields of a mapping or of a record, or None where it is neither."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    dump = getattr(value, "model_dump", None)
    dumped = dump() if callable(dump) and not isinstance(value, type) else None
    return dumped if isinstance(dumped, Mapping) else None


def kind(value: object) -> str:
    """What a value is, for an error: `a list`."""
    return "nothing" if value is None else f"a {type(value).__name__}"
