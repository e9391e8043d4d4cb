"""Every op keeps its declaration: cases that cover it, and a function that makes what the contract infers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from slotwise.core.contract import Case, OpContract
from slotwise.core.errors import ContractError, GraphError
from slotwise.core.ops import contract_of, contracts
from slotwise.core.specs import DType, TensorSpec
from slotwise.proving.validate import call_of, case_inputs, cases_of, dtypes_of, oracle

OPS = tuple(contracts().values())
RUNS = [
    pytest.param(contract, case, dtype, id=f"{contract.name}-{dtype.value}-{case.name}")
    for contract in OPS
    for dtype in dtypes_of(contract)
    for case in cases_of(contract)
]


@pytest.mark.parametrize("contract", OPS, ids=lambda contract: contract.name)
def test_every_op_has_cases_with_names_of_their_own_and_one_row_among_them(contract: OpContract) -> None:
    cases = cases_of(contract)
    names = [case.name for case in cases]
    assert len(names) >= 2
    assert len(set(names)) == len(names)
    if contract.rows is not None:
        rows = [call_of(contract, case_inputs(contract, case, DType.F32), case.attrs).rows for case in cases]
        assert 1 in rows
        assert max(rows) > 1


@pytest.mark.parametrize("contract", OPS, ids=lambda contract: contract.name)
def test_cases_are_the_same_for_the_same_seed(contract: OpContract) -> None:
    for first, second in zip(cases_of(contract, 3), cases_of(contract, 3), strict=True):
        assert first.name == second.name
        assert first.attrs == second.attrs
        for a, b in zip(first.inputs, second.inputs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("contract", "case", "dtype"), RUNS)
def test_the_function_makes_what_the_contract_infers(contract: OpContract, case: Case, dtype: DType) -> None:
    inputs = case_inputs(contract, case, dtype)
    call = call_of(contract, inputs, case.attrs)
    result = contract.function(*inputs, **call.attrs)
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    found = tuple(TensorSpec(DType.of(value), tuple(value.shape)) for value in results)
    assert found == call.outputs


@pytest.mark.parametrize(("contract", "case", "dtype"), RUNS)
def test_the_oracle_is_float64_and_leaves_its_inputs_alone(contract: OpContract, case: Case, dtype: DType) -> None:
    inputs = case_inputs(contract, case, dtype)
    before = [None if value is None else value.clone() for value in inputs]
    for value in oracle(contract, inputs, case.attrs).values():
        assert value.dtype in (torch.float64, torch.int32, torch.bool)
    for was, value in zip(before, inputs, strict=True):
        torch.testing.assert_close(value, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("contract", "case", "dtype"), RUNS)
def test_a_call_costs_something_and_has_a_tolerance(contract: OpContract, case: Case, dtype: DType) -> None:
    call = call_of(contract, case_inputs(contract, case, dtype), case.attrs)
    cost = contract.call_cost(call.inputs, call.attrs)
    assert cost.flops >= 0
    assert (cost.bytes > 0) != contract.logical
    assert dtype in contract.tolerance


@pytest.mark.parametrize("contract", OPS, ids=lambda contract: contract.name)
def test_symbolic_rows_stay_symbolic(contract: OpContract) -> None:
    if contract.rows is None:
        pytest.skip("no row dimension")
    case = cases_of(contract)[0]
    call = call_of(contract, case_inputs(contract, case, DType.F32), case.attrs)
    inputs = tuple(
        None
        if spec is None
        else TensorSpec(
            spec.dtype, tuple(d if d == contract.rows else s for d, s in zip(a.dims, spec.shape, strict=True))
        )
        for a, spec in zip(contract.inputs, call.inputs, strict=True)
    )
    for argument, spec, bound in zip(contract.outputs, contract.infer(inputs, call.attrs), call.outputs, strict=True):
        assert spec.shape[0] == argument.dims[0] == contract.rows
        assert spec.sized({contract.rows: call.rows}) == bound


@pytest.mark.parametrize(("contract", "case", "dtype"), [run for run in RUNS if run.values[0].rows is not None])
def test_a_call_on_some_rows_gives_those_rows(contract: OpContract, case: Case, dtype: DType) -> None:
    inputs = case_inputs(contract, case, dtype)
    total = call_of(contract, inputs, case.attrs).rows
    rows = [total - 1, 0, total - 1]
    whole = oracle(contract, inputs, case.attrs)
    part = oracle(contract, contract.inputs_of_rows(inputs, rows), case.attrs)
    for argument in contract.outputs:
        torch.testing.assert_close(part[argument.name], whole[argument.name][rows], equal_nan=True)


def test_an_op_is_found_by_name_or_the_nearest_is_suggested() -> None:
    assert contract_of("linear").name == "linear"
    with pytest.raises(GraphError, match=r"op 'rmsnorm' is not known \(did you mean 'rms_norm'\?\)"):
        contract_of("rmsnorm")


def test_dimensions_plus_a_constant_are_matched_both_ways() -> None:
    contract = contract_of("accept_coupled")

    def infer(starts: int | str) -> tuple[TensorSpec, ...]:
        rows = TensorSpec(DType.I32, ("R",))
        return contract.infer((rows, rows, TensorSpec(DType.I32, (starts,))), {})

    assert infer("B+1")[0].shape == ("B",)
    assert infer("B+3")[0].shape == ("B+2",)
    assert infer(5)[0].shape == (4,)
    with pytest.raises(GraphError, match="'B' is too small: 1 cannot be taken"):
        infer("B")


def test_effects_name_the_layer_and_the_span() -> None:
    kinds = {c.name: [str(effect) for effect in c.effects_of({"layer": 3})] for c in OPS}
    assert kinds["write_slots"] == kinds["rotary_write"] == ["writes kv3[slots]"]
    assert kinds["attention"] == ["reads kv3[page_table up to kv_len]"]
    assert kinds["attend"] == ["writes kv3[the sequence's tokens]", "reads kv3[the sequence's tokens]"]
    assert kinds["linear"] == []


def test_an_output_dimension_that_no_input_gives_is_a_fault_of_the_contract() -> None:
    good = contract_of("add")
    broken = replace(good, outputs=(replace(good.outputs[0], dims=("T", "Q")),))
    spec = TensorSpec(DType.F32, ("T", 4))
    with pytest.raises(ContractError, match="dimension 'Q' is used but no input gives it"):
        broken.infer((spec, spec), {})
