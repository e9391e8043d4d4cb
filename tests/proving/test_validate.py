"""The harness catches each kind of wrong kernel, and names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.contract import Case, OpContract
from slotwise.core.errors import ContractError
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.proving.validate import CaseResult, cases_of, check_row_invariance, run_case

Body = Callable[[Tensors, tuple[torch.Tensor, ...], Mapping[str, Attr]], None]


def _kernel(op: str, body: Body, **options: object) -> Kernel:
    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
    ) -> Launch:
        return lambda: body(inputs, outputs, attrs)

    return Kernel(op, f"{op}.planted", bind, **options)  # type: ignore[arg-type]


def _function(op: str) -> Body:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        result = contract_of(op).function(*inputs, **attrs)
        for output, value in zip(outputs, result if isinstance(result, tuple) else (result,), strict=True):
            output.copy_(value)

    return body


def _case(op: str, name: str) -> tuple[OpContract, Case]:
    contract = contract_of(op)
    return contract, next(case for case in cases_of(contract) if case.name == name)


def _run(op: str, name: str, body: Body, dtype: DType = DType.F32) -> CaseResult:
    contract, case = _case(op, name)
    return run_case(_kernel(op, body), contract, case, dtype)


def _storage(tensor: torch.Tensor) -> torch.Tensor:
    """All memory of a tensor's allocation, in elements of its dtype: what a kernel with a bad index can reach."""
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())


def test_the_function_itself_passes_with_its_distance_from_the_oracle() -> None:
    result = _run("linear", "odd sizes", _function("linear"))
    assert result.passed
    assert 0 < result.max_abs < 1e-4
    assert result.worst is not None
    assert result.worst[0] == "y"


@pytest.mark.parametrize(("place", "words"), [(0, "past the end"), (-1, "before the start")])
def test_a_write_outside_the_output_is_caught(place: int, words: str) -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("add")(inputs, outputs, attrs)
        start = outputs[0].storage_offset()
        _storage(outputs[0])[start - 1 if place else start + outputs[0].numel()] = 1.0

    result = _run("add", "ragged rows", body)
    assert result.outcome == "failed"
    assert "wrote outside sum" in result.message
    assert words in result.message
    assert all(part in str(result) for part in ("add.planted", "f32", "ragged rows"))


def test_a_write_past_a_cache_is_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        contract_of("write_slots").function(*inputs, **attrs)
        k_cache = inputs[2]
        assert k_cache is not None
        _storage(k_cache)[k_cache.storage_offset() + k_cache.numel()] = 1.0

    assert "wrote outside k_cache" in _run("write_slots", "last slot", body).message


def test_a_write_into_another_slot_is_caught_however_small() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("rotary_write")(inputs, outputs, attrs)
        v_cache, slots = inputs[7], inputs[8]
        assert v_cache is not None
        assert slots is not None
        free = next(slot for slot in range(len(v_cache)) if slot not in slots.tolist())
        v_cache[free, 0, 3] *= 1.000001

    result = _run("rotary_write", "grouped", body)
    assert result.outcome == "failed"
    assert result.message.startswith("v_cache[")
    assert "0 is allowed" in result.message


def test_a_dropped_last_row_is_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        full = torch.empty_like(outputs[0])
        _function("rms_norm")(inputs, (full,), attrs)
        outputs[0][:-1].copy_(full[:-1])

    result = _run("rms_norm", "ragged rows, offset 1", body)
    assert "left normed[6, 0] unwritten (192 of 1344 elements)" in result.message


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_one_untouched_element_is_caught(dtype: DType) -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        before = outputs[0][1, 5].clone()
        _function("add")(inputs, outputs, attrs)
        outputs[0][1, 5] = before

    assert "left sum[1, 5] unwritten (1 of" in _run("add", "ragged rows", body, dtype).message


@pytest.mark.parametrize("output", [0, 1])
def test_an_untouched_token_or_flag_is_caught(output: int) -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        tokens, ok = contract_of("greedy").function(*inputs)
        outputs[0][output == 0 :].copy_(tokens[output == 0 :])
        outputs[1][output == 1 :].copy_(ok[output == 1 :])

    name = ("tokens", "ok")[output]
    assert f"left {name}[0] unwritten" in _run("greedy", "7 rows of 33", body).message


def test_swapped_k_and_v_are_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        k, v, k_cache, v_cache, slots = inputs
        contract_of("write_slots").function(v, k, k_cache, v_cache, slots, **attrs)

    result = _run("write_slots", "one row", body)
    assert result.outcome == "failed"
    assert result.message.startswith("k_cache[5, ")
    assert "expected" in result.message


def test_a_changed_input_is_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("add")(inputs, outputs, attrs)
        assert inputs[1] is not None
        inputs[1][2, 7] += 1.0

    assert "changed its input b at [2, 7]" in _run("add", "wide", body).message


def test_an_error_in_one_element_is_named_with_its_numbers() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("linear")(inputs, outputs, attrs)
        outputs[0][3, 11] += 0.5

    result = _run("linear", "odd sizes", body)
    assert result.outcome == "failed"
    assert result.worst == ("y", (3, 11))
    assert result.max_abs == pytest.approx(0.5, rel=1e-3)
    assert "off by 0.5" in result.message
    assert "(1 of 231 elements are wrong)" in result.message


def test_a_nan_or_an_infinity_is_never_within_tolerance() -> None:
    for value in (float("nan"), float("inf")):

        def body(
            inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], value: float = value
        ) -> None:
            _function("linear")(inputs, outputs, attrs)
            outputs[0][0, 1] = value

        assert _run("linear", "odd sizes", body).worst == ("y", (0, 1))


def test_a_finite_number_where_minus_infinity_belongs_is_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("filter_logits")(inputs, outputs, attrs)
        outputs[0].clamp_(min=-1e30)

    result = _run("filter_logits", "top-k", body)
    assert result.outcome == "failed"
    assert "expected -inf" in result.message


def test_a_wrong_token_is_caught_but_the_token_of_a_broken_row_means_nothing_within_the_vocabulary() -> None:
    def shifted(rows: slice, by: int = 1) -> Body:
        def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
            _function("greedy")(inputs, outputs, attrs)
            outputs[0][rows] += by

        return body

    assert _run("greedy", "NaN, infinite and empty rows", shifted(slice(1, 4))).passed
    for by in (17, -17):
        outside = _run("greedy", "NaN, infinite and empty rows", shifted(slice(3, 4), by))
        assert (outside.outcome, outside.rule) == ("failed", "range")
        assert "not from 0 to below V = 17" in outside.message
    assert _run("greedy", "NaN, infinite and empty rows", shifted(slice(0, 1))).worst == ("tokens", (0,))


def test_a_kernel_that_raises_fails_with_its_words() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        raise IndexError("shared memory")

    assert _run("add", "one row", body).message == "raised IndexError: shared memory"


def test_a_refusal_is_no_pass_and_gives_the_kernels_reason() -> None:
    def refuses(call: CallSpec) -> str:
        return f"cannot do {call.dtype.value}"

    contract, case = _case("add", "one row")
    result = run_case(_kernel("add", _function("add"), refuses=refuses), contract, case, DType.BF16)
    assert (result.outcome, result.message, result.passed) == ("refused", "cannot do bf16", False)


def test_a_workspace_is_as_large_as_asked_guarded_and_poisoned() -> None:
    contract, case = _case("add", "one row")
    seen: list[torch.Tensor] = []

    def bind(
        inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], workspace: torch.Tensor | None
    ) -> Launch:
        assert workspace is not None
        seen.append(workspace.clone())

        def launch() -> None:
            _function("add")(inputs, outputs, attrs)
            _storage(workspace)[workspace.storage_offset() + len(workspace)] = 0

        return launch

    result = run_case(Kernel("add", "add.planted", bind, workspace=lambda call: 40), contract, case, DType.F32)
    assert "wrote outside its workspace" in result.message
    assert seen[0].tolist() == [255] * 40


def _by_row_count(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
    _function("add")(inputs, outputs, attrs)
    if len(outputs[0]) >= 8:
        outputs[0][2, 0] *= 1.0000002


def test_rows_whose_bits_depend_on_their_company_are_caught() -> None:
    contract, case = _case("add", "ragged rows")
    kernel = _kernel("add", _by_row_count)
    assert run_case(kernel, contract, case, DType.F32).passed
    result = check_row_invariance(kernel, contract, case, DType.F32)
    assert result.outcome == "failed"
    assert "among 8 rows: row 2 of sum, in place 2, has other bits than among 7 rows" in result.message


def test_a_promise_is_checked_as_far_as_it_goes() -> None:
    contract, case = _case("add", "ragged rows")
    assert check_row_invariance(_kernel("add", _by_row_count, invariant_rows=7), contract, case, DType.F32).passed
    beyond = check_row_invariance(_kernel("add", _by_row_count, invariant_rows=8), contract, case, DType.F32)
    assert beyond.outcome == "failed"
    nothing = check_row_invariance(_kernel("add", _by_row_count, invariant_rows=0), contract, case, DType.F32)
    assert nothing.outcome == "refused"


def test_cache_bits_that_depend_on_company_are_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("rotary_write")(inputs, outputs, attrs)
        k_cache, slots = inputs[6], inputs[8]
        assert k_cache is not None
        assert slots is not None
        if len(slots) > 2:
            k_cache[slots.long()] *= 1.0000002

    contract, case = _case("rotary_write", "grouped")
    assert run_case(_kernel("rotary_write", body), contract, case, DType.F32).passed
    result = check_row_invariance(_kernel("rotary_write", body), contract, case, DType.F32)
    assert "of k_cache has other bits" in result.message


def test_attention_that_looks_at_its_neighbours_length_is_caught() -> None:
    def body(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr]) -> None:
        _function("attention")(inputs, outputs, attrs)
        kv_len = inputs[4]
        assert kv_len is not None
        outputs[0].mul_(1.0 + 1e-6 * (len(kv_len) > 1))

    contract, case = _case("attention", "ragged batch with an empty draft")
    assert check_row_invariance(_kernel("attention", body), contract, case, DType.F32).outcome == "failed"


def test_an_op_without_rows_has_no_row_invariance_to_check() -> None:
    contract, case = _case("accept_coupled", "all")
    with pytest.raises(ContractError, match="accept_coupled has no row dimension"):
        check_row_invariance(_kernel("accept_coupled", _function("accept_coupled")), contract, case, DType.F32)
