"""Activations in float32.

Owns `activation_of`. What always holds: `silu`, `gelu_tanh` and `gelu` are those of `core/ops/linear.py`, and are
defined for every float.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.simulator import cuda, device

ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)
ROOT = np.float32(0.7978845608028654)
CUBE = np.float32(0.044715)
HALF_ROOT = np.float32(0.7071067811865476)


@device
def bounded_tanh(x):
    """tanh by the logistic function: exact to rounding at both ends, and defined for every float."""
    return TWO / (ONE + math.exp(-TWO * x)) - ONE


@device
def quick_tanh(x):
    """`bounded_tanh` by an approximate division (`div.approx.f32`, within two units in the last place): no call."""
    return cuda.libdevice.fast_fdividef(TWO, ONE + math.exp(-TWO * x)) - ONE


@device
def silu(x):
    """`x` times the logistic function of `x`."""
    return x / (ONE + math.exp(-x))


@device
def gelu_tanh(x):
    """The tanh approximation of GELU."""
    return HALF * x * (ONE + bounded_tanh(ROOT * (x + CUBE * x * x * x)))


@device
def gelu(x):
    """GELU by the error function."""
    return HALF * x * (ONE + math.erf(x * HALF_ROOT))


@device
def identity(x):
    """What an op without an activation applies."""
    return x


def activation_of(name: str) -> Any:
    """The device function of that name."""
    return {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu, "": identity}[name]
