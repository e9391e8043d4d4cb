"""Jinja's filters as a chat template may use them: all of them, each at a known price.

What always holds: a filter means what it means in the environment of transformers; what it is given and returns is
sized, what it iterates over is counted, and one that can make or do more than that is sized first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import FilterArgumentError
from jinja2.filters import FILTERS, make_attrgetter

from slotwise.models.template_meter import Meter, TemplateLimitError
from slotwise.models.template_methods import pay_for_tags, replaced_size

if TYPE_CHECKING:
    from jinja2 import Environment

MAX_WIDTH = 9_999  # padding in a format

# Offered as jinja2 has them: these take no time whatever they are given; of the others what they take and return is
# sized, and what they iterate over is counted.
_CONSTANT_TIME = ("count", "d", "default", "first", "length")
_PLAIN = (
    "abs", "attr", "capitalize", "e", "escape", "filesizeformat", "float", "forceescape", "int", "items", "last",
    "lower", "random", "safe", "string", "trim", "truncate", "upper", "xmlattr",
)  # fmt: skip
_ITERATING = (
    "dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr",
    "sort", "unique",
)  # fmt: skip


class Filters:
    """The filters of one environment, at the expense of its meter."""

    def __init__(self, environment: Environment, meter: Meter) -> None:
        self._environment = environment
        self._meter = meter

    def by_name(self) -> dict[str, Callable[..., Any]]:
        """Every filter."""
        found: dict[str, Callable[..., Any]] = {name: FILTERS[name] for name in _CONSTANT_TIME}
        found |= {name: self._guarded(name, None) for name in _PLAIN}
        found |= {name: self._guarded(name, None, iterates=True) for name in _ITERATING}
        found |= {
            "batch": self._guarded("batch", self._pay_for_batch, iterates=True),
            "center": self._guarded("center", self._pay_for_width),
            "indent": self._guarded("indent", self._pay_for_indent),
            "pprint": self._guarded("pprint", self._pay_for_pprint),
            "replace": self._guarded("replace", self._pay_for_replace),
            "round": self._guarded("round", self._pay_for_digits),
            "slice": self._guarded("slice", self._pay_for_slices, iterates=True),
            "striptags": self._guarded("striptags", lambda value: pay_for_tags(self._meter, str(value))),
            "title": self._guarded("title", self._pay_for_words),
            "urlencode": self._guarded("urlencode", self._pay_for_quotes),
            "urlize": self._guarded("urlize", self._pay_for_links),
            "wordcount": self._guarded("wordcount", self._pay_for_words),
            "wordwrap": self._guarded("wordwrap", self._pay_for_lines),
        }
        return found | {"tojson": self._tojson, "join": self._join, "sum": self._sum, "format": self._format}

    def _guarded(self, name: str, pay: Callable[..., None] | None, *, iterates: bool = False) -> Callable[..., Any]:
        """Jinja's filter, its operands and result sized, after `pay` for what those do not bound.

        Jinja's mark for a first argument (context, environment) is kept.
        """
        function = FILTERS[name]
        position = 1 if hasattr(function, "jinja_pass_arg") else 0
        meter = self._meter

        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            for value in chain(given[position:], kwargs.values()):
                meter.admit(value)
            if pay is not None:
                pay(*given[position:], **kwargs)
            if iterates:
                given[position] = meter.items(given[position])
            return meter.admit(function(*given, **kwargs))

        if position:
            guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded

    def percent(self, text: str | bytes, values: Any) -> Any:
        """`text % values`, its size bounded by the directives in `text` and the widths that they name."""
        pattern = text if isinstance(text, str) else text.decode("latin-1")
        directives = re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", pattern)
        if any("*" in directive or re.search(r"\d{5}", directive) for directive in directives):
            raise TemplateLimitError(f"the template formats with a width above {MAX_WIDTH}")
        self._meter.expect(len(text) + len(directives) * (self._meter.size(values) + 2 * MAX_WIDTH))
        return self._meter.admit(text % values)

    def concat(self, values: list[Any]) -> Any:
        """The texts of `values`, one after another."""
        self._meter.expect(sum(self._meter.size(value) for value in values))
        return self._meter.admit("".join(str(value) for value in values))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """JSON without HTML escapes, as chat templates expect it."""
        for option in (indent, *(separators or ())):
            if (option if isinstance(option, int) else len(option or "")) > 16:
                raise TemplateLimitError("the template asks for JSON with more than 16 characters of padding")
        self._meter.admit(value)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(self._meter.admit(text))

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        separator, parts = str(d), [str(self._meter.admit(part)) for part in self._entries(value, attribute)]
        self._meter.expect(sum(map(len, parts)) + len(separator) * max(0, len(parts) - 1))
        return str(self._meter.admit(separator.join(parts)))

    def _sum(self, iterable: Any, attribute: Any = None, start: Any = 0) -> Any:
        """Entries added one by one, so that lists, which are copied each time, are paid for each time."""
        if isinstance(start, str | bytes):
            raise TypeError("sum() can't sum text; join it")
        total = start
        for entry in self._entries(iterable, attribute):
            total = self._meter.admit(total + entry)
        return total

    def _entries(self, value: Any, attribute: Any) -> Iterable[Any]:
        entries: Iterable[Any] = self._meter.items(value)
        return entries if attribute is None else map(make_attrgetter(self._environment, attribute), entries)

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        if args and kwargs:
            raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
        return self.percent(value if isinstance(value, str) else str(value), kwargs or args)

    def _pay_for_batch(self, value: Any, linecount: Any, fill_with: Any = None) -> None:
        if fill_with is not None:
            self._meter.spend(max(0, linecount))
            self._meter.expect(linecount * self._meter.size(fill_with))

    def _pay_for_slices(self, value: Any, slices: Any, fill_with: Any = None) -> None:
        self._meter.spend(max(0, slices))

    def _pay_for_width(self, value: Any, width: Any = 80) -> None:
        self._meter.expect(width)

    def _pay_for_digits(self, value: Any, precision: Any = 0, method: Any = "common") -> None:
        if abs(int(precision)) > 400:
            raise TemplateLimitError("the template rounds to more than 400 digits")

    def _pay_for_indent(self, s: Any, width: Any = 4, first: Any = False, blank: Any = False) -> None:
        by = width if isinstance(width, int) else len(width)
        self._meter.expect(len(s) + by * (1 + len(s.splitlines())))

    def _pay_for_replace(self, s: Any, old: Any, new: Any, count: Any = None) -> None:
        self._meter.expect(replaced_size(str(s), str(old), str(new), -1 if count is None else count))

    def _pay_for_words(self, s: Any) -> None:
        self._meter.spend(self._meter.size(s))

    def _pay_for_quotes(self, value: Any) -> None:
        self._meter.expect(12 * self._meter.size(value))  # a character is four bytes of three characters at most

    def _pay_for_lines(
        self,
        s: Any,
        width: Any = 79,
        break_long_words: Any = True,
        wrapstring: Any = None,
        break_on_hyphens: Any = True,
    ) -> None:
        """A long word is copied once for each line that it is broken into."""
        size, lines = len(s), len(s) // max(1, width) + 1
        self._meter.spend(size + lines * (1 + size // 256))
        self._meter.expect(size * (1 + len(wrapstring or "\n")))

    def _pay_for_links(self, value: Any, *args: Any, **kwargs: Any) -> None:
        """Patterns are tried from each character of a word; a link has its text twice, and its attributes."""
        text = str(value)
        self._meter.spend(len(text))
        words = text.split()
        self._meter.spend(len(text) * max(map(len, words), default=0) // 8)
        attributes = sum(self._meter.size(entry) for entry in (*args, *kwargs.values()))
        self._meter.expect(12 * len(text) + len(words) * (6 * attributes + 64))
        if any(isinstance(entry, list | tuple) for entry in (*args, *kwargs.values())):
            self._meter.spend(len(words) * attributes)

    def _pay_for_pprint(self, value: Any) -> None:
        """Each level writes its entries anew to see whether they fit, and indents them."""
        size, depth = self._meter.size(value), _depth(value)
        self._meter.spend((1 + size // 256) * depth)
        self._meter.expect(size * depth)


def _depth(value: Any) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list | tuple):
        return 1 + max(map(_depth, value), default=0)
    return 1
