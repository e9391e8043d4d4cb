"""Stop strings that hold the text of tokens which are never shown.

Owns `StopMarks`: how such a string can match. What always holds: a mark is a lone surrogate, which no decoded text has,
so marked text and plain text cannot be mistaken for each other; a string without such a token is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from slotwise.core.errors import OptionError

_FIRST, _OTHER = 0xD800, 0xDFFF
_MARK = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class StopMarks:
    """Stop strings as they are looked for, and the tokens that must be seen for some of them.

    `strings` are the given ones and, of each that names silent tokens, a second form with one mark for each of those:
    `"bye<|end|>"` matches the text `bye` with the token after it, and the same text spelled out by ordinary tokens.
    Half of a string may not be spelled and half be tokens. `by_id` is the mark of a token; silent tokens that no string
    names have one in common, so that any of them parts what stands at its sides.
    """

    strings: tuple[str, ...]
    by_id: Mapping[int, str]

    @classmethod
    def of(cls, strings: Iterable[str], silent: Mapping[str, int]) -> StopMarks:
        """Resolve strings for a tokenizer whose tokens `silent`, text -> id, add nothing to a text.

        Where the texts of two such tokens overlap, the first is meant, and of those that begin together the longest, as
        a tokenizer reads a prompt. Raises `OptionError` for a string that is not Unicode text, which can never match.
        """
        given = tuple(strings)
        for string in given:
            if half := _MARK.search(string):
                raise OptionError(
                    f"stop: {string!r} has half of a surrogate pair at position {half.start()}, so it can never match; "
                    "remove it"
                )
        marks: dict[int, str] = {}

        def mark(found: re.Match[str]) -> str:
            index = silent[found[0]]
            if index not in marks:
                if len(marks) == _OTHER - _FIRST:
                    raise OptionError(f"stop: names more than {len(marks)} special tokens; give their ids instead")
                marks[index] = chr(_FIRST + len(marks))
            return marks[index]

        named = [text for text in silent if text and any(text in string for string in given)]
        if not named:
            return cls(given, MappingProxyType({}))
        pattern = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))))
        strings = tuple(dict.fromkeys([*given, *(pattern.sub(mark, string) for string in given)]))
        return cls(strings, MappingProxyType({**dict.fromkeys(silent.values(), chr(_OTHER)), **marks}))


def is_marked(text: str) -> bool:
    """Whether a text has a mark."""
    return _MARK.search(text) is not None


def unmarked(text: str) -> str:
    """A text without its marks: what is shown."""
    return text if text.isascii() else _MARK.sub("", text)
