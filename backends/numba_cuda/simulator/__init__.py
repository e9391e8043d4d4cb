"""A SIMT simulator for Numba-CUDA kernels that is also a checker; README.md says what it does.

What always holds: it needs numpy alone and imports nothing from outside its folder; kernels are the same objects that a
GPU runs.
"""

from . import fragments
from .faults import (
    BadLaunch,
    DataRace,
    DivergentBarrier,
    DivergentWarp,
    EndlessLoop,
    Fault,
    Misaligned,
    OutOfBounds,
    UninitialisedRead,
    UnsupportedKernel,
)
from .intrinsics import Active, Intrinsic, intrinsic
from .kernels import Device, Kernel, Launch, device, kernel, simulate
from .language import cuda

__all__ = [
    "Active",
    "BadLaunch",
    "DataRace",
    "Device",
    "DivergentBarrier",
    "DivergentWarp",
    "EndlessLoop",
    "Fault",
    "Intrinsic",
    "Kernel",
    "Launch",
    "Misaligned",
    "OutOfBounds",
    "UninitialisedRead",
    "UnsupportedKernel",
    "cuda",
    "device",
    "fragments",
    "intrinsic",
    "kernel",
    "simulate",
]
