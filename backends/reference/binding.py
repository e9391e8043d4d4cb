"""How a plain op function becomes a kernel.

Owns `whole` and `by_row`. What always holds: results are copied into the planned outputs and written caches change in
place; all slicing happens when a call is bound, so a launch is function calls and copies alone. In `by_row` a row
reaches the function from memory aligned as fresh memory is: a vendor's matrix product may round by alignment.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors, accepts_anything
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of

ALIGNMENT = 64
"""Bytes: what PyTorch gives fresh tensors on a CPU, and no less than any vector register."""

Refuses = Callable[[CallSpec], str | None]


def whole(op: str, *, invariant_rows: int | None = None, refuses: Refuses = accepts_anything) -> Kernel:
    """The kernel `<op>.whole`: the function of `op` on all rows at once."""
    contract = contract_of(op)

    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
    ) -> Launch:
        return launch_of(contract.function, inputs, outputs, attrs)

    return Kernel(op, f"{op}.whole", bind, refuses, invariant_rows)


def by_row(op: str, *, refuses: Refuses = accepts_anything) -> Kernel:
    """The kernel `<op>.by_row`: the function of `op` on one row at a time; invariant for any number of rows.

    A row is what the contract's row dimension counts: arguments and outputs that start with it are cut, the others are
    handed over whole.
    """
    contract = contract_of(op)

    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
    ) -> Launch:
        rows = len(outputs[0])
        cut = [argument.dims[:1] == (contract.rows,) for argument in contract.inputs]
        fresh = [
            torch.empty_like(value[:1]) if is_cut and value is not None else None
            for is_cut, value in zip(cut, inputs, strict=True)
        ]
        launches: list[Launch] = []
        for row in range(rows):
            arguments: list[torch.Tensor | None] = []
            for is_cut, value, aligned in zip(cut, inputs, fresh, strict=True):
                if value is None or not is_cut:
                    arguments.append(value)
                    continue
                part = value[row : row + 1]
                if part.data_ptr() % ALIGNMENT and aligned is not None:
                    launches.append(functools.partial(_copy, aligned, part))
                    part = aligned
                arguments.append(part)
            results = tuple(output[row : row + 1] for output in outputs)
            launches.append(launch_of(contract.function, tuple(arguments), results, attrs))
        if len(launches) == 1:
            return launches[0]
        return functools.partial(_run_all, tuple(launches))

    return Kernel(op, f"{op}.by_row", bind, refuses)


def launch_of(
    function: Callable[..., Any], inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]
) -> Launch:
    """A launch that calls `function` and copies its results into `outputs`."""
    call = functools.partial(function, *inputs, **attrs)
    if not outputs:
        return call
    if len(outputs) == 1:
        only = outputs[0]

        def launch_one() -> None:
            only.copy_(call())

        return launch_one

    def launch_several() -> None:
        for output, result in zip(outputs, call(), strict=True):
            output.copy_(result)

    return launch_several


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


def _run_all(launches: tuple[Launch, ...]) -> None:
    for launch in launches:
        launch()
