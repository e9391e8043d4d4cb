"""Quantised products: what the tolerance allows and what it catches, and which operands do not belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from slotwise.core.backend import Kernel, Launch, Tensors
from slotwise.core.contract import Case, OpContract
from slotwise.core.errors import GraphError
from slotwise.core.graph import Attr
from slotwise.core.layouts import CODES_WORD, GROUP_WORD, LAYOUTS, ROWS, in_rows
from slotwise.core.ops import contract_of
from slotwise.core.ops.linear_q import CONTRACTS, FLOAT_OPS, GROUP, with_weight
from slotwise.core.quantise import dequantise
from slotwise.core.specs import DType, TensorSpec
from slotwise.proving.validate import cases_of, dtypes_of, oracle, run_case

Fault = Callable[[torch.Tensor, Tensors], tuple[torch.Tensor, Tensors]]
"""Activations, and codes, scale and offset, as a kernel with a fault would use them."""


def cases_in_rows(contract: OpContract) -> list[Case]:
    """Tolerances do not depend on the layout, so one is enough for them."""
    return [case for case in cases_of(contract) if case.attrs["layout"] == ROWS]


RUNS = [
    pytest.param(contract, case, dtype, id=f"{contract.name}-{dtype.value}-{case.name}")
    for contract in CONTRACTS
    for dtype in dtypes_of(contract)
    for case in cases_in_rows(contract)
]


def rounding_kernel(op: str, fault: Fault | None = None) -> Kernel:
    """A kernel that rounds its activations to int8 by group, as the fast ones do, perhaps with a fault."""

    def bind(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: Any) -> Launch:
        def launch() -> None:
            x, codes, scale, offset, *rest = inputs
            assert x is not None
            rounded, weight = int8_by_group(x.float()), (codes, scale, offset)
            if fault is not None:
                rounded, weight = fault(rounded, weight)
            others = {name: value for name, value in attrs.items() if name not in ("bits", "layout")}
            dense = dequantise(*weight, bits=int(attrs["bits"]))  # type: ignore[arg-type]
            results = with_weight(FLOAT_OPS[op], rounded, dense, *rest, **others)
            for output, result in zip(outputs, results if len(outputs) > 1 else (results,), strict=True):
                output.copy_(result)

        return launch

    return Kernel(op, f"{op}.rounding", bind)


def int8_by_group(x: torch.Tensor) -> torch.Tensor:
    groups = x.view(len(x), -1, GROUP)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (groups / scale).round() * scale, 0.0).view(x.shape)


@pytest.mark.parametrize(("contract", "case", "dtype"), RUNS)
def test_activations_may_be_rounded_to_int8_by_group(contract: OpContract, case: Case, dtype: DType) -> None:
    result = run_case(rounding_kernel(contract.name), contract, case, dtype)
    assert result.passed, str(result)


def _without_last_group(x: torch.Tensor, weight: Tensors) -> tuple[torch.Tensor, Tensors]:
    # The last row's first group is zero in all cases, so a kernel may not be seen to skip that one there alone.
    x = x.clone()
    x[:, -GROUP:] = 0
    return x, weight


def _scale_of_the_row_before(x: torch.Tensor, weight: Tensors) -> tuple[torch.Tensor, Tensors]:
    codes, scale, offset = weight
    assert scale is not None
    return x, (codes, scale.roll(1, 0), offset)


def _coarse_activations(x: torch.Tensor, weight: Tensors) -> tuple[torch.Tensor, Tensors]:
    """Six bits instead of eight."""
    groups = x.view(len(x), -1, GROUP)
    step = groups.abs().amax(-1, keepdim=True) / 15
    return torch.where(step > 0, (groups / step).round() * step, 0.0).view(x.shape), weight


@pytest.mark.parametrize("fault", [_without_last_group, _scale_of_the_row_before], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("contract", "case", "dtype"), RUNS)
def test_a_lost_group_and_a_strange_scale_are_caught_in_every_case(
    contract: OpContract, case: Case, dtype: DType, fault: Fault
) -> None:
    result = run_case(rounding_kernel(contract.name, fault), contract, case, dtype)
    assert result.outcome == "failed", str(result)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_activations_of_five_bits_are_caught(contract: OpContract) -> None:
    kernel = rounding_kernel(contract.name, _coarse_activations)
    results = [run_case(kernel, contract, case, DType.F32) for case in cases_in_rows(contract)]
    assert "failed" in {result.outcome for result in results}


def _swapped_halves(x: torch.Tensor, weight: Tensors) -> tuple[torch.Tensor, Tensors]:
    codes, scale, offset = weight
    assert codes is not None
    return x, (codes >> 4 | codes << 4, scale, offset)


def _no_offset(x: torch.Tensor, weight: Tensors) -> tuple[torch.Tensor, Tensors]:
    codes, scale, _ = weight
    return x, (codes, scale, None)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
@pytest.mark.parametrize("fault", [_swapped_halves, _no_offset], ids=lambda f: f.__name__)
def test_swapped_halves_and_a_forgotten_offset_are_caught(contract: OpContract, fault: Fault) -> None:
    form = "int4" if fault is _swapped_halves else "offset"
    cases = [case for case in cases_in_rows(contract) if form in case.name]
    assert len(cases) >= 2
    for case in cases:
        result = run_case(rounding_kernel(contract.name, fault), contract, case, DType.BF16)
        assert result.outcome == "failed", str(result)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_every_op_has_cases_in_each_form_and_at_the_counts_of_rows_that_matter(contract: OpContract) -> None:
    cases = cases_of(contract)
    forms = {(case.attrs["layout"], case.attrs["bits"], case.inputs[3] is not None) for case in cases}
    assert forms == {(layout, *form) for layout in LAYOUTS for form in ((8, False), (4, False), (4, True))}
    if contract.name in ("linear_q", "linear_gated_q", "logits_q"):
        shapes = [(len(case.inputs[0]), case.inputs[0].shape[1]) for case in cases if case.inputs[0] is not None]
        assert {1, 6, 7, 64, 130} <= {rows for rows, _ in shapes}
        assert {32, 96, 992} <= {columns for _, columns in shapes}


def test_by_hand_each_form_means_what_the_layout_says() -> None:
    x = torch.zeros(2, GROUP, dtype=torch.float64)
    x[0, 1], x[1, 17] = 1, 10
    scale = torch.tensor([[0.5]], dtype=torch.float16)
    codes = torch.arange(-16, 16, dtype=torch.int8)[None]
    linear = contract_of("linear_q").function
    assert linear(x, codes, scale, None, None, bits=8).tolist() == [[-7.5], [5.0]]
    packed = torch.full((1, 16), 8 | 8 << 4, dtype=torch.uint8)
    packed[0, 1] = 3 | 15 << 4
    assert linear(x, packed, scale, None, None, bits=4).tolist() == [[-2.5], [35.0]]
    offset = torch.tensor([[-1.0]], dtype=torch.float16)
    assert linear(x, packed, scale, offset, None, bits=4).tolist() == [[0.5], [65.0]]
    bias = torch.tensor([4.0], dtype=torch.float64)
    assert linear(x, packed, scale, offset, bias, bits=4).tolist() == [[4.5], [69.0]]


@pytest.mark.parametrize("name", list(FLOAT_OPS))
def test_the_oracle_is_the_float_op_on_the_dequantised_weight(name: str) -> None:
    contract = contract_of(name)
    for case in cases_of(contract):
        x, codes, scale, offset, *rest = (
            value.half().double() if place in (2, 3) and value is not None else value
            for place, value in enumerate(case.inputs)
        )
        assert codes is not None
        assert scale is not None
        given, layout = (codes, scale, offset), str(case.attrs["layout"])
        codes, scale = in_rows(codes, CODES_WORD, layout), in_rows(scale, GROUP_WORD, layout)
        offset = None if offset is None else in_rows(offset, GROUP_WORD, layout)
        elements = codes.double()
        if case.attrs["bits"] == 4:
            groups = codes.view(len(codes), -1, 16)
            elements = torch.cat((groups & 15, groups >> 4), -1).view(len(codes), -1).double()
            elements -= 8 if offset is None else 0
        weight = elements * scale.repeat_interleave(GROUP, 1)
        weight = weight if offset is None else weight + offset.repeat_interleave(GROUP, 1)
        attrs = {key: value for key, value in contract.complete_attrs(case.attrs).items() if key != "bits"}
        attrs["layout"] = ROWS
        expected = FLOAT_OPS[name].function(x, weight, *rest, **attrs)
        found = oracle(contract, (x, *given, *rest), case.attrs)
        for got, want in zip(found.values(), expected if isinstance(expected, tuple) else (expected,), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


X, I8, U8 = TensorSpec(DType.F32, ("T", 64)), TensorSpec(DType.I8, (9, 64)), TensorSpec(DType.U8, (9, 32))
SCALE = TensorSpec(DType.F16, (9, 2))


@pytest.mark.parametrize(
    ("specs", "bits", "message"),
    [
        ((X, I8, SCALE, SCALE), 8, "8 bits are symmetric and take no offset"),
        ((X, U8, SCALE, None), 8, r"with 8 bits.*codes must be i8 with 64 columns, is u8\[9, 32\]"),
        ((X, I8, SCALE, None), 4, r"with 4 bits.*codes must be u8 with 32 columns, is i8\[9, 64\]"),
        ((X, TensorSpec(DType.U8, (9, 64)), SCALE, None), 4, "codes must be u8 with 32 columns"),
        ((X, TensorSpec(DType.I32, (9, 64)), SCALE, None), 8, r"'codes' must be i8 or u8, is i32\[9, 64\]"),
        ((X, I8, TensorSpec(DType.F32, (9, 2)), None), 8, r"'scale' must be f16, is f32\[9, 2\]"),
        ((X, I8, TensorSpec(DType.F16, (9, 3)), None), 8, "scale must have 2 columns"),
        ((X, I8, TensorSpec(DType.F16, (8, 2)), None), 8, r"'scale'.*dimension N must be 9"),
        ((X, U8, SCALE, TensorSpec(DType.F16, (9, 1))), 4, "offset must have 2 columns"),
        ((TensorSpec(DType.F32, ("T", 48)), I8, SCALE, None), 8, "columns of x must be a multiple of 32"),
        ((X, I8, SCALE, None), 2, "attribute bits must be 4 or 8, is 2"),
        ((X, I8, SCALE, None), "8", "attribute bits must be 4 or 8, is '8'"),
        ((X, I8, SCALE, None), True, "attribute bits must be 4 or 8, is True"),
    ],
)
def test_operands_that_do_not_belong_together_are_named(specs: tuple[Any, ...], bits: Any, message: str) -> None:
    contract = contract_of("linear_q")
    with pytest.raises(GraphError, match=message):
        contract.infer((*specs, None), contract.complete_attrs({"bits": bits}))


def test_a_weight_with_the_wrong_number_of_rows_for_its_heads_is_refused_under_the_ops_own_name() -> None:
    contract = contract_of("linear_heads_q")
    with pytest.raises(GraphError, match="op linear_heads_q: weight has 9 rows; 2 heads of 4"):
        contract.infer((X, I8, SCALE, None, None), {"heads": 2, "head_dim": 4, "bits": 8})


def test_the_cost_is_that_of_the_quantised_bytes() -> None:
    contract = contract_of("linear_q")
    x, activations = TensorSpec(DType.BF16, (3, 64)), 3 * (64 + 9) * 2
    for specs, bits, nbytes in (
        ((I8, SCALE, None), 8, 9 * 64 + 9 * 2 * 2),
        ((U8, SCALE, None), 4, 9 * 32 + 9 * 2 * 2),
        ((U8, SCALE, SCALE), 4, 9 * 32 + 9 * 2 * 4),
    ):
        cost = contract.call_cost((x, *specs, None), {"bits": bits})
        assert cost.bytes == nbytes + activations
        assert cost.flops == 2 * 3 * 9 * 64
