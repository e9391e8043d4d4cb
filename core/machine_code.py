"""What an ahead-of-time compiler gives for one kernel: the cubin and how it is launched.

Owns `MachineCode`. What always holds: a GPU backend's module `ahead` makes these from a call alone, with no GPU at
hand, and they are what the audit reads; it knows no backend's compiler.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MachineCode:
    """One compiled function. `shared_bytes` is what a launch asks for beyond what the cubin itself declares."""

    kernel: str
    function: str
    dtype: str
    configuration: str
    generation: str
    cubin: bytes
    threads: int
    shared_bytes: int
