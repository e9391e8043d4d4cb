"""Kernels compiled to machine code once, and kept on disk.

Owns `compile_kernel`. What always holds: a kernel is a function `(call, thread, threads)` of three int64 that returns
nothing and raises nothing; what is on disk is taken only when every source file of this backend, Numba and the
processor are the same as when it was compiled, whichever file a change is in.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba import types
from numba.core import caching
from numba.core.ccallback import CFunc

Address = int

CACHE_VARIABLE = "SLOTWISE_CACHE"
KEPT_VERSIONS = 4
"""Folders of compiled kernels that are kept, the newest ones: one for each version of the sources used lately."""

_OPTIONS = {"nopython": True, "error_model": "numpy"}
_KERNEL = (types.int64, types.int64, types.int64)
_alive: list[Any] = []


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: in `$SLOTWISE_CACHE`, else in the user's cache folder, else in a temporary one."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slotwise"
    folder = base / "numba_cpu" / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        versions = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in versions[KEPT_VERSIONS:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="slotwise-"))
    return folder


class _Locator(caching._CacheLocator):  # type: ignore[misc]
    """Finds the cache of any kernel of this backend in `cache_folder()`."""

    def __init__(self, function: Any, file: str) -> None:
        self._py_file = file
        self._line = function.__code__.co_firstlineno

    def get_cache_path(self) -> str:
        """The folder of this version of the sources."""
        return str(cache_folder())

    def get_source_stamp(self) -> int:
        """Nothing to compare: the folder's name has a digest of all sources."""
        return 0

    def get_disambiguator(self) -> str:
        """The line, for functions of one name."""
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        """A locator for any function."""
        return cls(py_func, py_file)


class _CacheOfKernels(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheOfKernels


def compile_kernel(function: Callable[..., None], arguments: tuple[types.Type, ...] = _KERNEL) -> Address:
    """Compile `function` to machine code, or take it from disk; returns its address, good for the process's life.

    Its free variables must be plain numbers: they become constants, and part of what a kernel on disk is known by.
    """
    kernel = CFunc(function, (arguments, types.void), {}, dict(_OPTIONS))
    kernel._cache = _Cache(function)
    # Two processes that start together compile a kernel once: the second finds it on disk.
    with open(cache_folder() / f"{function.__module__}.{function.__name__}.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        kernel.compile()
    _alive.append(kernel)
    return int(kernel.address)
