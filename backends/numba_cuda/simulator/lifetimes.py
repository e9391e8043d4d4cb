"""Which assignments may forget the old value.

Owns `forgetful_assignments`. What always holds: where only some threads run, an assignment must keep the others'
values, unless none of them reads the variable again before it assigns it anew; this module finds, from the source
alone, assignments of which that is certain.

The rule: every read of the variable comes after an assignment in the same list of statements, or in a list around it
(its *cover*, the innermost such list). An assignment may forget if no read's cover is a list strictly around the
assignment's own: a thread that does not run it then meets another before it reads.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from dataclasses import dataclass, field

Path = tuple[tuple[int, int], ...]
"""From the outside in: (list of statements, place in it)."""


@dataclass
class _Uses:
    assigned: list[tuple[Path, ast.AST]] = field(default_factory=list)
    read: list[Path] = field(default_factory=list)


def forgetful_assignments(function: ast.FunctionDef) -> set[ast.AST]:
    """The statements (`Assign`, `AugAssign`, `AnnAssign`, `For`) all of whose variables may forget."""
    uses: dict[str, _Uses] = defaultdict(_Uses)
    _Walk(uses).block(function.body, ())
    bad: set[ast.AST] = set()
    every: set[ast.AST] = set()
    for use in uses.values():
        covers = [_cover(read, use.assigned) for read in use.read]
        for path, statement in use.assigned:
            every.add(statement)
            own = [number for number, _ in path]
            if any(cover is None or (cover in own and cover != own[-1]) for cover in covers):
                bad.add(statement)
    return every - bad


def _cover(read: Path, assigned: list[tuple[Path, ast.AST]]) -> int | None:
    """The innermost list around the read in which an assignment stands before it; None when there is none."""
    for depth in reversed(range(len(read))):
        number, place = read[depth]
        for path, _ in assigned:
            if len(path) == depth + 1 and path[-1][0] == number and path[-1][1] < place:
                return number
    return None


class _Walk:
    def __init__(self, uses: dict[str, _Uses]) -> None:
        self._uses = uses
        self._lists = 0

    def block(self, statements: list[ast.stmt], outer: Path, target: tuple[ast.expr, ast.AST] | None = None) -> None:
        self._lists += 1
        number = self._lists
        if target is not None:
            self._assign(target[0], (*outer, (number, -1)), target[1])
        for place, statement in enumerate(statements):
            self._statement(statement, (*outer, (number, place)))

    def _statement(self, statement: ast.stmt, path: Path) -> None:
        if isinstance(statement, ast.Assign):
            self._reads(statement.value, path)
            for target in statement.targets:
                self._assign(target, path, statement)
        elif isinstance(statement, ast.AugAssign):
            self._reads(statement.value, path)
            if isinstance(statement.target, ast.Name):
                self._uses[statement.target.id].read.append(path)
            self._assign(statement.target, path, statement)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            self._reads(statement.value, path)
            self._assign(statement.target, path, statement)
        elif isinstance(statement, ast.If):
            self._reads(statement.test, path)
            self.block(statement.body, path)
            self.block(statement.orelse, path)
        elif isinstance(statement, ast.While):
            self._reads(statement.test, path)
            self.block(statement.body, path)
        elif isinstance(statement, ast.For):
            self._reads(statement.iter, path)
            self.block(statement.body, path, (statement.target, statement))
        else:
            self._reads(statement, path)

    def _assign(self, target: ast.expr, path: Path, statement: ast.AST) -> None:
        if isinstance(target, ast.Name):
            self._uses[target.id].assigned.append((path, statement))
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self._assign(part, path, statement)
        else:
            self._reads(target, path)

    def _reads(self, node: ast.AST, path: Path) -> None:
        for part in ast.walk(node):
            if isinstance(part, ast.Name):
                self._uses[part.id].read.append(path)
