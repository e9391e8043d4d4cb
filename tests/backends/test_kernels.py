"""Every backend x op x kernel x dtype x case: right within tolerance, clean at its borders, invariant as promised.

A new kernel or op needs no new test: it is found here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slotwise.core.backend import Backend, Kernel, backend_names, load_backend
from slotwise.core.contract import Case, OpContract
from slotwise.core.errors import BackendError
from slotwise.core.ops import contracts
from slotwise.core.specs import DType
from slotwise.proving.validate import SUBSETS, CaseResult, cases_of, check_row_invariance, dtypes_of, run_case

FEW_SUBSETS = (2, 7, 17)
"""Row counts that an interpreter compares, where each row takes milliseconds."""


def _kernels() -> Iterator[tuple[Backend, Kernel, OpContract]]:
    for name in backend_names():
        try:
            backend = load_backend(name)
        except BackendError:
            continue
        if backend.unavailable() is None:
            for kernel in backend.kernels:
                yield backend, kernel, contracts()[kernel.op]


def _runs(*, invariant: bool) -> list[object]:
    return [
        pytest.param(
            backend,
            kernel,
            contract,
            case,
            dtype,
            id=f"{backend.name}:{kernel.name}-{dtype.value}-{case.name}",
            marks=[pytest.mark.slow] if _is_slow(backend, dtype, place, invariant) else [],
        )
        for backend, kernel, contract in _kernels()
        if not invariant or (contract.rows is not None and kernel.is_row_invariant(1))
        for dtype in _dtypes(backend, contract, invariant)
        for place, case in enumerate(cases_of(contract))
    ]


def _is_interpreted(backend: Backend) -> bool:
    """A GPU's kernels on a CPU, in an interpreter or a simulator: thousands of times slower than they are."""
    return backend.name in ("cuda_triton", "numba_cuda") and backend.device == "cpu"


def _is_slow(backend: Backend, dtype: DType, place: int, invariant: bool) -> bool:
    """By default an interpreted kernel runs each case in float32, and one in four in bfloat16."""
    return _is_interpreted(backend) and (invariant or dtype is DType.F16 or (dtype is DType.BF16 and place % 4 != 0))


def _dtypes(backend: Backend, contract: OpContract, invariant: bool) -> tuple[DType, ...]:
    """All of them; one where rows are compared in an interpreter, which computes in float32 whatever the dtype."""
    found = dtypes_of(contract)
    return found[:1] if invariant and _is_interpreted(backend) else found


@pytest.mark.parametrize("name", backend_names())
def test_a_backend_is_tested_here_or_says_why_not(name: str) -> None:
    try:
        reason = load_backend(name).unavailable()
    except BackendError as error:
        reason = str(error)
    if reason is not None:
        assert len(reason.split()) > 3, f"{name}: {reason!r} does not say what is missing"
        pytest.skip(reason)
    assert any(backend.name == name for backend, _, _ in _kernels())


def _judge(result: CaseResult) -> None:
    if result.outcome == "refused":
        pytest.skip(str(result))
    assert result.passed, str(result)


@pytest.mark.parametrize(("backend", "kernel", "contract", "case", "dtype"), _runs(invariant=False))
def test_a_kernel_means_its_op(
    backend: Backend, kernel: Kernel, contract: OpContract, case: Case, dtype: DType
) -> None:
    _judge(run_case(kernel, contract, case, dtype, device=backend.device))


@pytest.mark.parametrize(("backend", "kernel", "contract", "case", "dtype"), _runs(invariant=True))
def test_rows_get_the_same_bits_in_any_company(
    backend: Backend, kernel: Kernel, contract: OpContract, case: Case, dtype: DType
) -> None:
    subsets = FEW_SUBSETS if _is_interpreted(backend) else SUBSETS
    _judge(check_row_invariance(kernel, contract, case, dtype, device=backend.device, subsets=subsets))
