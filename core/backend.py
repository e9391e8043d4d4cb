"""What a backend is: kernels under op contracts, found by name.

Owns `CallSpec`, `Kernel`, `Backend` and the loader. What always holds: a kernel says what it can take and what it
promises (row invariance), never when it is chosen; a backend is a package `slotwise.backends.<name>` that exposes
`BACKEND`, found by looking at the folder, so adding one touches nothing else (`register_backend` brings one from
elsewhere, for one process); there is no silent fallback.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from slotwise.core.contract import OpContract
from slotwise.core.errors import BackendError, ContractError, nearest
from slotwise.core.graph import Attr
from slotwise.core.layouts import ROWS
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType, TensorSpec

Tensors = tuple[torch.Tensor | None, ...]
Launch = Callable[[], None]
"""A kernel with its buffers bound: call it and the outputs (and written caches) hold the result."""

Bind = Callable[[Tensors, tuple[torch.Tensor, ...], Mapping[str, Attr], torch.Tensor | None], Launch]
"""(inputs, outputs, attrs, workspace) -> launch. Called once at load; launch arguments are prepared here.

The tensors stay where they are between launches, and only their contents change; `workspace` is uint8, of the size that
the kernel asked for, with anything in it (None when it asked for nothing).
"""


@dataclass(frozen=True, slots=True)
class CallSpec:
    """One call as the planner sees it: its op, bound specs and complete attributes."""

    op: str
    inputs: tuple[TensorSpec | None, ...]
    outputs: tuple[TensorSpec, ...]
    attrs: Mapping[str, Attr]

    @property
    def contract(self) -> OpContract:
        """The contract of the op called."""
        return contract_of(self.op)

    @property
    def rows(self) -> int:
        """Size of the contract's row dimension; 1 when it has none."""
        contract = self.contract
        if contract.rows is None:
            return 1
        size = contract.match(self.inputs, self.attrs)[0][contract.rows]
        if not isinstance(size, int):
            raise ContractError(f"op {self.op}: dimension {contract.rows} is still symbolic; bind the specs first")
        return size

    @property
    def dtype(self) -> DType:
        """The computing dtype: that of the first floating-point input or output."""
        for spec in (*self.inputs, *self.outputs):
            if spec is not None and spec.dtype.is_float:
                return spec.dtype
        return DType.F32


def accepts_anything(call: CallSpec) -> str | None:
    """The answer of a kernel that takes every call of its op."""
    return None


def wants_rows(call: CallSpec) -> str | None:
    """The answer of a kernel that takes weights row after row alone."""
    layout = call.attrs.get("layout", ROWS)
    return None if layout == ROWS else f"its weights must stand in rows, these stand in {layout}"


def needs_no_workspace(call: CallSpec) -> int:
    """The answer of a kernel that needs no memory beyond its outputs."""
    return 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One implementation of an op.

    `refuses(call)` is None when the kernel can run the call, else the reason why not. `invariant_rows` is the most rows
    for which row i of the output is bit-equal however many rows share the call: None for any number, 0 for never.
    `workspace(call)` is the scratch memory it needs, in bytes; the plan places it in the arena.
    """

    op: str
    name: str
    bind: Bind
    refuses: Callable[[CallSpec], str | None] = accepts_anything
    invariant_rows: int | None = None
    workspace: Callable[[CallSpec], int] = needs_no_workspace

    def is_row_invariant(self, rows: int) -> bool:
        """Whether row invariance holds for calls of up to `rows` rows."""
        return self.invariant_rows is None or rows <= self.invariant_rows


@runtime_checkable
class TimedLaunch(Protocol):
    """A launch that a backend's `chain` made, where it can say from within how long each of its launches takes."""

    def __call__(self) -> None:
        """Run it."""

    def timed(self) -> tuple[float, tuple[float, ...]]:
        """Run it; the seconds until it has begun, and those of each launch that it was made of, in order."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A named set of kernels, in the backend's own order of preference.

    `unavailable()` is None where this machine can run it, else the reason and what to do. `device` is where buffers
    live (`"cpu"` or `"cuda"`). `chain`, where a backend has one, makes one launch of its own consecutive launches, to
    be run on that many threads (None: the backend's own choice): entering a kernel once costs less than many times.
    `layout` is the one (`core/layouts.py`) in which its kernels like weights to stand.
    `chains_prefill` is false where that is not worth its memory for prefill programs, whose launches are few and long.
    Launches of backends that have the very same `chain` become one together. What it makes may be a `TimedLaunch`.
    `note` is what a user should know about running it here; `slotwise doctor` prints it.
    """

    name: str
    kernels: tuple[Kernel, ...]
    unavailable: Callable[[], str | None]
    device: str = "cpu"
    chain: Callable[[Sequence[Launch], int | None], Launch] | None = None
    layout: str = ROWS
    chains_prefill: bool = True
    note: str = ""

    def kernels_for(self, op: str) -> tuple[Kernel, ...]:
        """This backend's kernels for `op`, most preferred first."""
        return tuple(kernel for kernel in self.kernels if kernel.op == op)

    def kernel(self, name: str) -> Kernel:
        """The kernel called `name`; raises BackendError when there is none."""
        for kernel in self.kernels:
            if kernel.name == name:
                return kernel
        known = [kernel.name for kernel in self.kernels]
        raise BackendError(
            f"backend {self.name!r} has no kernel {name!r}{nearest(name, known)}; this plan needs it: was the plan "
            "made by another version of Slotwise?"
        )


DEFAULTS = ("numba_cpu", "reference")
"""Backends to try, in order, for those who name none; on a machine without a GPU."""

_REGISTERED: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Make a backend that was built elsewhere known under its name, for this process: a kernel under development, say.

    Raises BackendError when another backend has that name; registering the same one again does nothing.
    """
    if backend.name in _folder_names() or _REGISTERED.get(backend.name, backend) is not backend:
        raise BackendError(f"there is a backend {backend.name!r} already; give the new one a name of its own")
    _REGISTERED[backend.name] = backend


def unregister_backend(backend: Backend) -> None:
    """Forget a registered backend; harmless for one that is not."""
    if _REGISTERED.get(backend.name) is backend:
        del _REGISTERED[backend.name]


def backend_names() -> tuple[str, ...]:
    """The backends in the folder `backends/` and those that were registered, by name."""
    return tuple(sorted({*_folder_names(), *_REGISTERED}))


def load_backend(name: str) -> Backend:
    """The backend called `name`: a registered one, or `BACKEND` of `slotwise.backends.<name>`, imported once.

    Raises BackendError for an unknown name, a package that cannot be imported here, or one without `BACKEND`.
    """
    return _REGISTERED.get(name) or _imported(name)


def _folder_names() -> tuple[str, ...]:
    package = importlib.import_module("slotwise.backends")
    return tuple(
        sorted(
            info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg and not info.name.startswith("_")
        )
    )


def default_backend() -> str:
    """The backend of those who name none: the first of `numba_cpu` and `reference` that can run here."""
    for name in DEFAULTS:
        try:
            if load_backend(name).unavailable() is None:
                return name
        except BackendError:
            continue
    raise BackendError(f"none of the default backends can run here: {', '.join(DEFAULTS)}; `slotwise doctor` says more")


@functools.cache
def _imported(name: str) -> Backend:
    known = _folder_names()
    if name not in known:
        known = backend_names()
        raise BackendError(f"backend {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
    try:
        module = importlib.import_module(f"slotwise.backends.{name}")
    except ImportError as error:
        raise BackendError(f"backend {name!r} cannot be imported here: {error}; `slotwise doctor` says more") from error
    backend = getattr(module, "BACKEND", None)
    if not isinstance(backend, Backend) or backend.name != name:
        raise BackendError(f"slotwise.backends.{name} must expose BACKEND, a Backend named {name!r}")
    return backend
