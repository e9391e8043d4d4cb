"""Calls of compiled kernels, alone or chained.

Owns `Part`, `Call`, `Chain` and `chain`. What always holds: a call is one record of int64 words, prepared when it is
bound; a chain is the records of its calls in one table, run by one entry into the thread pool; a fault that a kernel
finds in its input is raised as a BackendError that names the op. A timed chain begins with a call that does nothing:
what that takes is the waking of the threads, and no kernel's.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from slotwise.backends.numba_cpu.compiled import Address, compile_kernel
from slotwise.backends.numba_cpu.threads import FAULT, FIELDS, FIRST_FIELD, FUNCTION, TIME_WORDS, pool
from slotwise.core.backend import Launch
from slotwise.core.errors import BackendError

Field = int | float | torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Part:
    """One kernel with its fields: whole numbers, other numbers, tensors (their address is passed) or None (0)."""

    op: str
    kernel: Address
    fields: tuple[Field, ...]
    fault: str = ""
    """What it means when the kernel marks its record."""


class Call:
    """A launch made of parts that run one after the other; every thread finishes a part before the next begins."""

    __slots__ = ("_alone", "parts")

    def __init__(self, *parts: Part) -> None:
        self.parts = parts
        self._alone: Chain | None = None

    def __call__(self) -> None:
        """Run it on the process's own number of threads."""
        if self._alone is None:
            self._alone = Chain([self], None)
        self._alone()


class Chain:
    """Calls that run in order, entered once; holds what they point to."""

    __slots__ = ("_address", "_counts", "_parts", "_pool", "_table", "_timed")

    def __init__(self, calls: Sequence[Call], threads: int | None) -> None:
        self._counts = [len(call.parts) for call in calls]
        self._parts = tuple(part for call in calls for part in call.parts)
        self._table = np.zeros((len(self._parts), FIELDS), np.int64)
        for record, part in zip(self._table, self._parts, strict=True):
            if len(part.fields) > FIELDS - FIRST_FIELD:
                raise BackendError(f"{part.op}: {len(part.fields)} fields do not fit a record of {FIELDS} words")
            record[FUNCTION] = part.kernel
            record[FIRST_FIELD : FIRST_FIELD + len(part.fields)] = [_word(field) for field in part.fields]
        self._address = int(self._table.ctypes.data)
        self._pool = pool(threads)
        self._timed: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]] | None = None

    def __call__(self) -> None:
        """Run all parts; raises BackendError when a kernel found its input at fault."""
        fault = self._pool.run(self._address, len(self._parts))
        if fault:
            self._table[:, FAULT] = 0
            raise self._at_fault(fault - 1)

    def timed(self) -> tuple[float, tuple[float, ...]]:
        """Run all parts, timed from within: the seconds until all threads are there, and those of each call."""
        if self._timed is None:
            table = np.zeros((len(self._parts) + 1, FIELDS), np.int64)
            table[0, FUNCTION] = _idle()
            table[1:] = self._table
            self._timed = table, np.zeros((len(table) + 1, TIME_WORDS), np.int64)
        table, times = self._timed
        fault = self._pool.run(int(table.ctypes.data), len(table), int(times.ctypes.data))
        if fault:
            table[:, FAULT] = 0
            raise self._at_fault(fault - 2)
        ends = times[:, 0] * 10**9 + times[:, 1]
        waking, *parts = (np.diff(ends) / 1e9).tolist()
        each = iter(parts)
        return waking, tuple(sum(itertools.islice(each, count)) for count in self._counts)

    def _at_fault(self, index: int) -> BackendError:
        return BackendError(f"op {self._parts[index].op}: {self._parts[index].fault}")


@functools.cache
def _idle() -> Address:
    """A kernel that does nothing."""

    def idle(call: int, thread: int, threads: int) -> None:
        return

    return compile_kernel(idle)


def chain(launches: Sequence[Launch], threads: int | None) -> Launch:
    """One launch that does what these do in order, on `threads` threads (None: the process's own number)."""
    return Chain([cast(Call, launch) for launch in launches], threads)


def _word(field: Field) -> int:
    if field is None:
        return 0
    if isinstance(field, torch.Tensor):
        return int(field.data_ptr())
    if isinstance(field, float):
        return int(struct.unpack("<q", struct.pack("<d", field))[0])
    return int(field)
