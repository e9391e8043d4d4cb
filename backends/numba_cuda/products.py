"""What every product with weights has in common: what its call fixes at compile time, and what follows its sum.

Owns `Product` and `finisher`. What always holds: bias, gate, cap, rounding and the place of a result are written once
here, whichever kernel made the sum, so that all of them finish a sum with the same bits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from slotwise.backends.numba_cuda.activation import activation_of, bounded_tanh
from slotwise.backends.numba_cuda.elements import PACK, elements_of
from slotwise.backends.numba_cuda.simulator import device
from slotwise.core.backend import CallSpec
from slotwise.core.specs import DType


@dataclass(frozen=True, slots=True)
class Product:
    """What a product's call fixes at compile time: sizes, dtype, and what follows the sum."""

    op: str
    dtype: DType
    outputs: int  # columns of the result; of one of gate and up
    inner: int
    biased: bool
    softcap: float
    activation: str
    first_width: int  # columns of q, and of each of k and v
    other_width: int
    vector: bool

    @property
    def gated(self) -> bool:
        """Whether each column has two sums, gate's and up's."""
        return self.op == "linear_gated"


RESULTS = {
    "linear": ("y",) * 3,
    "linear_heads": ("y",) * 3,
    "linear_qkv": ("q", "k", "v"),
    "linear_gated": ("y",) * 3,
    "logits": ("logits",) * 3,
}
"""Each op -> the names of its three results, or the one of its only result three times."""


def product_of(call: CallSpec, aligned: bool) -> tuple[int, Product]:
    """The call's rows and everything else about it; of a quantised weight's product, what the float op fixes."""
    op = call.op.removesuffix("_q")
    x, weight = call.inputs[:2]
    assert x is not None
    assert weight is not None
    names = [argument.name for argument in call.contract.inputs]
    rows, inner = x.sizes()
    head_dim = int(call.attrs.get("head_dim", 1))
    return rows, Product(
        op=op,
        dtype=call.dtype,
        outputs=weight.sizes()[0] // (2 if op == "linear_gated" else 1),
        inner=inner,
        biased=dict(zip(names, call.inputs, strict=False)).get("bias") is not None,
        softcap=float(call.attrs.get("softcap", 0.0)),
        activation=str(call.attrs.get("activation", "")),
        first_width=int(call.attrs.get("q_heads", 1)) * head_dim if op == "linear_qkv" else 0,
        other_width=int(call.attrs.get("kv_heads", 1)) * head_dim if op == "linear_qkv" else 0,
        vector=aligned and inner % PACK == 0,
    )


def operands(of: Product) -> tuple[str, ...]:
    """The names of x, weight, bias (or what stands in for none) and the three results."""
    return ("x", "weight", "bias" if of.biased else "weight", *RESULTS[of.op])


@functools.cache
def finisher(of: Product) -> Any:
    """`finish(row, column, value, up, bias, out, second, third)`: bias, gate or cap, rounding, and the store."""
    raw, result = elements_of(of.dtype, False), elements_of(DType.F32 if of.op == "logits" else of.dtype, False)
    widen, narrow = raw.widen, result.narrow
    activate, gated, biased, splits = activation_of(of.activation), of.gated, of.biased, of.op == "linear_qkv"
    outputs, first_width, other_width = of.outputs, of.first_width, of.other_width
    second_end = first_width + other_width
    capped, softcap = of.softcap > 0, np.float32(of.softcap)

    @device
    def finish(row, column, value, up, bias, out, second, third):
        if biased:
            value = value + widen(bias[column])
        if capped:
            value = bounded_tanh(value / softcap) * softcap
        if gated:
            value = activate(value) * up
        if splits:
            if column < first_width:
                out[row * first_width + column] = narrow(value)
            elif column < second_end:
                second[row * other_width + column - first_width] = narrow(value)
            else:
                third[row * other_width + column - second_end] = narrow(value)
        else:
            out[row * outputs + column] = narrow(value)

    return finish
