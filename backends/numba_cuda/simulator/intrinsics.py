"""Intrinsics: functions with two sides, one simulated and one that Numba compiles.

Owns `intrinsic` and `Active`. What always holds: the two sides stand in one declaration; a simulated side touches
memory through `Active` alone, which checks bounds, alignment and races as for any other access.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import copies, memory
from .arrays import Array
from .faults import DivergentWarp, UnsupportedKernel, site_text
from .threads import WARP, Threads


class Active:
    """The threads that run an intrinsic. `shape` is that of its arguments: (threads,), or (warps, 32)."""

    def __init__(self, threads: Threads, site: int, warp: bool, may_read: bool, may_write: tuple[Any, ...]) -> None:
        self._threads, self._site, self._may_read, self._may_write = threads, site, may_read, may_write
        self._lanes = threads.mask.lanes
        self.shape = (threads.mask.count // WARP, WARP) if warp else (threads.mask.count,)

    def load(self, array: Array, index: Any) -> Any:
        """`array[index]`; a number as index is flat."""
        self._check_readable(array)
        places = self._places(array, index)
        found = memory.fetch(self._threads, array, places, self._lanes, self._site)
        return np.broadcast_to(found, self._flat_shape).reshape(self.shape)

    def store(self, array: Array, index: Any, value: Any) -> None:
        """`array[index] = value`."""
        self._check_writable(array)
        places = np.broadcast_to(self._places(array, index), self._flat_shape)
        memory.put(self._threads, array, places, self._flat(value), self._lanes, self._site)

    def load_vector(self, array: Array, index: Any, count: int) -> tuple[Any, ...]:
        """`count` elements that lie side by side from `index` on, read as one wide access."""
        self._check_readable(array)
        places = self._vector(array, index, count)
        found = memory.fetch(self._threads, array, places, self._lanes, self._site)
        return tuple(np.ascontiguousarray(found[:, i]).reshape(self.shape) for i in range(count))

    def store_vector(self, array: Array, index: Any, values: Sequence[Any]) -> None:
        """Writes elements that lie side by side from `index` on as one wide access."""
        self._check_writable(array)
        places = self._vector(array, index, len(values))
        columns = np.stack([np.broadcast_to(self._flat(value), self._flat_shape) for value in values], 1)
        memory.put(self._threads, array, places, columns, self._lanes, self._site)

    def copy_later(self, array: Array, index: Any, values: Sequence[Any]) -> None:
        """As `store_vector`, done when the thread waits (`cp.async`); until then nobody may touch the place."""
        self._check_writable(array)
        places = self._vector(array, index, len(values))
        columns = np.stack([np.broadcast_to(self._flat(value), self._flat_shape) for value in values], 1)
        copies.begin(self._threads, array, places, columns.astype(array.dtype), self._site)

    def commit_copies(self) -> None:
        """Ends a group of copies (`cp.async.commit_group`)."""
        copies.commit(self._threads)

    def wait_copies(self, newest: int | None = None) -> None:
        """Waits for all copies of the thread, or for all groups but the `newest` so many (`cp.async.wait_group`)."""
        copies.finish(self._threads, newest)

    @property
    def _flat_shape(self) -> tuple[int]:
        return (self._threads.mask.count,)

    def _flat(self, value: Any) -> Any:
        return value.reshape(-1) if isinstance(value, np.ndarray) and value.ndim else np.asarray(value)[()]

    def _places(self, array: Array, index: Any) -> Any:
        parts = tuple(map(self._flat, index)) if isinstance(index, tuple) else (self._flat(index),)
        return memory.places(self._threads, array, parts, self._lanes, self._site)

    def _vector(self, array: Array, index: Any, count: int) -> Any:
        parts = tuple(map(self._flat, index)) if isinstance(index, tuple) else (self._flat(index),)
        first = np.broadcast_to(memory.places(self._threads, array, parts, self._lanes, self._site), self._flat_shape)
        step = array.strides[-1]
        if count > 1:
            last = (*parts[:-1], parts[-1] + (count - 1))
            memory.places(self._threads, array, last, self._lanes, self._site)
            if array.kind != "local" and step != 1:
                raise UnsupportedKernel(f"a wide access to {array.name}, whose elements do not lie side by side")
        memory.check_aligned(self._threads, array, first, count * array.itemsize, self._lanes, self._site)
        return first[:, None] + np.arange(count) * step

    def _check_readable(self, array: Array) -> None:
        if not self._may_read:
            raise UnsupportedKernel(
                f"an intrinsic reads {array.name} and does not say so; declare it with memory='r'\n"
                f"  at {site_text(self._site)}"
            )

    def _check_writable(self, array: Array) -> None:
        if not any(array is given for given in self._may_write):
            raise UnsupportedKernel(
                f"an intrinsic writes {array.name} and does not say so; declare it with memory='w'\n"
                f"  at {site_text(self._site)}"
            )


class Intrinsic:
    """A declared intrinsic. `run(threads, site, *arguments)` is its simulated side."""

    def __init__(self, simulated: Callable[..., Any], numba: Callable[[], Any], touches: str, warp: bool) -> None:
        if set(touches) - set("rw"):
            raise UnsupportedKernel(f"{simulated.__name__}: memory={touches!r}; it is 'r', 'w', 'rw' or ''")
        self.simulated, self._numba, self._warp, self._touches = simulated, numba, warp, touches
        self.parameters = list(inspect.signature(simulated).parameters)[1:]
        self.writes = _stored_to(simulated, self.parameters) if "w" in touches else frozenset[str]()
        functools.update_wrapper(self, simulated)

    def __call__(self, *arguments: Any) -> Any:
        """Not outside a kernel."""
        raise TypeError(f"{self.simulated.__name__} means something inside a kernel alone")

    @functools.cache  # noqa: B019 (intrinsics live as long as the program)
    def compiled(self) -> Any:
        """What Numba calls."""
        return self._numba()

    def run(self, threads: Threads, site: int, *arguments: Any) -> Any:
        """Runs the simulated side for the threads that run."""
        if self._warp:
            self._need_whole_warps(threads, site)
        may_write = tuple(a for p, a in zip(self.parameters, arguments, strict=False) if p in self.writes)
        active = Active(threads, site, self._warp, bool(self._touches), may_write)
        lanes = threads.mask.lanes

        def given(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(given, value))
            if not isinstance(value, (np.ndarray, np.generic)):
                return value
            own: Any = value if isinstance(value, np.generic) or lanes is None or not value.ndim else value[lanes]
            return np.broadcast_to(own, (threads.mask.count,)).reshape(active.shape)

        def taken(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(taken, value))
            if not isinstance(value, np.ndarray) or value.ndim == 0:
                return value
            return memory.spread(threads, value.reshape(-1), lanes)

        return taken(self.simulated(active, *map(given, arguments)))

    def _need_whole_warps(self, threads: Threads, site: int) -> None:
        mask = threads.mask
        if mask.full and threads.block_size % WARP == 0:
            return
        warps = -(-threads.block_size // WARP)
        here = np.zeros((threads.blocks, warps * WARP), np.bool_)
        here[:, : threads.block_size] = mask.bits.reshape(threads.blocks, threads.block_size)
        counts = here.reshape(-1, WARP).sum(1)
        broken = (counts != 0) & (counts != WARP)
        if broken.any():
            which = int(np.argmax(broken))
            lane = int(np.argmax(here.reshape(-1, WARP)[which]))
            thread = which // warps * threads.block_size + which % warps * WARP + lane
            raise DivergentWarp(
                f"{self.simulated.__name__} needs all {WARP} lanes of a warp, and {int(counts[which])} are here\n"
                f"  {threads.name_of_lane(thread)} at {site_text(site)}"
            )


def _stored_to(simulated: Callable[..., Any], parameters: Sequence[str]) -> frozenset[str]:
    """The parameters that `active.store` and kin are called with; all of them where the source does not say."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(simulated)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(parameters)
    found = {
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".store", ".store_vector", ".copy_later"))
        if node.args and isinstance(node.args[0], ast.Name)
    }
    return frozenset(found & set(parameters) or parameters)


def intrinsic(*, numba: Callable[[], Any], memory: str = "", warp: bool = False) -> Callable[..., Intrinsic]:
    """Decorator: declares an intrinsic by its simulated side.

    `numba()` is called when the intrinsic is first compiled for a GPU, and gives what Numba calls in its place (an
    `@intrinsic` of `numba.cuda.extending`, a device function). `memory` says whether it reads ("r") or writes ("w")
    arrays among its arguments. With `warp`, all 32 lanes take part, and arguments and results have shape (warps, 32).
    """

    def declare(simulated: Callable[..., Any]) -> Intrinsic:
        return Intrinsic(simulated, numba, memory, warp)

    return declare
