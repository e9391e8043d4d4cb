"""Calls of compiled kernels, alone or chained.

Owns `Part`, `Call` and `chain`. What always holds: a call is one record of int64 words, prepared when it is bound; a
chain is the records of its calls in one table, run by one entry into the thread pool; a fault that a kernel finds in
its input is raised as a BackendError that names the op.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from slotwise.backends.numba_cpu.compiled import Address
from slotwise.backends.numba_cpu.threads import FAULT, FIELDS, FIRST_FIELD, FUNCTION, pool
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
            self._alone = Chain(self.parts, None)
        self._alone()


class Chain:
    """Parts that run in order, entered once; holds what they point to."""

    __slots__ = ("_address", "_count", "_parts", "_pool", "_table")

    def __init__(self, parts: Sequence[Part], threads: int | None) -> None:
        self._parts = tuple(parts)
        self._table = np.zeros((len(self._parts), FIELDS), np.int64)
        for record, part in zip(self._table, self._parts, strict=True):
            if len(part.fields) > FIELDS - FIRST_FIELD:
                raise BackendError(f"{part.op}: {len(part.fields)} fields do not fit a record of {FIELDS} words")
            record[FUNCTION] = part.kernel
            record[FIRST_FIELD : FIRST_FIELD + len(part.fields)] = [_word(field) for field in part.fields]
        self._address = int(self._table.ctypes.data)
        self._count = len(self._parts)
        self._pool = pool(threads)

    def __call__(self) -> None:
        """Run all parts; raises BackendError when a kernel found its input at fault."""
        fault = self._pool.run(self._address, self._count)
        if fault:
            self._table[:, FAULT] = 0
            part = self._parts[fault - 1]
            raise BackendError(f"op {part.op}: {part.fault}")


def chain(launches: Sequence[Launch], threads: int | None) -> Launch:
    """One launch that does what these do in order, on `threads` threads (None: the process's own number)."""
    return Chain([part for launch in launches for part in cast(Call, launch).parts], threads)


def _word(field: Field) -> int:
    if field is None:
        return 0
    if isinstance(field, torch.Tensor):
        return int(field.data_ptr())
    if isinstance(field, float):
        return int(struct.unpack("<q", struct.pack("<d", field))[0])
    return int(field)
