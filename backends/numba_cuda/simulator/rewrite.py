"""From a kernel's source to a function that runs many threads at once.

Owns `rewrite`. What always holds: the made function has the kernel's statements in the kernel's order and on its lines,
so that a traceback shows them; names that are not the kernel's own are looked up once, here, as Numba would.

    if i < n:                       b1 = _t.branch(less(i, n), 7)
        out[i] = x[i] * 2           if b1.then():
                                        _t.store(out, i, multiply(_t.load(x, i, 8), c2), 8)
                                    b1.join()
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
import textwrap
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from . import language, values
from .arrays import Array, global_array
from .faults import UnsupportedKernel, site_number
from .language import CudaName, as_cuda_name
from .lifetimes import forgetful_assignments

THREADS = "_sim_threads"

_BINARY = {
    ast.Add: values.add, ast.Sub: values.subtract, ast.Mult: values.multiply, ast.Div: values.divide,
    ast.FloorDiv: values.floor_divide, ast.Mod: values.remainder, ast.Pow: values.power, ast.BitAnd: values.bit_and,
    ast.BitOr: values.bit_or, ast.BitXor: values.bit_xor, ast.LShift: values.shift_left, ast.RShift: values.shift_right,
}  # fmt: skip
_UNARY = {ast.USub: values.negative, ast.UAdd: values.positive, ast.Invert: values.invert, ast.Not: values.logical_not}
_COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_EXITS = (ast.Return, ast.Break, ast.Continue)


class Rewritten:
    """A kernel or device function, rewritten. `call(threads, *arguments)`; `writes` are parameters that it may write."""

    def __init__(self, function: Callable[..., Any], device: Callable[[Any], Any]) -> None:
        self.function, self.name = function, function.__name__
        self._device = device
        self.file = function.__code__.co_filename
        tree = _tree_of(function)
        self.parameters = [argument.arg for argument in tree.args.args]
        if tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or tree.args.posonlyargs:
            raise UnsupportedKernel(f"{self.name}: only plain parameters are known here")
        self._locals = set(self.parameters) | {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        self._outside = _names_outside(function)
        self.names: dict[str, Any] = {}
        self._temporaries = 0
        self._forgets = forgetful_assignments(tree)
        self.writes: set[str] = set()
        self._loops: list[str] = []
        self._own_arrays = _own_arrays(tree)
        body = [self._unset(), *self._function_body(tree)]
        made = ast.FunctionDef(
            name=self.name, args=_arguments([THREADS, *self.parameters], tree.args.defaults), body=body, decorator_list=[],
            returns=None, type_params=[],
        )  # fmt: skip
        made.args.defaults = [self._expression(default) for default in tree.args.defaults]
        module = ast.Module([made], [])
        ast.copy_location(made, tree)
        ast.fix_missing_locations(module)
        self.source = module
        scope: dict[str, Any] = dict(self.names)
        exec(compile(module, self.file, "exec"), scope)
        self.call: Callable[..., Any] = scope[self.name]

    # Names and constants.

    def _unset(self) -> ast.stmt:
        own = sorted(self._locals - set(self.parameters))
        targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in own]
        return ast.Assign(targets, ast.Constant(None)) if targets else ast.Pass()

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

    # Statements.

    def _function_body(self, tree: ast.FunctionDef) -> list[ast.stmt]:
        statements = tree.body
        if statements and isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
            statements = statements[1:]
        enter = ast.Expr(self._runtime("enter"))
        leave = ast.Return(self._runtime("leave"))
        return [enter, *self._block(statements), leave]

    def _block(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        for place, statement in enumerate(statements):
            new = self._statement(statement)
            for part in new:
                ast.copy_location(part, statement)
                for inner in ast.walk(part):
                    if not hasattr(inner, "lineno") and "lineno" in getattr(inner, "_attributes", ()):
                        ast.copy_location(inner, statement)
            made += new
            if isinstance(statement, _EXITS):
                break
            if place + 1 < len(statements) and any(isinstance(node, _EXITS) for node in ast.walk(statement)):
                rest = self._block(statements[place + 1 :])
                alive = ast.Attribute(ast.Name(THREADS, ast.Load()), "alive", ast.Load())
                made.append(ast.If(alive, rest or [ast.Pass()], []))
                break
        return made or [ast.Pass()]

    def _statement(self, node: ast.stmt) -> list[ast.stmt]:
        handler = getattr(self, f"_{type(node).__name__.lower()}", None)
        if handler is None:
            raise self._refuse(node, f"`{type(node).__name__.lower()}` is not known here")
        found: list[ast.stmt] = handler(node)
        return found

    def _pass(self, node: ast.Pass) -> list[ast.stmt]:
        return [ast.Pass()]

    def _expr(self, node: ast.Expr) -> list[ast.stmt]:
        return [ast.Pass()] if isinstance(node.value, ast.Constant) else [ast.Expr(self._expression(node.value))]

    def _assign(self, node: ast.Assign) -> list[ast.stmt]:
        value = self._expression(node.value, _name_of_target(node.targets[0]))
        if len(node.targets) == 1:
            return self._bind(node.targets[0], value, node)
        name = self._temporary()
        made: list[ast.stmt] = [ast.Assign([ast.Name(name, ast.Store())], value)]
        for target in node.targets:
            made += self._bind(target, ast.Name(name, ast.Load()), node)
        return made

    def _annassign(self, node: ast.AnnAssign) -> list[ast.stmt]:
        if node.value is None:
            return [ast.Pass()]
        return self._bind(node.target, self._expression(node.value, _name_of_target(node.target)), node)

    def _augassign(self, node: ast.AugAssign) -> list[ast.stmt]:
        operate = self._constant(_BINARY[type(node.op)])
        if isinstance(node.target, ast.Name):
            old = self._expression(ast.Name(node.target.id, ast.Load()))
            return self._bind(node.target, ast.Call(operate, [old, self._expression(node.value)], []), node)
        if not isinstance(node.target, ast.Subscript):
            raise self._refuse(node, "an attribute is assigned")
        array, index = self._temporary(), self._temporary()
        made: list[ast.stmt] = [
            ast.Assign([ast.Name(array, ast.Store())], self._expression(node.target.value)),
            ast.Assign([ast.Name(index, ast.Store())], self._index(node.target.slice)),
        ]
        at: list[ast.expr] = [ast.Name(array, ast.Load()), ast.Name(index, ast.Load())]
        old = self._runtime("load", *at, self._site(node))
        new = ast.Call(operate, [old, self._expression(node.value)], [])
        self._is_written(node.target.value)
        return [*made, ast.Expr(self._runtime("store", *at, new, self._site(node)))]

    def _bind(self, target: ast.expr, value: ast.expr, statement: ast.AST) -> list[ast.stmt]:
        """Statements that assign `value`."""
        if isinstance(target, ast.Name):
            if statement in self._forgets:
                return [ast.Assign([ast.Name(target.id, ast.Store())], value)]
            name = self._temporary()
            new = ast.Name(name, ast.Load())
            partial = ast.Attribute(ast.Name(THREADS, ast.Load()), "partial", ast.Load())
            kept = ast.IfExp(partial, self._runtime("blend", ast.Name(target.id, ast.Load()), new), new)
            return [
                ast.Assign([ast.Name(name, ast.Store())], value),
                ast.Assign([ast.Name(target.id, ast.Store())], kept),
            ]
        if isinstance(target, (ast.Tuple, ast.List)):
            names = [self._temporary() for _ in target.elts]
            parts: list[ast.expr] = [ast.Name(name, ast.Store()) for name in names]
            made: list[ast.stmt] = [ast.Assign([ast.Tuple(parts, ast.Store())], value)]
            for part, name in zip(target.elts, names, strict=True):
                made += self._bind(part, ast.Name(name, ast.Load()), statement)
            return made
        if isinstance(target, ast.Subscript):
            self._is_written(target.value)
            at = (self._expression(target.value), self._index(target.slice))
            return [ast.Expr(self._runtime("store", *at, value, self._site(target)))]
        raise self._refuse(target, "this cannot be assigned")

    def _if(self, node: ast.If) -> list[ast.stmt]:
        name = self._temporary()
        split = ast.Call(
            self._constant(_branch), [ast.Name(THREADS, ast.Load()), self._expression(node.test), self._site(node)], []
        )
        made: list[ast.stmt] = [
            ast.Assign([ast.Name(name, ast.Store())], split),
            ast.If(_call(name, "then"), self._block(node.body), []),
        ]
        if node.orelse:
            made.append(ast.If(_call(name, "orelse"), self._block(node.orelse), []))
        return [*made, ast.Expr(_call(name, "join"))]

    def _while(self, node: ast.While) -> list[ast.stmt]:
        if node.orelse:
            raise self._refuse(node, "`while ... else` is not known here")
        name = self._temporary()
        self._loops.append(name)
        again = ast.If(ast.UnaryOp(ast.Not(), _call(name, "next")), [ast.Break()], [])
        loop = ast.While(_call(name, "test", self._expression(node.test)), [*self._block(node.body), again], [])
        self._loops.pop()
        return [self._begin(name, node), loop, ast.Expr(_call(name, "end"))]

    def _for(self, node: ast.For) -> list[ast.stmt]:
        if node.orelse:
            raise self._refuse(node, "`for ... else` is not known here")
        name, item = self._temporary(), self._temporary()
        known, function = self._static(node.iter.func) if isinstance(node.iter, ast.Call) else (False, None)
        if known and function is range and isinstance(node.iter, ast.Call):
            items = _call(name, "rounds", *map(self._expression, node.iter.args))
        else:
            items = _call(name, "items", self._expression(node.iter))
        self._loops.append(name)
        body = [*self._bind(node.target, ast.Name(item, ast.Load()), node), *self._block(node.body)]
        self._loops.pop()
        loop = ast.For(ast.Name(item, ast.Store()), items, body, [])
        return [self._begin(name, node), loop, ast.Expr(_call(name, "end"))]

    def _begin(self, name: str, node: ast.AST) -> ast.stmt:
        made = ast.Call(self._constant(_loop), [ast.Name(THREADS, ast.Load()), self._site(node)], [])
        return ast.Assign([ast.Name(name, ast.Store())], made)

    def _break(self, node: ast.Break) -> list[ast.stmt]:
        return [ast.Expr(_call(self._loops[-1], "leave"))]

    def _continue(self, node: ast.Continue) -> list[ast.stmt]:
        return [ast.Expr(_call(self._loops[-1], "skip"))]

    def _return(self, node: ast.Return) -> list[ast.stmt]:
        value = ast.Constant(None) if node.value is None else self._expression(node.value)
        return [ast.Expr(self._runtime("give", value, self._site(node)))]

    # Expressions.

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
            return ast.Call(self._constant(_BINARY[type(node.op)]), operands, [])
        if isinstance(node, ast.UnaryOp):
            if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
                return self._constant(values.typed(-node.operand.value))  # type: ignore[operator]
            return ast.Call(self._constant(_UNARY[type(node.op)]), [self._expression(node.operand)], [])
        if isinstance(node, ast.Compare):
            return self._comparison(node)
        if isinstance(node, ast.BoolOp):
            return self._boolean(node)
        if isinstance(node, ast.IfExp):
            sides = [_later(self._expression(side)) for side in (node.body, node.orelse)]
            return self._runtime("select", self._expression(node.test), *sides, self._site(node))
        if isinstance(node, ast.Subscript):
            return self._runtime("load", self._expression(node.value), self._index(node.slice), self._site(node))
        if isinstance(node, ast.Attribute):
            at = [ast.Name(THREADS, ast.Load()), self._expression(node.value), ast.Constant(node.attr), self._site(node)]
            return ast.Call(self._constant(_attribute), at, [])
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
                    ast.Call(self._constant(values.truth), [ast.Compare(operands[i], [operation], [operands[i + 1]])], [])
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
            return ast.Call(self._constant(_length), arguments, [])
        if function in (np.int64, np.uint64, np.bool_) or (isinstance(function, type) and issubclass(function, np.generic)):
            return ast.Call(self._constant(_cast(function)), arguments, [])
        if _hashable(function) and function in values.MATH:
            return ast.Call(self._constant(values.MATH[function]), arguments, [])
        other = self._device(function)
        if isinstance(other, Rewritten):
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
            made = self._runtime(language.ALLOCATES[path], *where, ast.Constant(wanted_for or "array"), *arguments)
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
            return ast.Call(self._constant(_view), [owner, *arguments], [])
        if node.func.attr == "type":  # x.dtype.type(value)
            return ast.Call(self._constant(_cast_to), [owner, *arguments], [])
        raise self._refuse(node, f"the method {node.func.attr} is not known here")

    def _is_written(self, node: ast.expr) -> None:
        """Remembers that an array is written: a parameter, or any of them where it is not plain which."""
        if isinstance(node, ast.Name) and node.id in self.parameters:
            self.writes.add(node.id)
        elif not (isinstance(node, ast.Name) and node.id in self._own_arrays):
            self.writes |= set(self.parameters)


def rewrite(function: Callable[..., Any], device: Callable[[Any], Any]) -> Rewritten:
    """Rewrites a kernel; `device(value)` gives the rewritten function or the intrinsic that a called value is."""
    return Rewritten(function, device)


def _tree_of(function: Callable[..., Any]) -> ast.FunctionDef:
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise UnsupportedKernel(f"the source of {function!r} is not to be had: {error}") from None
    tree = ast.parse(textwrap.dedent("".join(lines)))
    ast.increment_lineno(tree, first - 1)
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef):
        raise UnsupportedKernel(f"{function!r} is not made by `def`")
    return node


def _names_outside(function: Callable[..., Any]) -> dict[str, Any]:
    """What names from outside mean in a function: builtins, globals, then what it closes over."""
    found = dict(vars(builtins)) | dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def _own_arrays(tree: ast.FunctionDef) -> set[str]:
    """Variables that are shared or local arrays made here and nothing else."""
    made: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            array = ast.unparse(node.value.func).endswith(("shared.array", "local.array"))
            (made if array else other).update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.For)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            other.update(n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
    return made - other


def _arguments(names: list[str], defaults: list[ast.expr]) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, list(defaults))


def _call(name: str, method: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name(name, ast.Load()), method, ast.Load()), list(arguments), [])


def _later(node: ast.expr) -> ast.expr:
    return ast.Lambda(_arguments([], []), node)


def _name_of_target(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _is_harmless(node: ast.expr) -> bool:
    """Whether computing it for threads that do not need it can do nothing wrong."""
    return not any(isinstance(part, (ast.Call, ast.Subscript, ast.IfExp)) for part in ast.walk(node))


def _hashable(value: Any) -> bool:
    return isinstance(value, (types.BuiltinFunctionType, np.ufunc, type))


# What the rewritten kernel calls besides operators.


def _branch(threads: Any, condition: Any, site: int) -> Any:
    from .masks import branch

    return branch(threads, condition, site)


def _loop(threads: Any, site: int) -> Any:
    from .masks import Loop

    return Loop(threads, site)


_CASTS: dict[Any, Callable[[Any], Any]] = {}


def _cast(kind: Any) -> Callable[[Any], Any]:
    if kind not in _CASTS:
        _CASTS[kind] = values.cast(kind)
    return _CASTS[kind]


def _cast_to(owner: Any, value: Any) -> Any:
    return value.astype(owner)


def _length(value: Any) -> Any:
    return np.int64(value.shape[0] if isinstance(value, Array) else len(value))


def _view(value: Any, dtype: Any) -> Any:
    if isinstance(value, Array):
        raise UnsupportedKernel(f"an array, {value.name}, is viewed as another type")
    return values.reinterpret(value, dtype)


def _attribute(threads: Any, owner: Any, name: str, site: int) -> Any:
    if isinstance(owner, Array):
        if name == "shape":
            return tuple(map(np.int64, owner.shape))
        if name in ("size", "itemsize"):
            return np.int64(getattr(owner, name))
        if name == "ndim":
            return np.int64(len(owner.shape))
        if name == "dtype":
            return owner.dtype
        if name == "strides":
            return tuple(np.int64(s * owner.itemsize) for s in owner.strides)
    if name == "dtype" and isinstance(owner, (np.ndarray, np.generic)):
        return owner.dtype
    raise UnsupportedKernel(f"the attribute {name} of {owner!r} is not known here")
