"""A jinja2 sandbox for templates written by strangers: nothing but text comes out, and every render ends soon.

What always holds: a template reaches no attribute outside the data it was given; the work of a render (loop passes,
macro calls, text and lists made) is counted by one `Meter`, which ends it with a `TemplateLimitError`; a value is
sized before it is made wherever its size is not bounded by what exists. The counting is put into the syntax tree, so
that a template cannot go around it; what is not known to be bounded (a filter, a method) is not offered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import chain
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from slotwise.models.template_meter import (
    MAX_BITS,
    Meter,
    TemplateLimitError,
    TemplateRefusalError,
)

_MAX_WIDTH = 9_999  # padding in a format

# Offered as jinja2 has them: these take no time whatever they are given; of the others what they take and return is
# sized, and what they iterate over is counted.
_CONSTANT_TIME_FILTERS = ("count", "d", "default", "first", "length")
_PLAIN_FILTERS = (
    "abs", "capitalize", "e", "escape", "float", "forceescape", "int", "items", "last", "lower", "round", "safe",
    "string", "title", "trim", "truncate", "upper",
)  # fmt: skip
_ITERATING_FILTERS = (
    "dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr",
    "sort", "unique",
)  # fmt: skip

_STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
))  # fmt: skip
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (Mapping, frozenset(("copy", "get", "items", "keys", "values"))),
    ((list, tuple), frozenset(("copy", "count", "index"))),
    ((int, float), frozenset(("bit_length", "is_integer"))),
)


class GenerationTag(Extension):
    """`{% generation %}` marks what an assistant said, for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block as a call, which gives it the scope that it has elsewhere."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Macro) -> str:
        return str(caller())


class _SafeNamespace(Namespace):
    """A namespace without underscored names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name!r} cannot be set on a namespace")
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be put into a namespace")
        super().__setitem__(name, value)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one render, or of one compilation; its `meter` belongs to it alone."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self) -> None:
        # Not optimized: folding constants would run filters before anything is counted.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], optimized=False
        )
        self.meter = Meter()
        self.globals = {
            "range": self.globals["range"],
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": self._namespace,
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self.filters = self._filters()

    def _namespace(self, /, *args: Any, **kwargs: Any) -> Namespace:
        made = _SafeNamespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _meter_tree(tree)
        return tree

    def _filters(self) -> dict[str, Callable[..., Any]]:
        meter = self.meter
        offered: dict[str, Callable[..., Any]] = {
            " emit": pass_context(lambda _, value: meter.emit(value)),
            " enter": pass_context(lambda _, steps: meter.spend(steps) or ""),  # type: ignore[func-returns-value]
            " admit": pass_context(lambda _, value: meter.admit(value)),
            " concat": pass_context(lambda _, values: self._concat(values)),
            "tojson": self._tojson,
            "join": self._join,
            "sum": self._sum,
            "replace": self._replace,
            "indent": self._indent,
            "format": self._format,
        }
        for name in _PLAIN_FILTERS:
            offered[name] = self._guarded(FILTERS[name], iterates=False)
        for name in _CONSTANT_TIME_FILTERS:
            offered[name] = FILTERS[name]
        for name in _ITERATING_FILTERS:
            offered[name] = self._guarded(FILTERS[name], iterates=True)
        return offered

    def _guarded(self, function: Callable[..., Any], *, iterates: bool) -> Callable[..., Any]:
        """A filter whose input is paid for and whose result is sized; jinja2's mark for a first argument is kept."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = list(args)
            for value in chain(given[position:], kwargs.values()):
                self.meter.admit(value)
            if iterates:
                given[position] = self.meter.items(given[position])
            if function is FILTERS["round"] and any(
                abs(int(n)) > 400 for n in (*given[1:2], kwargs.get("precision", 0))
            ):
                raise TemplateLimitError("the template rounds to more than 400 digits")
            return self.meter.admit(function(*given, **kwargs))

        if position:
            guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded

    def _concat(self, values: list[Any]) -> Any:
        self.meter.expect(sum(self.meter.size(value) for value in values))
        return self.meter.admit("".join(str(value) for value in values))

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
        self.meter.admit(value)
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(self.meter.admit(text))

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        parts = self._entries(value, attribute)
        return self._joined(str(d), [str(self.meter.admit(part)) for part in parts])

    def _sum(self, value: Any, attribute: Any = None, start: float = 0) -> Any:
        """The sum of numbers; jinja2's would also chain lists, in time that grows with the square."""
        total = start
        for entry in self._entries(value, attribute):
            if not isinstance(entry, int | float) or not isinstance(total, int | float):
                raise TypeError(f"expected numbers to sum, found {type(entry).__name__}")
            total = self.meter.admit(total + entry)
        return total

    def _entries(self, value: Any, attribute: Any) -> Iterable[Any]:
        entries = self.meter.items(value)
        return entries if attribute is None else map(make_attrgetter(self, attribute), entries)

    def _joined(self, separator: str, parts: list[str]) -> str:
        self.meter.expect(sum(map(len, parts)) + len(separator) * max(0, len(parts) - 1))
        return str(self.meter.admit(separator.join(parts)))

    def _replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        for part in (value, old, new):
            self.meter.admit(part)
        return self._replaced(value if isinstance(value, str) else str(value), str(old), str(new), count)

    def _replaced(self, text: str, old: str, new: str, count: int | None = None) -> str:
        times = text.count(old)
        if count is not None and count >= 0:
            times = min(times, count)
        self.meter.expect(len(text) + times * max(0, len(new) - len(old)))
        return str(self.meter.admit(text.replace(old, new, -1 if count is None else count)))

    def _indent(self, value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        by = width if isinstance(width, int) else len(width)
        self.meter.admit(value)
        self.meter.expect(len(value) + by * (1 + len(value.splitlines())))
        return str(self.meter.admit(FILTERS["indent"](value, width, first, blank)))

    def _format(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return self._percent(str(value), kwargs or args)

    def _percent(self, text: str, values: Any) -> Any:
        """`text % values`, its size bounded by the directives in `text` and the widths that they name."""
        directives = re.findall(r"%(?:\([^)]*\))?[^a-zA-Z%]*", text)
        if any("*" in directive or re.search(r"\d{5}", directive) for directive in directives):
            raise TemplateLimitError(f"the template formats with a width above {_MAX_WIDTH}")
        self.meter.expect(len(text) + len(directives) * (self.meter.size(values) + 2 * _MAX_WIDTH))
        return self.meter.admit(text % values)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a bounded stand-in for `str.format` and `str.format_map`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            # A nested field or a long number in a specification could ask for any width.
            if re.search(r"\{[^{}]*\{|\d{5}", text.replace("{{", "")):
                raise TemplateLimitError(f"the template formats with a computed width or one above {_MAX_WIDTH}")
            given = sum(self.meter.size(argument) for argument in (*args, *kwargs.values()))
            self.meter.expect(len(text) + text.count("{") * (given + 2 * _MAX_WIDTH))
            return str(self.meter.admit(wrapped(*args, **kwargs)))

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as jinja2 has it)
        """Call a macro, a global or one of the listed methods of a plain value; anything else is a `SecurityError`."""
        meter = __self.meter
        scope = {name: kwargs.pop(name) for name in ("_loop_vars", "_block_vars") if name in kwargs}  # the compiler's
        owner = getattr(__obj, "__self__", None)
        if owner is None or isinstance(owner, Extension | MeteredEnvironment):
            return meter.admit(super().call(__context, __obj, *args, **kwargs, **scope))
        name = str(getattr(__obj, "__name__", ""))
        if not any(isinstance(owner, kind) and name in methods for kind, methods in _METHODS):
            if isinstance(owner, str | Mapping | list | tuple | int | float | bytes | range):
                raise SecurityError(f"the method {name!r} of a {type(owner).__name__} is not offered to templates")
            return meter.admit(super().call(__context, __obj, *args, **kwargs, **scope))
        for value in chain((owner,), args, kwargs.values()):
            meter.admit(value)
        if isinstance(owner, str) and name == "join":
            return __self._joined(owner, [str(meter.admit(part)) for part in meter.items(*args)])
        if isinstance(owner, str) and name == "replace":
            return __self._replaced(owner, *args, **kwargs)
        if isinstance(owner, str) and name in ("split", "rsplit", "splitlines"):
            separators = len(owner) if name == "splitlines" or not args or args[0] is None else owner.count(args[0])
            meter.spend(separators)
        return meter.admit(__obj(*args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, sized first where the result can be larger than its operands together."""
        meter = self.meter
        meter.admit(left)
        meter.admit(right)
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    meter.expect(meter.size(value) * times)
                    meter.spend(0 if isinstance(value, str) else len(value) * max(0, times))
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * abs(right) > MAX_BITS:
            raise TemplateLimitError(f"the template computes an integer of more than {MAX_BITS} bits")
        return meter.admit(super().call_binop(context, operator, left, right))


def raise_exception(message: object) -> None:
    """End the render; templates call it for messages that they do not take."""
    raise TemplateRefusalError(str(message))


def strftime_now(format: str) -> str:
    """Return the local time by a format without widths, which the C library would honour to any size."""
    if len(format) > 256 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise TemplateLimitError("the template asks for a date format that is too long or has a width")
    return datetime.now().strftime(format)


_CONSTANT_TIME_TESTS = frozenset((
    "boolean", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "mapping", "none", "number",
    "odd", "sequence", "string", "true", "undefined",
))  # fmt: skip
_REFUSED: Mapping[type[nodes.Node], str] = {
    nodes.Extends: "extends",
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.ScopedEvalContextModifier: "autoescape",
}


def _filter(name: str, value: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _meter_tree(node: nodes.Node) -> int:
    """Put the counting into a syntax tree, in place; return how many nodes a run through it may evaluate."""
    if type(node) in _REFUSED:
        raise TemplateSyntaxError(f"'{_REFUSED[type(node)]}' is not offered to chat templates", node.lineno)
    weight = 1 + sum(_meter_tree(child) for child in node.iter_child_nodes())
    for name in node.fields:
        value = getattr(node, name)
        if isinstance(value, list):
            value[:] = [_metered(child) for child in value]
        else:
            setattr(node, name, _metered(value))
    if isinstance(node, nodes.Output):
        node.nodes = [_filter(" emit", _constant(child)) for child in node.nodes]
    if isinstance(node, nodes.Compare):
        node.expr = _filter(" admit", node.expr)
        for operand in node.ops:
            operand.expr = _filter(" admit", operand.expr)
    if isinstance(node, nodes.Test) and node.name not in _CONSTANT_TIME_TESTS:
        node.node = _filter(" admit", node.node)
        node.args = [_filter(" admit", argument) for argument in node.args]
    if isinstance(node, nodes.For) and node.test is not None:
        node.test = _filter(" admit", node.test)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
        step = nodes.Const(weight, lineno=node.lineno)
        node.body.insert(0, nodes.Output([_filter(" enter", step)], lineno=node.lineno))
    return weight


def _constant(child: nodes.Expr) -> nodes.Expr:
    return nodes.Const(child.data, lineno=child.lineno) if isinstance(child, nodes.TemplateData) else child


def _metered(child: Any) -> Any:
    """Replace an expression that makes a value without passing the environment."""
    if isinstance(child, nodes.Concat):
        return _filter(" concat", nodes.List(child.nodes, lineno=child.lineno))
    if isinstance(child, nodes.List | nodes.Dict) or (isinstance(child, nodes.Tuple) and child.ctx == "load"):
        return _filter(" admit", child)
    if isinstance(child, nodes.Getitem) and isinstance(child.arg, nodes.Slice) and child.ctx == "load":
        return _filter(" admit", child)
    return child
