"""A function's source and what its names mean.

Owns `tree_of`, `names_outside` and `own_arrays`. What always holds: names are looked up when a kernel is first run, as
Numba looks them up when it compiles; line numbers are those of the file.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from .faults import UnsupportedKernel


def tree_of(function: Callable[..., Any]) -> ast.FunctionDef:
    """Its definition, parsed; raises UnsupportedKernel when there is no source."""
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


def names_outside(function: Callable[..., Any]) -> dict[str, Any]:
    """What names from outside mean in a function: builtins, globals, then what it closes over."""
    found = dict(vars(builtins)) | dict(function.__globals__)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:
            continue
    return found


def own_arrays(tree: ast.FunctionDef) -> set[str]:
    """Variables that are shared or local arrays made here and nothing else."""
    made: set[str] = set()
    other: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            array = ast.unparse(node.value.func).endswith(("shared.array", "local.array"))
            (made if array else other).update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.For)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (n for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
            other.update(n.id for n in names if isinstance(n.ctx, ast.Store))  # `a[i] = x` makes no other `a`
    return made - other
