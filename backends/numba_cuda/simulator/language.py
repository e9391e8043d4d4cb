"""The names of `numba.cuda`, and what each does here.

Owns `cuda` and the tables of names. What always holds: a name means here what it means in Numba-CUDA; importing this
needs no Numba.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

from . import memory, values, warps
from .arrays import Array
from .faults import UnsupportedKernel, site_text
from .threads import WARP, Threads


class CudaName:
    """A name under `cuda`; kernels use it, and nothing else can."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __getattr__(self, name: str) -> CudaName:
        if name.startswith("__"):
            raise AttributeError(name)
        return CudaName(f"{self.path}.{name}" if self.path else name)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Not outside a kernel."""
        raise TypeError(f"cuda.{self.path} means something inside a kernel alone")

    def __repr__(self) -> str:
        return f"cuda.{self.path}"


cuda: Any = CudaName("")
"""What a kernel's module imports in place of `from numba import cuda`."""


def as_cuda_name(value: Any) -> Any:
    """`numba.cuda` itself, its `libdevice` module, or anything else: the name that it stands for, or None."""
    if isinstance(value, CudaName):
        return value
    if isinstance(value, types.ModuleType):
        if value.__name__ in ("numba.cuda", "numba_cuda.numba.cuda"):
            return cuda
        if value.__name__.endswith("numba.cuda.libdevice"):
            return cuda.libdevice
    return None


INDICES = {"threadIdx": "thread_index", "blockIdx": "block_index", "blockDim": "block_dim", "gridDim": "grid_dim"}
AXES = "xyz"


def _grid(threads: Threads, site: int, dimensions: Any) -> Any:
    found = tuple(
        values.add(values.multiply(block, size), thread)
        for block, size, thread in zip(threads.block_index, threads.block_dim, threads.thread_index, strict=True)
    )
    return found[0] if int(dimensions) == 1 else found[: int(dimensions)]


def _gridsize(threads: Threads, site: int, dimensions: Any) -> Any:
    found = tuple(a * b for a, b in zip(threads.grid_dim, threads.block_dim, strict=True))
    return found[0] if int(dimensions) == 1 else found[: int(dimensions)]


def _syncthreads(threads: Threads, site: int) -> None:
    threads.barrier(site)


def _counted(decide: Callable[[Any, int], Any]) -> Callable[..., Any]:
    def barrier(threads: Threads, site: int, predicate: Any) -> Any:
        threads.barrier(site)
        yes = np.broadcast_to(predicate != 0, threads.lanes).reshape(threads.blocks, threads.block_size)
        return decide(yes.sum(1), threads.block_size).repeat(threads.block_size).astype(np.int32)

    return barrier


def _atomic(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`cuda.atomic.<name>(array, index, value)`: thread by thread, in their order; gives the old values."""

    def change(threads: Threads, site: int, array: Any, index: Any, *operands: Any) -> Any:
        if not isinstance(array, Array):
            raise UnsupportedKernel(f"an atomic operation on {array!r} at {site_text(site)}")
        lanes = threads.mask.lanes
        count = threads.mask.count
        at = np.broadcast_to(memory.places(threads, array, memory.narrow(index, lanes), lanes, site), (count,))
        if threads.checks and array.records is not None:
            array.records.change(threads, array, *memory.records_of(threads, array, at, lanes, site), lanes)
        columns = [
            np.broadcast_to(o if o.ndim == 0 or lanes is None else o[lanes], (count,)).astype(array.dtype)
            for o in operands
        ]
        old = np.empty(count, array.dtype)
        flat = array.flat
        for i, place in enumerate(at):
            old[i] = flat[place]
            flat[place] = apply(old[i], *(column[i] for column in columns))
        return memory.spread(threads, old, lanes)

    return change


def _compare_and_swap(threads: Threads, site: int, array: Any, expected: Any, value: Any) -> Any:
    return ATOMICS["cas"](threads, site, array, np.int64(0), expected, value)


ATOMICS: dict[str, Callable[..., Any]] = {
    "add": _atomic(lambda old, x: old + x), "sub": _atomic(lambda old, x: old - x),
    "max": _atomic(max), "min": _atomic(min),
    "nanmax": _atomic(np.fmax), "nanmin": _atomic(np.fmin), "and_": _atomic(lambda old, x: old & x),
    "or_": _atomic(lambda old, x: old | x), "xor": _atomic(lambda old, x: old ^ x), "exch": _atomic(lambda old, x: x),
    "inc": _atomic(lambda old, x: old.dtype.type(0) if old >= x else old + old.dtype.type(1)),
    "dec": _atomic(lambda old, x: x if old == 0 or old > x else old - old.dtype.type(1)),
    "cas": _atomic(lambda old, expected, x: x if old == expected else old),
}  # fmt: skip


def _nothing(threads: Threads, site: int, *arguments: Any) -> None:
    """A fence: it orders one thread's accesses, which are in order here; it makes no race less of one."""


def _pure(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda threads, site, *arguments: function(*arguments)


def _selp(condition: Any, a: Any, b: Any) -> Any:
    return np.where(condition, a, b)[()]


CALLS: dict[str, Callable[..., Any]] = {
    "grid": _grid, "gridsize": _gridsize, "syncthreads": _syncthreads,
    "syncthreads_count": _counted(lambda yes, size: yes),
    "syncthreads_and": _counted(lambda yes, size: yes == size), "syncthreads_or": _counted(lambda yes, size: yes > 0),
    "syncwarp": warps.syncwarp,
    "shfl_sync": warps.shfl, "shfl_up_sync": warps.shfl_up, "shfl_down_sync": warps.shfl_down,
    "shfl_xor_sync": warps.shfl_xor, "all_sync": warps.all_sync, "any_sync": warps.any_sync, "eq_sync": warps.eq_sync,
    "ballot_sync": warps.ballot_sync, "activemask": warps.active_mask, "match_any_sync": warps.match_any,
    "lanemask_lt": lambda threads, site: ((1 << threads.lane_of) - 1).astype(np.int32),
    "threadfence": _nothing, "threadfence_block": _nothing, "threadfence_system": _nothing, "nanosleep": _nothing,
    "popc": _pure(values.popcount), "clz": _pure(values.leading_zeros), "ffs": _pure(values.first_set),
    "brev": _pure(values.reversed_bits), "fma": _pure(values.fma), "selp": _pure(_selp),
    "cbrt": _pure(np.cbrt), "atomic.compare_and_swap": _compare_and_swap,
    **{f"atomic.{name}": change for name, change in ATOMICS.items()},
}  # fmt: skip
"""(threads, site, *arguments) -> value, by what follows `cuda.`"""

PURE = {"grid", "gridsize", "popc", "clz", "ffs", "brev", "fma", "selp", "cbrt"}
CHANGES_MEMORY = {name for name in CALLS if name.startswith("atomic.")}
ALLOCATES = {"shared.array": "shared_array", "local.array": "local_array"}
CONSTANTS = {"warpsize": WARP}
