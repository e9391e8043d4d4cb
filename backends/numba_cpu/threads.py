"""The threads that kernels share, and the loop in which they run a chain of calls.

Owns `Pool`. What always holds: one run enters the pool at a time; all threads of a pool run every call of a chain, each
its share, and none goes on to the next call before all have finished this one; between runs they watch for work for a
while, then sleep; a child process that was forked gets threads of its own. Where a run is asked for times, thread 0
reads the clock between calls; where it is not, no clock is read.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils

from slotwise.backends.numba_cpu.compiled import compile_kernel
from slotwise.backends.numba_cpu.machine import physical_cores
from slotwise.backends.numba_cpu.memory import call_3, device, int64s
from slotwise.backends.numba_cpu.vectors import intrinsic

MAX_THREADS = 64
"""Most threads of a pool: kernels reserve scratch memory for so many."""

FIELDS = 64
"""int64 words of a call's record."""

FUNCTION, FAULT, COUNTER, FIRST_FIELD = 0, 1, 2, 8
"""Words of a record: the kernel's address, what it found wrong (0: nothing), chunks taken, its first own field."""

# Words of the control block, a cache line apart, for each is written by one thread and watched by others.
_EPOCH, _ARRIVED, _GENERATION, _STOP, _SLEEPERS, _TABLE, _CALLS, _FAULT = (8 * i for i in range(8))
_MUTEX, _CONDITION, _TIMES, _WORDS = 64, 80, 96, 104

TIME_WORDS = 2
"""Words of a reading of the clock: seconds and nanoseconds."""
_CLOCK = int(getattr(time, "CLOCK_UPTIME_RAW", time.CLOCK_MONOTONIC))  # the one of the two that macOS reads finely

_WATCH = 20_000
"""Turns that an idle thread watches for work before it sleeps: about half a millisecond to two."""
_PATIENCE = 2_000
"""Turns that a thread waits for the others before it offers its core to another process."""

_lock_mutex = types.ExternalFunction("pthread_mutex_lock", types.int32(types.int64))
_unlock_mutex = types.ExternalFunction("pthread_mutex_unlock", types.int32(types.int64))
_init_mutex = types.ExternalFunction("pthread_mutex_init", types.int32(types.int64, types.int64))
_init_condition = types.ExternalFunction("pthread_cond_init", types.int32(types.int64, types.int64))
_wait_condition = types.ExternalFunction("pthread_cond_wait", types.int32(types.int64, types.int64))
_wake_all = types.ExternalFunction("pthread_cond_broadcast", types.int32(types.int64))
_yield_core = types.ExternalFunction("sched_yield", types.int32())
_read_clock = types.ExternalFunction("clock_gettime", types.int32(types.int64, types.int64))

_I64 = ir.IntType(64)


@intrinsic
def atomic_load(typing: Any, address: Any) -> Any:
    """The int64 at `address`, as all threads see it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(builder.inttoptr(arguments[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(typing: Any, address: Any, value: Any) -> Any:
    """Store an int64 for all threads to see."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], builder.inttoptr(arguments[0], _I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_add(typing: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at `address`; returns what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def relax(typing: Any) -> Any:
    """Tell the processor that this thread is watching memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        triple = builder.module.triple
        if triple.startswith("x86_64"):
            hint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), []), "llvm.x86.sse2.pause"
            )
            builder.call(hint, [])
        elif triple.startswith(("aarch64", "arm64")):
            hint = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), [word]), "llvm.aarch64.hint"
            )
            builder.call(hint, [ir.Constant(word, 1)])
        return context.get_dummy_value()

    return types.void(), generate


@device
def next_chunk(call: int) -> int:
    """The number of a chunk of this call's work that nobody has taken yet."""
    return int(atomic_add(call + COUNTER * 8, 1))


@device
def share(total: int, thread: int, threads: int) -> tuple[int, int]:
    """This thread's part of `total` pieces of equal work: (first, last + 1)."""
    return total * thread // threads, total * (thread + 1) // threads


@device
def _run_calls(control: int, thread: int, threads: int) -> None:
    table, calls = atomic_load(control + _TABLE * 8), atomic_load(control + _CALLS * 8)
    times = atomic_load(control + _TIMES * 8) if thread == 0 else 0
    if times != 0:
        _read_clock(_CLOCK, times)
    for i in range(calls):
        call = table + i * (FIELDS * 8)
        words = int64s(call, FIRST_FIELD)
        call_3(words[FUNCTION], (call, thread, threads))
        generation = atomic_load(control + _GENERATION * 8)
        if atomic_add(control + _ARRIVED * 8, 1) == threads - 1:
            if words[FAULT] != 0 and atomic_load(control + _FAULT * 8) == 0:
                atomic_store(control + _FAULT * 8, i + 1)
            words[COUNTER] = 0
            atomic_store(control + _ARRIVED * 8, 0)
            atomic_store(control + _GENERATION * 8, generation + 1)
        else:
            waited = 0
            while atomic_load(control + _GENERATION * 8) == generation:
                relax()
                waited += 1
                if waited > _PATIENCE:
                    _yield_core()
        if times != 0:
            _read_clock(_CLOCK, times + (i + 1) * (TIME_WORDS * 8))


def _work(control: int, thread: int, threads: int) -> None:
    """A worker's life: watch for a new epoch, run its share, until told to stop."""
    seen = 0
    while True:
        watched = 0
        while atomic_load(control + _EPOCH * 8) == seen:
            relax()
            watched += 1
            if watched > _WATCH:
                _lock_mutex(control + _MUTEX * 8)
                atomic_add(control + _SLEEPERS * 8, 1)
                while atomic_load(control + _EPOCH * 8) == seen:
                    _wait_condition(control + _CONDITION * 8, control + _MUTEX * 8)
                atomic_add(control + _SLEEPERS * 8, -1)
                _unlock_mutex(control + _MUTEX * 8)
        seen = atomic_load(control + _EPOCH * 8)
        if atomic_load(control + _STOP * 8) != 0:
            return
        _run_calls(control, thread, threads)


def _start(control: int, table: int, calls: int, threads: int, times: int) -> None:
    """Publish a table of calls, wake who sleeps, and run thread 0's share; with no calls, only wake.

    `times` is 0, or where thread 0 puts the time before the first call and after each.
    """
    atomic_store(control + _TIMES * 8, times)
    atomic_store(control + _TABLE * 8, table)
    atomic_store(control + _CALLS * 8, calls)
    if threads > 1:
        atomic_add(control + _EPOCH * 8, 1)
        if atomic_load(control + _SLEEPERS * 8) > 0:
            _lock_mutex(control + _MUTEX * 8)
            _wake_all(control + _CONDITION * 8)
            _unlock_mutex(control + _MUTEX * 8)
    _run_calls(control, 0, threads)


def _prepare(control: int) -> None:
    """Make the mutex and the condition of a control block."""
    _init_mutex(control + _MUTEX * 8, 0)
    _init_condition(control + _CONDITION * 8, 0)


@functools.cache
def _entry(name: str) -> Any:
    """A function of this file, compiled, as Python can call it without holding the interpreter."""
    entries: dict[str, tuple[Callable[..., None], int]] = {
        "work": (_work, 3),
        "start": (_start, 5),
        "prepare": (_prepare, 1),
    }
    function, count = entries[name]
    address = compile_kernel(function, (types.int64,) * count)
    return ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * count))(address)


class Pool:
    """`threads` threads, the caller's included. `run` is safe to call from several Python threads: they take turns."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._process = 0
        self._begin()

    def run(self, table: int, calls: int, times: int = 0) -> int:
        """Run `calls` records from `table` on; returns 0, or one more than the index of the first call at fault.

        `times` is the address of `calls + 1` readings of the clock, to be filled in, or 0.
        """
        if self._process != os.getpid():
            self._lock = threading.Lock()  # whoever held it did not come along into this process
            self._begin()
        with self._lock:
            self._entry_start(self._address, table, calls, self.threads, times)
            fault = int(self._control[_FAULT])
            if fault:
                self._control[_FAULT] = 0
            return fault

    def _begin(self) -> None:
        self._process = os.getpid()
        self._control = control = np.zeros(_WORDS, np.int64)
        self._address = address = int(control.ctypes.data)
        self._entry_start = start = _entry("start")
        _entry("prepare")(address)
        work = _entry("work")
        for thread in range(1, self.threads):
            name = f"slotwise-cpu-{thread}"
            # The worker holds the control block, so that it outlives the pool while the worker runs.
            threading.Thread(target=_live, args=(work, control, thread, self.threads), name=name, daemon=True).start()
        if self.threads > 1:
            weakref.finalize(self, _stop, control, start, os.getpid(), self.threads)


def _live(work: Any, control: Any, thread: int, threads: int) -> None:
    work(int(control.ctypes.data), thread, threads)


def _stop(control: Any, start: Any, process: int, threads: int) -> None:
    """Send the workers home, unless they are another process's."""
    if process == os.getpid():
        control[_STOP] = 1
        start(int(control.ctypes.data), 0, 0, threads, 0)


_pools: weakref.WeakValueDictionary[int, Pool] = weakref.WeakValueDictionary()
_making = threading.Lock()


def pool(threads: int | None = None) -> Pool:
    """The process's pool of `threads` threads; by default one for each core, but no more than PyTorch has.

    It lives as long as anyone holds it.
    """
    wanted = min(threads or min(physical_cores(), torch.get_num_threads()), MAX_THREADS)
    with _making:
        found = _pools.get(wanted)
        if found is None:
            _pools[wanted] = found = Pool(wanted)
        return found
