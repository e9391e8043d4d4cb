"""A program's calls with their tensors, and what may run them in the executor's place.

Owns `BoundCall` and `Conductor`. What always holds: a bound call's tensors stay where they are from loading on; whoever
conducts runs every call, in order, or raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slotwise.core.backend import Launch, Tensors
from slotwise.core.graph import Node
from slotwise.plans.program import Program


@dataclass(frozen=True, slots=True)
class BoundCall:
    """One call of a program with its tensors: those that `launch` reads and writes."""

    node: Node
    inputs: Tensors
    outputs: tuple[torch.Tensor, ...]
    launch: Launch


Conductor = Callable[[Program, tuple[BoundCall, ...]], None]
"""Runs the calls of a program in the executor's place, one after another: how a tool looks between them."""
