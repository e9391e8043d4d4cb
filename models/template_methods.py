"""Methods of plain values as a chat template may call them: each of Python's, at a known price.

What always holds: a method whose result and time grow with its operands alone is called once those are paid for; one
that can make more of them is sized first; one that is not in these lists, as a later Python may bring, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError

from slotwise.models.template_meter import Meter

_TEXT = frozenset((
    "capitalize", "casefold", "count", "decode", "encode", "endswith", "escape", "find", "hex", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper", "lower", "lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex",
    "rpartition", "rstrip", "startswith", "strip", "swapcase", "title", "unescape", "upper",
))  # fmt: skip
_LINEAR: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    ((str, bytes), _TEXT),
    (Mapping, frozenset(("copy", "get", "items", "keys", "values"))),
    ((list, tuple, range), frozenset(("copy", "count", "index"))),
    (
        (int, float),
        frozenset(("as_integer_ratio", "bit_count", "bit_length", "conjugate", "hex", "is_integer")),
    ),
)
"""Methods whose price is that of their operands."""

_VALUES = (str, bytes, Mapping, list, tuple, range, int, float)


class Methods:
    """Calls methods of plain values at the expense of `meter`."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._sized: Mapping[str, Callable[..., Any]] = {
            "center": self._padded,
            "ljust": self._padded,
            "rjust": self._padded,
            "zfill": self._padded,
            "expandtabs": self._expanded,
            "join": self._join,
            "replace": self._replace,
            "split": self._split,
            "rsplit": self._split,
            "splitlines": self._split,
            "translate": self._translate,
            "striptags": self._striptags,
        }

    def offers(self, method: Any) -> bool:
        """Whether `method` is that of a plain value, so that `call` is what calls it."""
        return isinstance(getattr(method, "__self__", None), _VALUES)

    def call(self, method: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of a method; raises SecurityError for one that is not known to be bounded."""
        owner, name = method.__self__, str(method.__name__)
        meter = self._meter
        for value in chain((owner,), args, kwargs.values()):
            meter.admit(value)
        if isinstance(owner, str | bytes) and name in self._sized:
            return meter.admit(self._sized[name](method, owner, *args, **kwargs))
        if isinstance(owner, int) and name == "to_bytes":
            meter.expect(int(args[0] if args else kwargs.get("length", 1)))
        elif not any(isinstance(owner, kinds) and name in names for kinds, names in _LINEAR):
            raise SecurityError(f"the method {name!r} of a {type(owner).__name__} is not offered to templates")
        return meter.admit(method(*args, **kwargs))

    def _padded(self, method: Any, owner: Any, width: Any, *fill: Any) -> Any:
        self._meter.expect(width)
        return method(width, *fill)

    def _expanded(self, method: Any, owner: Any, tabsize: Any = 8) -> Any:
        self._meter.expect(len(owner) + owner.count("\t" if isinstance(owner, str) else b"\t") * max(0, tabsize))
        return method(tabsize)

    def _join(self, method: Any, owner: Any, values: Iterable[Any]) -> Any:
        parts = [self._meter.admit(part) for part in self._meter.items(values)]
        self._meter.expect(sum(map(self._meter.size, parts)) + len(owner) * max(0, len(parts) - 1))
        return method(parts)

    def _replace(self, method: Any, owner: Any, old: Any, new: Any, count: int = -1) -> Any:
        self._meter.expect(replaced_size(owner, old, new, count))
        return method(old, new, count)

    def _split(self, method: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
        separator = kwargs.get("sep", args[0] if args else None)
        by = isinstance(separator, str | bytes) and separator and method.__name__ != "splitlines"
        self._meter.spend(owner.count(separator) if by else len(owner))
        return method(*args, **kwargs)

    def _translate(self, method: Any, owner: Any, table: Any, **kwargs: Any) -> Any:
        texts = [len(entry) for entry in table.values() if isinstance(entry, str)] if isinstance(table, Mapping) else []
        self._meter.expect(len(owner) * max(1, *texts, 1))
        return method(table, **kwargs)

    def _striptags(self, method: Any, owner: str) -> Any:
        pay_for_tags(self._meter, owner)
        return method()


def replaced_size(text: Any, old: Any, new: Any, count: int) -> int:
    """How long `text` is at most with `old` replaced by `new`, `count` times or (below 0) everywhere."""
    times: int = text.count(old)
    times = min(times, count) if count >= 0 else times
    return len(text) + times * max(0, len(new) - len(old))


def pay_for_tags(meter: Meter, text: str) -> None:
    """Pay for taking tags out of `text`: MarkupSafe copies the rest for each, and lists its words in the end."""
    meter.spend(len(text) + text.count("<") * (1 + len(text) // 256))
