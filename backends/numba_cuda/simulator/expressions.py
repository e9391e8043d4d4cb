"""Expressions of a kernel, rewritten to compute all threads at once.

Owns `Expressions`. What always holds: names that are not the kernel's own are looked up once, here; a part that not all
threads compute (`and`, `or`, `x if c else y`) is run for those that do, unless computing it for all can do no harm.
"""

from __future__ import annotations

import ast
import operator
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from . import language, memory, values
from .arrays import global_array
from .faults import UnsupportedKernel, site_number
from .language import CudaName, as_cuda_name
from .source import names_outside, own_arrays

THREADS = "_sim_threads"

BINARY = {
    ast.Add: values.add, ast.Sub: values.subtract, ast.Mult: values.multiply, ast.Div: values.divide,
    ast.FloorDiv: values.floor_divide, ast.Mod: values.remainder, ast.Pow: values.power, ast.BitAnd: values.bit_and,
    ast.BitOr: values.bit_or, ast.BitXor: values.bit_xor, ast.LShift: values.shift_left, ast.RShift: values.shift_right,
}  # fmt: skip
_UNARY = {ast.USub: values.negative, ast.UAdd: values.positive, ast.Invert: values.invert, ast.Not: values.logical_not}
_COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


class Expressions:
    """A function's names and expressions. `names` are the constants that rewritten expressions use."""

    def __init__(self, function: Callable[..., Any], tree: ast.FunctionDef, device: Callable[[Any], Any]) -> None:
        self.name, self.file = function.__name__, function.__code__.co_filename
        self.parameters = [argument.arg for argument in tree.args.args]
        self.names: dict[str, Any] = {}
        self.writes: set[str] = set()
        self._device = device
        self._locals = set(self.parameters) | {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._outside = names_outside(function)
        self._own_arrays = own_arrays(tree)
        self._temporaries = 0
        self.call: Callable[..., Any]

    def _constant(self, value: Any) -> ast.expr:
        """An expression for a value known now."""
        if value is None or isinstance(value, str):
            return ast.Constant(value)
        name = f"_sim_c{len(self.names)}"
        for known, other in self.names.items():
            if other is value:
                return ast.Name(known, ast.Load())
        self.names[name] = value
        return ast.Name(name, ast.Load())

    def _temporary(self) -> str:
        self._temporaries += 1
        return f"_sim_v{self._temporaries}"

    def _runtime(self, method: str, *arguments: ast.expr) -> ast.Call:
        return ast.Call(ast.Attribute(ast.Name(THREADS, ast.Load()), method, ast.Load()), list(arguments), [])

    def _of_memory(self, function: str, *arguments: ast.expr) -> ast.Call:
        return ast.Call(self._constant(getattr(memory, function)), [ast.Name(THREADS, ast.Load()), *arguments], [])

    def _site(self, node: ast.AST) -> ast.expr:
        return ast.Constant(site_number(self.file, self.name, getattr(node, "lineno", 0)))

    def _refuse(self, node: ast.AST, words: str) -> UnsupportedKernel:
        return UnsupportedKernel(f"{self.name}: {words}\n  at {self.file}:{getattr(node, 'lineno', 0)}")

    def _static(self, node: ast.expr) -> tuple[bool, Any]:
        """(whether the expression is a name from outside the function, its value)."""
        if isinstance(node, ast.Name) and node.id not in self._locals:
            if node.id not in self._outside:
                raise self._refuse(node, f"the name {node.id} is not known")
            return True, self._outside[node.id]
        if isinstance(node, ast.Attribute):
            known, value = self._static(node.value)
            if known:
                name = as_cuda_name(value)
                try:
                    return True, getattr(value if name is None else name, node.attr)
                except AttributeError as error:
                    raise self._refuse(node, str(error)) from None
        return False, None

    def _expression(self, node: ast.expr, wanted_for: str = "") -> ast.expr:
        """The expression that computes it for all threads; `wanted_for` names an array that it makes."""
        if isinstance(node, ast.Constant):
            return self._constant(values.typed(node.value))
        known, value = self._static(node)
        if known:
            return self._value(node, value)
        if isinstance(node, ast.Name):
            return ast.Name(node.id, ast.Load())
        if isinstance(node, ast.BinOp):
            operands = [self._expression(node.left), self._expression(node.right)]
            return ast.Call(self._constant(BINARY[type(node.op)]), operands, [])
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
                return self._constant(values.typed(-node.operand.value))  # type: ignore[operator]
            return ast.Call(self._constant(_UNARY[type(node.op)]), [self._expression(node.operand)], [])
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.BoolOp):
            return self._boolean(node)
        if isinstance(node, ast.IfExp):
            sides = [self._expression(side) for side in (node.body, node.orelse)]
            if _is_harmless(node.body) and _is_harmless(node.orelse):
                condition = ast.Call(self._constant(values.truth), [self._expression(node.test)], [])
                return self._runtime("choose", condition, *sides)
            return self._runtime("select", self._expression(node.test), *map(_later, sides), self._site(node))
        if isinstance(node, ast.Subscript):
            return self._of_memory("load", self._expression(node.value), self._index(node.slice), self._site(node))
        if isinstance(node, ast.Attribute):
            at = [self._expression(node.value), ast.Constant(node.attr), self._site(node)]
            return ast.Call(self._constant(memory.attribute), at, [])
        if isinstance(node, (ast.Tuple, ast.List)):
            return ast.Tuple([self._expression(part) for part in node.elts], ast.Load())
        if isinstance(node, ast.Call):
            return self._call(node, wanted_for)
        raise self._refuse(node, f"the expression `{ast.unparse(node)}` is not known here")

    def _value(self, node: ast.expr, value: Any) -> ast.expr:
        """A value from outside the function."""
        name = as_cuda_name(value)
        if name is not None:
            first, _, axis = name.path.partition(".")
            if first in language.INDICES and axis in tuple(language.AXES):
                triple = ast.Attribute(ast.Name(THREADS, ast.Load()), language.INDICES[first], ast.Load())
                return ast.Subscript(triple, ast.Constant(language.AXES.index(axis)), ast.Load())
            if name.path == "laneid":
                return ast.Attribute(ast.Name(THREADS, ast.Load()), "lane_of", ast.Load())
            if name.path in language.CONSTANTS:
                return self._constant(np.int64(language.CONSTANTS[name.path]))
            raise self._refuse(node, f"cuda.{name.path} is no value that is known here")
        if isinstance(value, np.ndarray):
            return self._constant(global_array(ast.unparse(node), value, "const"))
        return self._constant(values.typed(value))

    def _index(self, node: ast.expr) -> ast.expr:
        if isinstance(node, ast.Slice):
            ends: list[ast.expr] = [
                ast.Constant(None) if e is None else self._expression(e) for e in (node.lower, node.upper, node.step)
            ]
            return ast.Call(self._constant(slice), ends, [])
        return self._expression(node)

    def _comparison(self, node: ast.Compare) -> ast.expr:
        operands = [self._expression(part) for part in (node.left, *node.comparators)]
        parts: list[ast.expr] = []
        for i, operation in enumerate(node.ops):
            if type(operation) not in _COMPARE:
                raise self._refuse(node, "`in` is not known here")
            if isinstance(operation, (ast.Is, ast.IsNot)):
                parts.append(
                    ast.Call(
                        self._constant(values.truth), [ast.Compare(operands[i], [operation], [operands[i + 1]])], []
                    )
                )
            else:
                parts.append(ast.Compare(operands[i], [operation], [operands[i + 1]]))
        found = parts[0]
        for part in parts[1:]:
            found = ast.Call(self._constant(values.both), [found, part], [])
        return found

    def _boolean(self, node: ast.BoolOp) -> ast.expr:
        conjunction = isinstance(node.op, ast.And)
        found = self._expression(node.values[0])
        for part in node.values[1:]:
            if _is_harmless(part):
                plain = values.both if conjunction else values.either
                found = ast.Call(self._constant(plain), [found, self._expression(part)], [])
            else:
                method = "both" if conjunction else "either"
                found = self._runtime(method, found, _later(self._expression(part)), self._site(part))
        return found

    def _call(self, node: ast.Call, wanted_for: str) -> ast.expr:
        known, function = self._static(node.func)
        if not known:
            return self._method(node)
        arguments = [self._expression(argument) for argument in node.args]
        named = [ast.keyword(k.arg, self._expression(k.value)) for k in node.keywords]
        threads = ast.Name(THREADS, ast.Load())
        name = as_cuda_name(function)
        if name is not None:
            return self._cuda_call(node, name, arguments, named, wanted_for)
        if function is len:
            return ast.Call(self._constant(memory.length), arguments, [])
        if function in (np.int64, np.uint64, np.bool_) or (
            isinstance(function, type) and issubclass(function, np.generic)
        ):
            return ast.Call(self._constant(values.cast(function)), arguments, [])
        if _hashable(function) and function in values.MATH:
            return ast.Call(self._constant(values.MATH[function]), arguments, [])
        other = self._device(function)
        if isinstance(other, Expressions):
            for parameter, argument in zip(other.parameters, node.args, strict=False):
                if parameter in other.writes:
                    self._is_written(argument)
            return ast.Call(self._constant(other.call), [threads, *arguments], named)
        if other is not None:
            for parameter, argument in zip(other.parameters, node.args, strict=False):
                if parameter in other.writes:
                    self._is_written(argument)
            return ast.Call(self._constant(other.run), [threads, self._site(node), *arguments], named)
        raise self._refuse(node, f"{ast.unparse(node.func)} cannot be called here")

    def _cuda_call(
        self, node: ast.Call, name: CudaName, arguments: list[ast.expr], named: list[ast.keyword], wanted_for: str
    ) -> ast.expr:
        path, threads = name.path, ast.Name(THREADS, ast.Load())
        if path in language.ALLOCATES:
            where = [self._site(node)] if path == "shared.array" else []
            made = self._of_memory(language.ALLOCATES[path], *where, ast.Constant(wanted_for or "array"), *arguments)
            made.keywords = named
            return made
        if path == "const.array_like":
            return arguments[0]
        if path.startswith("libdevice."):
            return ast.Call(self._constant(values.libdevice(path.removeprefix("libdevice."))), arguments, [])
        if path not in language.CALLS:
            raise self._refuse(node, f"cuda.{path} is not known here")
        if path in language.CHANGES_MEMORY:
            self._is_written(node.args[0])
        return ast.Call(self._constant(language.CALLS[path]), [threads, self._site(node), *arguments], named)

    def _method(self, node: ast.Call) -> ast.expr:
        if not isinstance(node.func, ast.Attribute) or node.keywords:
            raise self._refuse(node, f"{ast.unparse(node.func)} cannot be called here")
        owner = self._expression(node.func.value)
        arguments = [self._expression(argument) for argument in node.args]
        if node.func.attr == "view":
            return ast.Call(self._constant(memory.view), [owner, *arguments], [])
        if node.func.attr == "type":  # x.dtype.type(value)
            return ast.Call(self._constant(values.cast_to), [owner, *arguments], [])
        raise self._refuse(node, f"the method {node.func.attr} is not known here")

    def _is_written(self, node: ast.expr) -> None:
        """Remembers that an array is written: a parameter, or any of them where it is not plain which."""
        if isinstance(node, ast.Name) and node.id in self.parameters:
            self.writes.add(node.id)
        elif not (isinstance(node, ast.Name) and node.id in self._own_arrays):
            self.writes |= set(self.parameters)


def arguments_of(names: list[str], defaults: list[ast.expr]) -> ast.arguments:
    """The parameters of a function to be made."""
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, list(defaults))


def _later(node: ast.expr) -> ast.expr:
    return ast.Lambda(arguments_of([], []), node)


def _is_harmless(node: ast.expr) -> bool:
    """Whether computing it for threads that do not need it can do nothing wrong."""
    return not any(isinstance(part, (ast.Call, ast.Subscript, ast.IfExp)) for part in ast.walk(node))


def _hashable(value: Any) -> bool:
    return isinstance(value, (types.BuiltinFunctionType, np.ufunc, type))
