"""From a kernel's source to a function that runs many threads at once.

Owns `rewrite`. What always holds: the made function has the kernel's statements in the kernel's order and on its lines,
so that a traceback shows them; names that are not the kernel's own are looked up once, here, as Numba would.

    if i < n:                   b = branch(threads, i < n, 7)
        out[i] = x[i] * 2       if b.then():
                                    store(threads, out, i, multiply(load(threads, x, i, 8), two), 8)
                                b.join()
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .expressions import BINARY, THREADS, Expressions, arguments_of
from .faults import UnsupportedKernel
from .lifetimes import forgetful_assignments
from .masks import Loop, branch
from .source import tree_of

_EXITS = (ast.Return, ast.Break, ast.Continue)


class Rewritten(Expressions):
    """A kernel or device function, rewritten: `call(threads, *arguments)`. `writes` are parameters it may write."""

    def __init__(self, function: Callable[..., Any], device: Callable[[Any], Any]) -> None:
        tree = tree_of(function)
        super().__init__(function, tree, device)
        if tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or tree.args.posonlyargs:
            raise UnsupportedKernel(f"{self.name}: only plain parameters are known here")
        self._forgets = forgetful_assignments(tree)
        self._loops: list[str] = []
        body = [self._unset(), *self._function_body(tree)]
        defaults = [self._expression(default) for default in tree.args.defaults]
        made = ast.parse(f"def {self.name}(): pass").body[0]
        assert isinstance(made, ast.FunctionDef)
        made.args, made.body = arguments_of([THREADS, *self.parameters], defaults), body
        ast.copy_location(made, tree)
        module = ast.fix_missing_locations(ast.Module([made], []))
        scope: dict[str, Any] = dict(self.names)
        exec(compile(module, self.file, "exec"), scope)
        self.call = scope[self.name]

    def _unset(self) -> ast.stmt:
        own = sorted(self._locals - set(self.parameters))
        targets: list[ast.expr] = [ast.Name(name, ast.Store()) for name in own]
        return ast.Assign(targets, ast.Constant(None)) if targets else ast.Pass()

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
        operate = self._constant(BINARY[type(node.op)])
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
        old = self._of_memory("load", *at, self._site(node))
        new = ast.Call(operate, [old, self._expression(node.value)], [])
        self._is_written(node.target.value)
        return [*made, ast.Expr(self._of_memory("store", *at, new, self._site(node)))]

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
            return [ast.Expr(self._of_memory("store", *at, value, self._site(target)))]
        raise self._refuse(target, "this cannot be assigned")

    def _if(self, node: ast.If) -> list[ast.stmt]:
        name = self._temporary()
        split = ast.Call(
            self._constant(branch), [ast.Name(THREADS, ast.Load()), self._expression(node.test), self._site(node)], []
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
        made = ast.Call(self._constant(Loop), [ast.Name(THREADS, ast.Load()), self._site(node)], [])
        return ast.Assign([ast.Name(name, ast.Store())], made)

    def _break(self, node: ast.Break) -> list[ast.stmt]:
        return [ast.Expr(_call(self._loops[-1], "leave"))]

    def _continue(self, node: ast.Continue) -> list[ast.stmt]:
        return [ast.Expr(_call(self._loops[-1], "skip"))]

    def _return(self, node: ast.Return) -> list[ast.stmt]:
        value = ast.Constant(None) if node.value is None else self._expression(node.value)
        return [ast.Expr(self._runtime("give", value, self._site(node)))]


def rewrite(function: Callable[..., Any], device: Callable[[Any], Any]) -> Rewritten:
    """Rewrites a kernel; `device(value)` gives the rewritten function or the intrinsic that a called value is."""
    return Rewritten(function, device)


def _call(name: str, method: str, *arguments: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name(name, ast.Load()), method, ast.Load()), list(arguments), [])


def _name_of_target(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""
