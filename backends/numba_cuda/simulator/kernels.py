"""Kernels, device functions and intrinsics: one object for the simulator, a GPU and an ahead-of-time compiler.

Owns `kernel`, `device`, `intrinsic` and `Launch`. What always holds: Numba is imported when something is compiled for a
GPU and not before; what Numba compiles is the very function that is simulated, with its global names bound to Numba's
counterparts.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .arrays import Array, global_array, share_records
from .faults import BadLaunch
from .intrinsics import Intrinsic
from .language import CudaName, as_cuda_name
from .races import THREAD_LIMIT
from .rewrite import Rewritten, rewrite
from .threads import Threads
from .values import typed

TOGETHER = 8192
"""Threads, about, that are simulated side by side: enough to make numpy's own cost small, few enough for a cache."""

_REWRITTEN: dict[Any, Rewritten] = {}


def _rewritten(value: Any) -> Any:
    """What a kernel calls: the rewritten device function, or the intrinsic itself."""
    if isinstance(value, Intrinsic):
        return value
    if isinstance(value, Device):
        value = value.python
    function = getattr(value, "py_func", value)  # a dispatcher of Numba's has its plain function in py_func
    if not isinstance(function, types.FunctionType):
        return None
    if function not in _REWRITTEN:
        _REWRITTEN[function] = rewrite(function, _rewritten)
    return _REWRITTEN[function]


class Device:
    """A function that kernels call."""

    def __init__(self, python: Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        self.python, self.options = python, options or {}
        functools.update_wrapper(self, python)

    def __call__(self, *arguments: Any) -> Any:
        """Not outside a kernel."""
        raise TypeError(f"{self.python.__name__} runs inside kernels; use .simulate, or .compiled() on a GPU")

    def function(self) -> Callable[..., Any]:
        """The plain function, its global names bound to Numba's counterparts: for `numba.cuda.jit` or `compile_ptx`."""
        return _for_numba(self.python)

    @functools.cached_property
    def _compiled(self) -> Any:
        from numba import cuda

        return cuda.jit(device=True, **self.options)(self.function())

    def compiled(self) -> Any:
        """What `numba.cuda.jit` makes of it, the same object each time."""
        return self._compiled


class Kernel(Device):
    """A kernel."""

    @functools.cached_property
    def _compiled(self) -> Any:
        from numba import cuda

        return cuda.jit(**self.options)(self.function())

    def compiled(self) -> Any:
        """What `numba.cuda.jit` makes of it: `kernel.compiled()[grid, block, stream, shared_bytes](*arguments)`."""
        return self._compiled

    def prepare(
        self, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any], shared_bytes: int = 0,
        checks: bool = True,
    ) -> Launch:  # fmt: skip
        """A launch to call many times. Arrays are held, not copied; numbers are those of now."""
        return Launch(_rewritten(self.python), grid, block, args, shared_bytes, checks)

    def simulate(
        self, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any], shared_bytes: int = 0,
        checks: bool = True,
    ) -> None:  # fmt: skip
        """Runs it on this CPU. `grid` and `block` are one to three numbers, `shared_bytes` is dynamic shared memory.

        Raises a Fault for whatever the kernel does wrong. `checks=False` leaves the race checker and the check for
        unwritten shared memory out; indices are checked all the same.
        """
        self.prepare(grid, block, args, shared_bytes, checks)()


def kernel(python: Any = None, **options: Any) -> Any:
    """Decorator: a kernel. Options (`fastmath`, `lineinfo`, `max_registers`, ...) go to `numba.cuda.jit`."""
    if python is None:
        return lambda function: Kernel(function, options)
    return Kernel(getattr(python, "py_func", python), options)


def device(python: Any = None, **options: Any) -> Any:
    """Decorator: a function that kernels call. Options go to `numba.cuda.jit`."""
    if python is None:
        return lambda function: Device(function, options)
    return Device(getattr(python, "py_func", python), options)


class Launch:
    """One launch with its arguments bound; call it to run it."""

    def __init__(
        self, rewritten: Rewritten, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any],
        shared_bytes: int, checks: bool,
    ) -> None:  # fmt: skip
        self.grid, self.block = _three(grid, "grid"), _three(block, "block")
        self.block_size, self.shared_bytes, self.checks = math.prod(self.block), shared_bytes, checks
        self.block_bits = max(5, (self.block_size - 1).bit_length())
        if self.block_size > 1024:
            raise BadLaunch(f"{rewritten.name}: a block of {self.block_size} threads; a GPU takes 1024 at most")
        if len(args) != len(rewritten.parameters):
            raise BadLaunch(f"{rewritten.name} takes {len(rewritten.parameters)} arguments, found {len(args)}")
        if checks and math.prod(self.grid) << self.block_bits > THREAD_LIMIT:
            raise BadLaunch(
                f"{rewritten.name}: more threads than the race checker can number ({THREAD_LIMIT}); "
                "run it with checks=False"
            )
        self._rewritten = rewritten
        self._arguments = [_argument(n, value) for n, value in zip(rewritten.parameters, args, strict=True)]
        self._arrays = [a for a in self._arguments if isinstance(a, Array)]

    def __call__(self) -> None:
        """Runs all blocks."""
        if self.checks:
            share_records(self._arrays, self._rewritten.writes, self.block_bits)
        blocks = math.prod(self.grid)
        together = max(1, TOGETHER // self.block_size)
        with np.errstate(all="ignore"):
            for first in range(0, blocks, together):
                threads = Threads(self, first, min(together, blocks - first))
                self._rewritten.call(threads, *self._arguments)


def _three(size: int | Sequence[int], what: str) -> tuple[int, int, int]:
    given = (size,) if isinstance(size, (int, np.integer)) else tuple(size)
    if not 1 <= len(given) <= 3 or any(n < 1 for n in given):
        raise BadLaunch(f"a {what} of {size!r}; one to three numbers of 1 or more are needed")
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


def _argument(name: str, value: Any) -> Any:
    if isinstance(value, (bool, int, float, np.generic)):
        return typed(value)
    if isinstance(value, tuple):
        return tuple(_argument(f"{name}[{i}]", part) for i, part in enumerate(value))
    return value if value is None else global_array(name, value)


def _for_numba(python: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function whose names from outside mean what Numba knows."""
    code = python.__code__
    scope = {name: _counterpart(value) for name, value in python.__globals__.items() if name in _names_in(code)}
    scope["__builtins__"] = __builtins__
    cells = tuple(types.CellType(_counterpart(cell.cell_contents)) for cell in python.__closure__ or ())
    made = types.FunctionType(code, scope, python.__name__, python.__defaults__, cells)
    made.__module__, made.__doc__, made.__qualname__ = python.__module__, python.__doc__, python.__qualname__
    return made


def _names_in(code: types.CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*map(_names_in, inner)) if inner else set(code.co_names)


def _counterpart(value: Any) -> Any:
    name = as_cuda_name(value)
    if name is not None:
        return _numba_name(name)
    if isinstance(value, (Device, Intrinsic)):
        return value.compiled()
    return _device_of(value).compiled() if isinstance(value, types.FunctionType) else value


@functools.cache
def _device_of(function: types.FunctionType) -> Device:
    """A plain function that a kernel calls."""
    return Device(function)


def _numba_name(name: CudaName) -> Any:
    """What a name of `cuda` is in Numba."""
    from numba import cuda

    found: Any = cuda
    for part in filter(None, name.path.split(".")):
        found = _attribute_of(found, part)
    return found


def _attribute_of(owner: Any, name: str) -> Any:
    """An attribute, or a submodule that must be imported first (`libdevice`)."""
    if not hasattr(owner, name) and isinstance(owner, types.ModuleType):
        import importlib

        importlib.import_module(f"{owner.__name__}.{name}")
    return getattr(owner, name)


def simulate(
    function: Any, grid: int | Sequence[int], block: int | Sequence[int], args: Sequence[Any], shared_bytes: int = 0,
    checks: bool = True,
) -> None:  # fmt: skip
    """`Kernel.simulate` for a plain function, or for what `numba.cuda.jit` has made of one."""
    if not isinstance(function, Kernel):
        function = Kernel(getattr(function, "py_func", function))
    function.simulate(grid, block, args, shared_bytes, checks)
