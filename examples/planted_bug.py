"""A backend with a planted kernel bug, to practise on: docs/debugging.md finds it.

`python examples/planted_bug.py COMMAND ...` is `slotwise COMMAND ...` with one more backend, `planted`: the reference,
but its attention forgets a row's own key where that key stands at the last slot of a page. It also shows how a kernel
under development is tried without being part of Slotwise: a `Backend`, registered for the process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch

from slotwise.cli import main
from slotwise.core.backend import Kernel, Launch, Tensors, load_backend, register_backend
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of


def forgetful(kernel: Kernel) -> Kernel:
    """`kernel`, an attention, with the bug."""

    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
    ) -> Launch:
        launch = kernel.bind(inputs, outputs, attrs, workspace)
        function = functools.partial(contract_of("attention").function, **attrs)
        query, k_cache, v_cache, row_start, kv_len, page_table = inputs

        def launch_forgetfully() -> None:
            launch()
            for b, length in enumerate(kv_len.tolist()):
                first, last = row_start[b : b + 2].tolist()
                for row in range(first, last):
                    seen = length - last + row + 1
                    if seen % attrs["page_size"] == 0:  # the planted bug: `<` where `<=` was meant
                        one_row, short = row_start.new_tensor([0, 1]), kv_len.new_tensor([seen - 1])
                        part = function(query[row : row + 1], k_cache, v_cache, one_row, short, page_table[b : b + 1])
                        outputs[0][row].copy_(part[0])

        return launch_forgetfully

    return replace(kernel, bind=bind)


reference = load_backend("reference")
kernels = tuple(forgetful(kernel) if kernel.op == "attention" else kernel for kernel in reference.kernels)
register_backend(replace(reference, name="planted", kernels=kernels))

if __name__ == "__main__":
    sys.exit(main())
