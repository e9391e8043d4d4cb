"""Matrix products with quantised weights.

Owns the kernels of the ops of `core/ops/linear_q.py`. What always holds: the weight is dequantised once a launch, as
the contract does it, and `by_row` then runs the float op a row at a time, so rows are kept apart as the float ops'
kernels keep them; nothing dequantised outlives a launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from slotwise.backends.reference.binding import whole
from slotwise.backends.reference.linear import refuses
from slotwise.core.backend import Kernel, Launch, Tensors
from slotwise.core.graph import Attr
from slotwise.core.ops.linear_q import FLOAT_OPS, weight_for, with_weight


def _by_row(op: str) -> Kernel:
    """The kernel `<op>.by_row`: any number of rows, each with the same bits in any company."""
    plain = FLOAT_OPS[op]

    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
    ) -> Launch:
        x, codes, scale = cast("tuple[torch.Tensor, ...]", inputs[:3])
        offset, *rest = inputs[3:]
        bits, layout = int(attrs["bits"]), str(attrs["layout"])
        others = {name: value for name, value in attrs.items() if name not in ("bits", "layout")}

        def launch() -> None:
            weight = weight_for(x, codes, scale, offset, bits, layout)
            for row in range(len(x)):
                # A copy is aligned as fresh memory is: a vendor's matrix product may round by alignment.
                results = with_weight(plain, x[row : row + 1].clone(), weight, *rest, **others)
                for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
                    output[row : row + 1].copy_(result)

        return launch

    return Kernel(op, f"{op}.by_row", bind, refuses)


KERNELS = tuple(kernel for op in FLOAT_OPS for kernel in (_by_row(op), whole(op, invariant_rows=0, refuses=refuses)))
