"""Kernels compiled to machine code once, and kept on disk.

Owns `compile_kernel`. What always holds: a kernel is a function `(call, thread, threads)` of three int64 that returns
nothing and raises nothing; what is on disk is taken only when every source file of this backend, Numba and the
processor are the same as when it was compiled, whichever file a change is in. Where the folder cannot be written,
kernels are compiled all the same, and nothing is left behind. A process logs that it compiles before the first kernel
that it does compile: as information, or as a warning where the kernels cannot be kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
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
_log = logging.getLogger(__name__)


@functools.cache
def cache_folder() -> Path:
    """Where compiled kernels are kept: in `$SLOTWISE_CACHE`, else in the user's cache folder. It need not exist yet."""
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    chosen = os.environ.get(CACHE_VARIABLE)
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slotwise"
    return base / "numba_cpu" / digest.hexdigest()[:16]


@functools.cache
def why_not_kept(folder: Path) -> OSError | None:
    """None where kernels can be kept in `folder`, which is there then; else the reason, with nothing left behind.

    What the oldest versions of the sources compiled is taken away.
    """
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        os.utime(folder)
        versions = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError as error:
        for part in missing:
            with contextlib.suppress(OSError):
                part.rmdir()
        return error
    for old in versions[KEPT_VERSIONS:]:
        shutil.rmtree(old, ignore_errors=True)
    return None


@functools.cache
def _say_compiling(folder: Path) -> None:
    error = why_not_kept(folder)
    if error is None:
        _log.info("kernels are compiled once, which takes a moment, and kept in %s for later starts", folder)
        return
    _log.warning(
        "kernels are compiled at every start: they cannot be kept in %s (%s); name a folder that can be with %s",
        folder,
        error.strerror or error,
        CACHE_VARIABLE,
    )


@functools.cache
def _say_unkept(folder: Path, reason: str) -> None:
    _log.warning("a compiled kernel could not be kept in %s: %s; later starts compile it again", folder, reason)


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
    """Numba's cache of a function, for a folder that may be missing, full or not ours to write."""

    _impl_class = _CacheOfKernels

    def load_overload(self, signature: Any, context: Any) -> Any:
        """What is on disk; None where nothing is, and then it is said that compiling begins."""
        with contextlib.suppress(OSError):
            found = super().load_overload(signature, context)
            if found is not None:
                return found
        _say_compiling(cache_folder())
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a compiled kernel, where it can be kept."""
        folder = cache_folder()
        if why_not_kept(folder) is None:
            try:
                super().save_overload(signature, result)
            except OSError as error:  # the disk is full, say
                _say_unkept(folder, error.strerror or type(error).__name__)


def compile_kernel(function: Callable[..., None], arguments: tuple[types.Type, ...] = _KERNEL) -> Address:
    """Compile `function` to machine code, or take it from disk; returns its address, good for the process's life.

    Its free variables must be plain numbers: they become constants, and part of what a kernel on disk is known by.
    """
    kernel: Any = CFunc(function, (arguments, types.void), {}, dict(_OPTIONS))
    kernel._cache = _Cache(function)
    with _turn(f"{function.__module__}.{function.__name__}"):
        kernel.compile()
    _alive.append(kernel)
    return int(kernel.address)


@contextlib.contextmanager
def _turn(name: str) -> Iterator[None]:
    """Have two processes that start together compile a kernel once: the second finds it on disk."""
    folder = cache_folder()
    with contextlib.ExitStack() as stack:
        if why_not_kept(folder) is None:
            with contextlib.suppress(OSError):  # a file of another user's: then both compile
                fcntl.flock(stack.enter_context(open(folder / f"{name}.lock", "w")), fcntl.LOCK_EX)
        yield
