"""Running a kernel on a contract's cases and judging what it did.

Owns `run_case` and `check_row_invariance`. What always holds: every tensor a kernel is given lies between guard zones
of 0xFF bytes (NaN or -1 to whoever reads past an end), outputs and workspace are poisoned first, and whatever the
kernel does wrong comes back as a sentence in a `CaseResult`; nothing is raised for a kernel's fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from slotwise.core.backend import CallSpec, Kernel, Tensors
from slotwise.core.contract import Argument, Case, OpContract
from slotwise.core.graph import Attr
from slotwise.core.specs import DType, TensorSpec

GUARD_BYTES = 256
"""Bytes of each guard zone: keeps tensors aligned for any vector load."""

_GUARD = 0xFF
_POISON_INTEGER = 0x5A
SUBSETS = (2, 3, 7, 8, 15, 16, 17, 33, 64)
"""Row counts that row invariance is tried at, beside one row and all rows."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What came of one kernel on one case. `worst` names the element furthest from the oracle: (tensor, index)."""

    op: str
    kernel: str
    dtype: DType
    case: str
    outcome: Literal["passed", "failed", "refused"]
    message: str = ""
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: tuple[str, tuple[int, ...]] | None = None

    @property
    def passed(self) -> bool:
        """Whether the kernel ran and kept every promise."""
        return self.outcome == "passed"

    def __str__(self) -> str:
        head = f"{self.kernel} ({self.op}, {self.dtype.value}, case {self.case!r}): {self.outcome}"
        return f"{head}: {self.message}" if self.message else head


def dtypes_of(contract: OpContract) -> tuple[DType, ...]:
    """The dtypes that cases are worth running in: float32, and the half ones where the contract leaves the choice."""
    free = any(isinstance(argument.dtype, str) for argument in contract.inputs)
    return (DType.F32, DType.BF16, DType.F16) if free else (DType.F32,)


def cases_of(contract: OpContract, seed: int = 0) -> tuple[Case, ...]:
    """The contract's cases, the same ones for the same seed."""
    return tuple(contract.cases(torch.Generator().manual_seed(seed)))


def case_inputs(contract: OpContract, case: Case, dtype: DType, device: str = "cpu") -> Tensors:
    """The case's tensors as a kernel takes them: free floating-point arguments rounded to `dtype`."""
    return tuple(
        None if value is None else value.to(device=device, dtype=_dtype_of(argument, value, dtype)).contiguous()
        for argument, value in zip(contract.inputs, case.inputs, strict=True)
    )


def call_of(contract: OpContract, inputs: Tensors, attrs: Mapping[str, Attr]) -> CallSpec:
    """The call that these tensors and attributes make; raises GraphError when they break the contract."""
    specs = tuple(None if value is None else TensorSpec(DType.of(value), tuple(value.shape)) for value in inputs)
    full = contract.complete_attrs(attrs)
    return CallSpec(contract.name, specs, contract.infer(specs, full), full)


def oracle(contract: OpContract, inputs: Tensors, attrs: Mapping[str, Attr]) -> dict[str, torch.Tensor]:
    """The op's function run in float64 on `inputs`, which stay as they are: outputs and written caches by name."""
    wide = tuple(
        None if value is None else value.to(torch.float64 if value.is_floating_point() else value.dtype, copy=True)
        for value in inputs
    )
    result = contract.function(*wide, **contract.complete_attrs(attrs))
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    named = {argument.name: value for argument, value in zip(contract.outputs, results, strict=True)}
    named |= {a.name: v for a, v in zip(contract.inputs, wide, strict=True) if a.cache == "writes" and v is not None}
    return named


def run_case(kernel: Kernel, contract: OpContract, case: Case, dtype: DType, *, device: str = "cpu") -> CaseResult:
    """Run `kernel` on `case` in `dtype` and compare with the float64 oracle on the same rounded inputs.

    Fails when the kernel raises, writes outside its outputs and caches, changes an input, leaves an element of an
    output unwritten, or is further from the oracle than the contract's tolerance. Tokens of rows whose `ok` is false
    are not compared: they mean nothing. The outcome is `refused`, with the kernel's reason, where it does not take the
    call.
    """
    about = _About(kernel, contract, case, dtype)
    inputs = case_inputs(contract, case, dtype, device)
    call = call_of(contract, inputs, case.attrs)
    refusal = kernel.refuses(call)
    if refusal is not None:
        return about.result("refused", refusal)
    run = _run(kernel, contract, call, inputs, device)
    if run.fault:
        return about.result("failed", run.fault)
    expected = oracle(contract, inputs, case.attrs)
    seen = {a.name: v for a, v in zip(contract.inputs, inputs, strict=True) if v is not None}
    error = relative = 0.0
    worst: tuple[str, tuple[int, ...]] | None = None
    for argument in (*contract.outputs, *_written(contract)):
        name = argument.name
        found = _compare(run.tensors[name], expected[name], _allowed(contract, dtype, argument, expected, seen))
        relative = max(relative, found.relative)
        if worst is None or found.error > error or found.message:
            error, worst = found.error, (name, found.index)
        if found.message:
            return about.result("failed", f"{name}{list(found.index)} {found.message}", error, relative, worst)
    return about.result("passed", "", error, relative, worst)


def check_row_invariance(
    kernel: Kernel, contract: OpContract, case: Case, dtype: DType, *, device: str = "cpu"
) -> CaseResult:
    """Whether each row of `case` gets the same bits in all rows' company, alone, and among 2, 3, 7, 8, ... 64 rows.

    The row counts go as far as the kernel's promise; a case with fewer rows is filled up by repeating them. Written
    caches are compared where a call changed them. The outcome is `refused` for a kernel that promises nothing. Raises
    ContractError for an op without a row dimension.
    """
    about = _About(kernel, contract, case, dtype)
    inputs = case_inputs(contract, case, dtype, device)
    call = call_of(contract, inputs, case.attrs)
    refusal = kernel.refuses(call) or (None if kernel.is_row_invariant(1) else "it promises no row invariance")
    if refusal is not None:
        return about.result("refused", refusal)
    known = _KnownRows(contract, inputs)
    for rows, of_rows in _groups(contract, inputs, call.rows):
        if not kernel.is_row_invariant(len(rows)):
            continue
        part = call_of(contract, of_rows, case.attrs)
        if kernel.refuses(part) is not None:
            continue
        run = _run(kernel, contract, part, of_rows, device)
        fault = run.fault or known.differs(rows, run.tensors)
        if fault:
            return about.result("failed", f"among {len(rows)} rows: {fault}")
    return about.result("passed")


@dataclass(frozen=True, slots=True)
class _About:
    """What a result is about, and the way to make one."""

    kernel: Kernel
    contract: OpContract
    case: Case
    dtype: DType

    def result(
        self,
        outcome: Literal["passed", "failed", "refused"],
        message: str = "",
        max_abs: float = 0.0,
        max_rel: float = 0.0,
        worst: tuple[str, tuple[int, ...]] | None = None,
    ) -> CaseResult:
        return CaseResult(
            self.contract.name, self.kernel.name, self.dtype, self.case.name, outcome, message, max_abs, max_rel, worst
        )


class _Guarded:
    """A dense tensor between two guard zones; `poison` bytes fill it, or the contents of `source`."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        device: str,
        *,
        poison: int = _GUARD,
        source: torch.Tensor | None = None,
    ) -> None:
        size = math.prod(shape) * dtype.itemsize
        self._storage = torch.full((size + 2 * GUARD_BYTES,), _GUARD, dtype=torch.uint8, device=device)
        self._bytes = self._storage[GUARD_BYTES : GUARD_BYTES + size]
        self._poison = poison
        self.tensor = self._bytes.view(dtype).view(tuple(shape))
        if source is None:
            self._bytes.fill_(poison)
        else:
            self.tensor.copy_(source)
        self._first = self._bytes.clone()

    def fault(self, name: str, *, may_change: bool) -> str:
        """What was done to this memory that should not have been; empty when nothing was."""
        before, after = self._storage[:GUARD_BYTES], self._storage[GUARD_BYTES + len(self._bytes) :]
        for side, zone in (("before the start", before.flip(0)), ("past the end", after)):
            touched = (zone != _GUARD).nonzero()
            if len(touched):
                return f"wrote outside {name}: {int(touched[0]) + 1} bytes {side} of its {len(self._bytes)} bytes"
        if not may_change:
            changed = (self._bytes != self._first).nonzero()
            if len(changed):
                return f"changed its input {name} at {list(self._index(int(changed[0])))}"
        return ""

    def untouched(self, name: str) -> str:
        """Which element of an output was never written; empty when all were."""
        elements = self._bytes.view(-1, self.tensor.element_size())
        left = (elements == self._poison).all(-1).nonzero()
        if not len(left):
            return ""
        index = list(self._index(int(left[0]) * self.tensor.element_size()))
        return f"left {name}{index} unwritten ({len(left)} of {self.tensor.numel()} elements)"

    def _index(self, byte: int) -> tuple[int, ...]:
        return _unravel(byte // self.tensor.element_size(), self.tensor.shape)


@dataclass(frozen=True, slots=True)
class _Run:
    """Outputs and written caches by name after a launch, or what went wrong."""

    tensors: Mapping[str, torch.Tensor]
    fault: str = ""


def _run(kernel: Kernel, contract: OpContract, call: CallSpec, inputs: Tensors, device: str) -> _Run:
    given = [None if value is None else _Guarded(value.dtype, value.shape, device, source=value) for value in inputs]
    made = [
        _Guarded(spec.dtype.torch, spec.sizes(), device, poison=_GUARD if spec.dtype.is_float else _POISON_INTEGER)
        for spec in call.outputs
    ]
    scratch = _Guarded(torch.uint8, (kernel.workspace(call),), device)
    try:
        launch = kernel.bind(
            tuple(None if g is None else g.tensor for g in given),
            tuple(g.tensor for g in made),
            call.attrs,
            scratch.tensor if scratch.tensor.numel() else None,
        )
        launch()
    except Exception as error:
        return _Run({}, f"raised {type(error).__name__}: {error}")
    tensors: dict[str, torch.Tensor] = {}
    for argument, held in zip(contract.inputs, given, strict=True):
        if held is None:
            continue
        written = argument.cache == "writes"
        fault = held.fault(argument.name, may_change=written)
        if fault:
            return _Run({}, fault)
        if written:
            tensors[argument.name] = held.tensor
    for argument, output in zip(contract.outputs, made, strict=True):
        fault = output.fault(argument.name, may_change=True) or output.untouched(argument.name)
        if fault:
            return _Run({}, fault)
        tensors[argument.name] = output.tensor
    return _Run(tensors, scratch.fault("its workspace", may_change=True))


def _groups(contract: OpContract, inputs: Tensors, rows: int) -> Iterator[tuple[list[int], Tensors]]:
    """Calls to compare: all rows as they come, single rows (16 at most, the ends included), and mixed companies."""
    yield list(range(rows)), inputs
    singles = sorted({*range(min(rows, 8)), *range(max(0, rows - 8), rows)})
    groups = [[row] for row in singles]
    groups += [[(first + i) % rows for i in range(count)] for count in SUBSETS for first in (0, rows // 2)]
    for group in groups:
        yield group, contract.inputs_of_rows(inputs, group)


class _KnownRows:
    """The bits that each row, and each cache element, was first seen with."""

    def __init__(self, contract: OpContract, inputs: Tensors) -> None:
        self._row_outputs = [a.name for a in contract.outputs if a.dims[:1] == (contract.rows,)]
        self._rows: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}
        self._before = {
            a.name: _bits(value)
            for a, value in zip(contract.inputs, inputs, strict=True)
            if value is not None and a.cache == "writes"
        }
        self._after = {name: bits.clone() for name, bits in self._before.items()}
        self._is_known = {name: torch.zeros_like(bits, dtype=torch.bool) for name, bits in self._before.items()}

    def differs(self, rows: Sequence[int], tensors: Mapping[str, torch.Tensor]) -> str:
        """Compare with what was seen before and remember the rest; the first difference, or an empty string."""
        for name in self._row_outputs:
            for place, (row, bits) in enumerate(zip(rows, _bits(tensors[name]), strict=True)):
                first, company = self._rows.setdefault((name, row), (bits, len(rows)))
                if not torch.equal(first, bits):
                    return f"row {row} of {name}, in place {place}, has other bits than among {company} rows"
        for name, before in self._before.items():
            bits = _bits(tensors[name])
            changed = bits != before
            other = changed & self._is_known[name] & (bits != self._after[name])
            if bool(other.any()):
                return f"slot {int(other.nonzero()[0, 0])} of {name} has other bits than in another call"
            self._after[name][changed] = bits[changed]
            self._is_known[name] |= changed
        return ""


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each row, [rows, bytes]."""
    return tensor.detach().clone().reshape(len(tensor), -1).view(torch.uint8)


def _dtype_of(argument: Argument, value: torch.Tensor, dtype: DType) -> torch.dtype:
    if isinstance(argument.dtype, tuple):
        return value.dtype  # a choice, which the case has made
    return dtype.torch if isinstance(argument.dtype, str) else argument.dtype.torch


def _written(contract: OpContract) -> list[Argument]:
    return [argument for argument in contract.inputs if argument.cache == "writes"]


def _allowed(
    contract: OpContract,
    dtype: DType,
    argument: Argument,
    expected: Mapping[str, torch.Tensor],
    seen: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """The distance from `expected` that each element may have: float64, of its shape."""
    want = expected[argument.name]
    tolerance = contract.tolerance[dtype]
    wide = want.double()
    allowed = tolerance.absolute + tolerance.relative * torch.where(wide.isfinite(), wide.abs(), 0.0)
    if argument.cache == "writes":
        # What the op leaves alone in a cache belongs to other tokens: there no difference is small.
        allowed = torch.where(want == seen[argument.name], 0.0, allowed)
    if not want.dtype.is_floating_point:
        # Token numbers and counts are right or wrong. A row that is not ok has no token.
        allowed = torch.zeros_like(wide)
        ok = expected.get("ok")
        if ok is not None and argument.name != "ok":
            allowed[~ok] = math.inf
    return allowed


@dataclass(frozen=True, slots=True)
class _Comparison:
    """The greatest distances, where the worst is, and what is wrong (empty when nothing)."""

    error: float
    relative: float
    index: tuple[int, ...]
    message: str


def _compare(got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor) -> _Comparison:
    found = got.double()
    rounded = want.to(got.dtype).double()
    wide = torch.where(allowed == 0, rounded, want.double())
    same = (found == wide) | (found.isnan() & wide.isnan()) | allowed.isinf()
    distance = torch.where(same, 0.0, (found - wide).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
    if not distance.numel():
        return _Comparison(0.0, 0.0, (), "")
    wrong = distance > allowed
    at = int(torch.where(wrong, distance - allowed, -math.inf).argmax() if bool(wrong.any()) else distance.argmax())
    index = _unravel(at, distance.shape)
    error = float(distance.flatten()[at])
    relative = float((distance / wide.abs().clamp(min=1e-30)).nan_to_num(nan=0.0).max())
    message = ""
    if bool(wrong.any()):
        message = (
            f"is {got.flatten()[at].item()}, expected {wide.flatten()[at].item()}: off by {error:.3g} where "
            f"{float(allowed.flatten()[at]):.3g} is allowed ({int(wrong.sum())} of {got.numel()} elements are wrong)"
        )
    return _Comparison(error, relative, index, message)


def _unravel(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, rest = divmod(flat, size)
        index.insert(0, rest)
    return tuple(index)
