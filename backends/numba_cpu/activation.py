"""Activations of single numbers.

Owns `activate`. What always holds: the code is a constant where it is used, so a kernel has one activation in it; SiLU
and tanh-GELU are branch-free and vectorise, GELU by erf calls the C library.
"""

from __future__ import annotations

import math

import numpy as np

from slotwise.backends.numba_cpu.memory import HALF, ONE, device, exp, tanh

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1, "gelu": 2}

_ROOT_2_OVER_PI, _CUBIC = np.float32(0.7978845608), np.float32(0.044715)
_ROOT_HALF = 0.7071067811865476


@device
def activate(code: int, x: np.float32) -> np.float32:
    """SiLU, GELU by tanh or GELU by erf of `x`."""
    if code == 0:
        return x / (ONE + exp(-x))
    if code == 1:
        return HALF * x * (ONE + tanh(_ROOT_2_OVER_PI * (x + _CUBIC * x * x * x)))
    return np.float32(0.5 * np.float64(x) * (1.0 + math.erf(np.float64(x) * _ROOT_HALF)))
