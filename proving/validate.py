"""Running a kernel on a contract's cases and judging what it did.

Owns `run_case`, `try_case` and `check_row_invariance`. What always holds: every tensor a kernel is given lies between
guard zones (`guard_zones.py`), outputs and workspace are poisoned first, and whatever the kernel does wrong comes back
as a sentence in a `CaseResult`; nothing is raised for a kernel's fault.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.contract import Argument, Case, OpContract
from slotwise.core.graph import Attr
from slotwise.core.specs import DType, TensorSpec
from slotwise.proving.comparison import allowed_distance, compare
from slotwise.proving.guard_zones import GUARD, Guarded

_POISON_INTEGER = 0x5A
SUBSETS = (2, 3, 7, 8, 15, 16, 17, 33, 64)
"""Row counts that row invariance is tried at, beside one row and all rows."""

Rule = Literal["", "runs", "guard zones", "inputs stay", "all written", "range", "oracle", "row invariance"]
"""The promise that a failed case broke; empty when none was."""

TIMED_LAUNCHES, TIMED_SECONDS = 20, 0.01
"""A kernel is timed over this many launches, or as many as fit in these seconds: the fastest counts."""


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What came of one kernel on one case.

    `worst` names the element furthest from the oracle: (tensor, index). `rule` is the promise that a failure broke.
    """

    op: str
    kernel: str
    dtype: DType
    case: str
    outcome: Literal["passed", "failed", "refused"]
    message: str = ""
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: tuple[str, tuple[int, ...]] | None = None
    rule: Rule = ""

    @property
    def passed(self) -> bool:
        """Whether the kernel ran and kept every promise."""
        return self.outcome == "passed"

    def __str__(self) -> str:
        head = f"{self.kernel} ({self.op}, {self.dtype.value}, case {self.case!r}): {self.outcome}"
        return f"{head}: {self.message}" if self.message else head


@dataclass(frozen=True, slots=True)
class Trial:
    """A result with what it was judged by: outputs and written caches by name, as the kernel left them and as the
    float64 oracle has them (both empty where nothing could be compared), and the seconds of a launch, if timed.
    """

    result: CaseResult
    outputs: Mapping[str, torch.Tensor]
    expected: Mapping[str, torch.Tensor]
    seconds: float | None = None


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
    output unwritten, gives a number outside the range that its argument declares, or is further from the oracle than
    the contract's tolerance. Tokens of rows whose `ok` is false are not compared: they mean nothing. The outcome is
    `refused`, with the kernel's reason, where it does not take the call.
    """
    return try_case(kernel, contract, case, dtype, device=device).result


def try_case(
    kernel: Kernel, contract: OpContract, case: Case, dtype: DType, *, device: str = "cpu", timed: bool = False
) -> Trial:
    """`run_case`, with what the kernel gave and what it should have given; `timed` also says how long a launch takes.

    A launch does the same however often it is called, so it is timed before its results are judged.
    """
    about = _About(kernel, contract, case, dtype)
    inputs = case_inputs(contract, case, dtype, device)
    call = call_of(contract, inputs, case.attrs)
    refusal = kernel.refuses(call)
    if refusal is not None:
        return Trial(about.result("refused", refusal), {}, {})
    run = _run(kernel, contract, call, inputs, device, timed=timed)
    if run.fault:
        return Trial(about.result("failed", run.fault, rule=run.rule), {}, {}, run.seconds)
    expected = oracle(contract, inputs, case.attrs)
    seen = {a.name: v for a, v in zip(contract.inputs, inputs, strict=True) if v is not None}
    error = relative = 0.0
    worst: tuple[str, tuple[int, ...]] | None = None
    for argument in (*contract.outputs, *_written(contract)):
        name = argument.name
        found = compare(run.tensors[name], expected[name], allowed_distance(contract, dtype, argument, expected, seen))
        relative = max(relative, found.relative)
        if worst is None or found.error > error or found.message:
            error, worst = found.error, (name, found.index)
        if found.message:
            message = f"{name}{list(found.index)} {found.message}"
            result = about.result("failed", message, error, relative, worst, "oracle")
            return Trial(result, run.tensors, expected, run.seconds)
    return Trial(about.result("passed", "", error, relative, worst), run.tensors, expected, run.seconds)


def check_row_invariance(
    kernel: Kernel,
    contract: OpContract,
    case: Case,
    dtype: DType,
    *,
    device: str = "cpu",
    subsets: Sequence[int] = SUBSETS,
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
    for rows, of_rows in _groups(contract, inputs, call.rows, subsets):
        if not kernel.is_row_invariant(len(rows)):
            continue
        part = call_of(contract, of_rows, case.attrs)
        if kernel.refuses(part) is not None:
            continue
        run = _run(kernel, contract, part, of_rows, device)
        fault = run.fault or known.differs(rows, run.tensors)
        if fault:
            rule = run.rule or "row invariance"
            return about.result("failed", f"among {len(rows)} rows: {fault}", rule=rule)
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
        rule: Rule = "",
    ) -> CaseResult:
        names = self.contract.name, self.kernel.name, self.dtype, self.case.name
        return CaseResult(*names, outcome, message, max_abs, max_rel, worst, rule)


@dataclass(frozen=True, slots=True)
class _Run:
    """Outputs and written caches by name after a launch, or what went wrong."""

    tensors: Mapping[str, torch.Tensor]
    fault: str = ""
    rule: Rule = ""
    seconds: float | None = None


def _run(
    kernel: Kernel, contract: OpContract, call: CallSpec, inputs: Tensors, device: str, *, timed: bool = False
) -> _Run:
    given = [None if value is None else Guarded(value.dtype, value.shape, device, source=value) for value in inputs]
    made = [
        Guarded(spec.dtype.torch, spec.sizes(), device, poison=GUARD if spec.dtype.is_float else _POISON_INTEGER)
        for spec in call.outputs
    ]
    scratch = Guarded(torch.uint8, (kernel.workspace(call),), device)
    try:
        launch = kernel.bind(
            tuple(None if g is None else g.tensor for g in given),
            tuple(g.tensor for g in made),
            call.attrs,
            scratch.tensor if scratch.tensor.numel() else None,
        )
        launch()
        seconds = _seconds_of(launch, device) if timed else None
    except Exception as error:
        return _Run({}, f"raised {type(error).__name__}: {error}", "runs")
    tensors: dict[str, torch.Tensor] = {}
    for argument, held in zip(contract.inputs, given, strict=True):
        if held is None:
            continue
        written = argument.cache == "writes"
        fault = held.fault(argument.name, may_change=written)
        if fault:
            return _Run({}, fault, "guard zones" if fault.startswith("wrote outside") else "inputs stay", seconds)
        if written:
            tensors[argument.name] = held.tensor
    for argument, output in zip(contract.outputs, made, strict=True):
        fault = output.fault(argument.name, may_change=True)
        left = fault or output.untouched(argument.name)
        if left:
            return _Run({}, left, "guard zones" if fault else "all written", seconds)
        tensors[argument.name] = output.tensor
        outside = _outside(contract, call, argument, output.tensor)
        if outside:
            return _Run({}, outside, "range", seconds)
    fault = scratch.fault("its workspace", may_change=True)
    return _Run(tensors, fault, "guard zones" if fault else "", seconds)


def _outside(contract: OpContract, call: CallSpec, argument: Argument, output: torch.Tensor) -> str:
    """What is wrong with an output whose argument says which numbers it may have; empty when nothing is."""
    if not argument.below:
        return ""
    limit = int(contract.match(call.inputs, call.attrs)[0][argument.below])
    wrong = ((output < 0) | (output >= limit)).nonzero().tolist()
    if not wrong:
        return ""
    at = tuple(wrong[0])
    return f"{argument.name}{list(at)} is {output[at].item()}, which is not from 0 to below {argument.below} = {limit}"


def _seconds_of(launch: Launch, device: str) -> float:
    """The fastest of some launches, each run to its end."""
    best, spent = math.inf, 0.0
    for _ in range(TIMED_LAUNCHES):
        start = time.perf_counter()
        launch()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
        if spent > TIMED_SECONDS:
            break
    return best


def _groups(
    contract: OpContract, inputs: Tensors, rows: int, subsets: Sequence[int]
) -> Iterator[tuple[list[int], Tensors]]:
    """Calls to compare: all rows as they come, single rows (16 at most, the ends included), and mixed companies."""
    yield list(range(rows)), inputs
    singles = sorted({*range(min(rows, 8)), *range(max(0, rows - 8), rows)})
    groups = [[row] for row in singles]
    groups += [[(first + i) % rows for i in range(count)] for count in subsets for first in (0, rows // 2)]
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
