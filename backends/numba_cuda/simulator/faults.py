"""What the simulator reports.

Owns the exceptions and the places in kernels (*sites*) that they name. What always holds: a fault of a running kernel
names the kernel's source line, a block and a thread; nothing here knows how it was found.
"""

from __future__ import annotations

import linecache
from pathlib import Path


class Fault(Exception):
    """A kernel did what a GPU would get wrong, or what the simulator cannot run."""


class UnsupportedKernel(Fault):
    """The kernel uses something that the simulator (and mostly Numba too) does not know."""


class BadLaunch(Fault):
    """The launch's grid, block or arguments cannot be."""


class OutOfBounds(Fault):
    """An index is outside its array; negative ones are too."""


class Misaligned(Fault):
    """A wide access at an address that its size does not divide."""


class DivergentBarrier(Fault):
    """Some threads of a block reach a barrier and others never will: a deadlock."""


class DivergentWarp(Fault):
    """Lanes of a warp disagree about who takes part in a shuffle, a vote or a warp barrier."""


class DataRace(Fault):
    """Two threads touch one element with nothing between them that orders them, and one of them writes."""


class UninitialisedRead(Fault):
    """Shared memory is read that no thread has written."""


class EndlessLoop(Fault):
    """A loop runs on and on: perhaps threads wait for others that wait for them."""


_SITES: list[tuple[str, str, int]] = [("", "", 0)]
_NUMBERS: dict[tuple[str, str, int], int] = {}
SITE_BITS = 14


def site_number(file: str, function: str, line: int) -> int:
    """The number that stands for a source line; always the same for the same line."""
    key = (file, function, line)
    if key not in _NUMBERS:
        _NUMBERS[key] = len(_SITES)
        _SITES.append(key)
        if len(_SITES) > 1 << SITE_BITS:
            raise UnsupportedKernel(f"kernels of more than {1 << SITE_BITS} source lines in one process")
    return _NUMBERS[key]


def site_text(number: int) -> str:
    """`file.py:12, in kernel: the line itself`."""
    file, function, line = _SITES[number]
    text = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line}, in {function}: {text}"
