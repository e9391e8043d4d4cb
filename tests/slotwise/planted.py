"""Backends with one wrong kernel, for tools that must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch

from slotwise.core.backend import Backend, Kernel, Launch, Tensors, load_backend, register_backend, unregister_backend
from slotwise.core.graph import Attr

Spoil = Callable[[Tensors, tuple[torch.Tensor, ...]], None]
"""Called with a call's inputs and outputs after the right kernel ran: what it does to them is the bug."""


def anywhere(inputs: Tensors) -> bool:
    """Plants the bug in every call."""
    return True


def spoiled(
    name: str, op: str, spoil: Spoil, base: str = "reference", where: Callable[[Tensors], bool] = anywhere
) -> Backend:
    """Backend `base` with `spoil` after every launch of `op`'s kernels.

    `where` is asked with the inputs of each call as it is bound, and says whether this one is spoiled.
    """

    def wrong(kernel: Kernel) -> Kernel:
        def bind(
            inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], scratch: torch.Tensor | None
        ) -> Launch:
            launch = kernel.bind(inputs, outputs, attrs, scratch)
            if not where(inputs):
                return launch

            def launch_wrongly() -> None:
                launch()
                spoil(inputs, outputs)

            return launch_wrongly

        return replace(kernel, bind=bind)

    right = load_backend(base)
    kernels = tuple(wrong(kernel) if kernel.op == op else kernel for kernel in right.kernels)
    return replace(right, name=name, kernels=kernels, chain=None)


@contextmanager
def registered(backend: Backend) -> Iterator[Backend]:
    """Known by name within the block."""
    register_backend(backend)
    try:
        yield backend
    finally:
        unregister_backend(backend)


def last_row_off(amount: float) -> Spoil:
    """The last row of the first output is too large by `amount`, relative to its size."""

    def spoil(_: Tensors, outputs: tuple[torch.Tensor, ...]) -> None:
        outputs[0][-1] *= 1 + amount

    return spoil
