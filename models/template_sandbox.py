"""A jinja2 sandbox for templates written by strangers: nothing but text comes out, and every render ends soon.

What always holds: a template reaches no attribute outside the data it was given; the work of a render (loop passes,
macro calls, text and lists made) is counted by one `Meter`, which ends it with a `TemplateLimitError`; a value is
sized before it is made wherever its size is not bounded by what exists. The counting is put into the syntax tree, so
that a template cannot go around it; what is not known to be bounded (a filter, a method) is not offered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner

from slotwise.models.template_filters import MAX_WIDTH, Filters
from slotwise.models.template_globals import (
    Mappings,
    TemplateNamespace,
    lorem_ipsum,
    raise_exception,
    strftime_now,
)
from slotwise.models.template_meter import MAX_BITS, Meter, TemplateLimitError
from slotwise.models.template_methods import Methods


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


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one render, or of one compilation; its `meter` belongs to it alone.

    `entries` is how many messages, tools and documents the render is given.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, entries: int = 0) -> None:
        # Not optimized: folding constants would run filters before anything is counted.
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols], optimized=False
        )
        meter = self.meter = Meter(entries)
        self._methods = Methods(meter)
        self._offered = Filters(self, meter)
        self.globals = {
            "range": self.globals["range"],
            "dict": Mappings(meter),
            "namespace": TemplateNamespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "lipsum": lambda *args, **kwargs: lorem_ipsum(meter, *args, **kwargs),
            "raise_exception": raise_exception,
            "strftime_now": strftime_now,
        }
        self.filters = {
            **self._offered.by_name(),
            " emit": pass_context(lambda _, value: meter.emit(value)),
            " enter": pass_context(lambda _, steps: meter.spend(steps) or ""),  # type: ignore[func-returns-value]
            " admit": pass_context(lambda _, value: meter.admit(value)),
            " concat": pass_context(lambda _, values: self._offered.concat(values)),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _meter_tree(tree)
        return tree

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a bounded stand-in for `str.format` and `str.format_map`."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text: str = value.__self__

        def bounded(*args: Any, **kwargs: Any) -> str:
            # A nested field or a long number in a specification could ask for any width.
            if re.search(r"\{[^{}]*\{|\d{5}", text.replace("{{", "")):
                raise TemplateLimitError(f"the template formats with a computed width or one above {MAX_WIDTH}")
            given = sum(self.meter.size(argument) for argument in (*args, *kwargs.values()))
            self.meter.expect(len(text) + text.count("{") * (given + 2 * MAX_WIDTH))
            return str(self.meter.admit(wrapped(*args, **kwargs)))

        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as jinja2 has it)
        """Call a macro, a global or one of the listed methods of a plain value; anything else is a `SecurityError`."""
        scope = {name: kwargs.pop(name) for name in ("_loop_vars", "_block_vars") if name in kwargs}  # the compiler's
        if __self._methods.offers(__obj):
            return __self._methods.call(__obj, args, kwargs)
        return __self.meter.admit(super().call(__context, __obj, *args, **kwargs, **scope))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Apply an operator, sized first where the result can be larger than its operands together."""
        meter = self.meter
        meter.admit(left)
        meter.admit(right)
        if operator == "%" and isinstance(left, str | bytes):
            return self._offered.percent(left, right)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    meter.expect(meter.size(value) * times)
                    meter.spend(0 if isinstance(value, str | bytes) else len(value) * max(0, times))
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * abs(right) > MAX_BITS:
            raise TemplateLimitError(f"the template computes an integer of more than {MAX_BITS} bits")
        return meter.admit(super().call_binop(context, operator, left, right))


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
