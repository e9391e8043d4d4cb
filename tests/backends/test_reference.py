"""The reference backend covers every op, keeps rows apart at real sizes, and can be launched again and again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from slotwise.core.backend import CallSpec, load_backend
from slotwise.core.contract import Case
from slotwise.core.ops import contract_of, contracts
from slotwise.core.specs import DType, TensorSpec
from slotwise.proving.validate import call_of, case_inputs, cases_of, check_row_invariance, dtypes_of, run_case

REFERENCE = load_backend("reference")


@pytest.mark.parametrize("op", [name for name, contract in contracts().items() if not contract.logical])
def test_every_op_has_a_row_invariant_kernel_listed_first_that_refuses_no_case(op: str) -> None:
    contract = contract_of(op)
    first = REFERENCE.kernels_for(op)[0]
    assert first.invariant_rows is None
    for case in cases_of(contract):
        for dtype in dtypes_of(contract):
            assert first.refuses(call_of(contract, case_inputs(contract, case, dtype), case.attrs)) is None


def test_logical_ops_have_no_kernel() -> None:
    assert REFERENCE.kernels_for("attend") == ()


def test_kernels_are_named_after_their_op_and_once() -> None:
    names = [kernel.name for kernel in REFERENCE.kernels]
    assert len(set(names)) == len(names)
    assert all(kernel.name in (f"{kernel.op}.by_row", f"{kernel.op}.whole") for kernel in REFERENCE.kernels)


def _real_sizes() -> Iterator[tuple[str, Case]]:
    """Widths around and off the sizes of vector registers, as models have them; 70 rows."""
    rng = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    rows = 70
    for width in (101, 288, 1023):
        x, weight = randn(rows, width), randn(300, width) / width**0.5
        yield "linear", Case(f"K {width}", (x, weight, randn(300)))
        yield "linear_heads", Case(f"K {width}", (x, weight, None), {"heads": 10, "head_dim": 30})
        yield "linear_qkv", Case(f"K {width}", (x, weight, None), {"q_heads": 6, "kv_heads": 2, "head_dim": 30})
        yield "logits", Case(f"H {width}", (x, weight), {"softcap": 4.0})
        for activation in ("silu", "gelu", "gelu_tanh"):
            yield "gated_activation", Case(f"{activation} {width}", (x, x + 0.1), {"activation": activation})
        yield "linear_gated", Case(f"K {width}", (x, weight), {"activation": "silu"})
        yield "add", Case(f"H {width}", (x, randn(rows, width)))
        for offset in (0.0, 1.0):
            attrs = {"eps": 1e-6, "weight_offset": offset}
            yield "rms_norm", Case(f"H {width}, offset {offset}", (x, randn(width)), attrs)
            yield "add_rms_norm", Case(f"H {width}, offset {offset}", (x, x + 1, randn(width)), attrs)
            yield "head_rms_norm", Case(f"D {width}, offset {offset}", (randn(rows, 3, width), randn(width)), attrs)
    for vocabulary in (33, 2049):
        scores = randn(rows, vocabulary) * 3
        controls = (
            torch.rand(rows, generator=rng) * 2,
            torch.randint(0, 50, (rows,), generator=rng, dtype=torch.int32),
            torch.rand(rows, generator=rng),
            torch.rand(rows, generator=rng) / 10,
        )
        keys = (torch.randint(-(2**62), 2**62, (rows,), generator=rng), torch.arange(rows, dtype=torch.int32))
        yield "greedy", Case(f"V {vocabulary}", (scores,))
        yield "filter_logits", Case(f"V {vocabulary}", (scores, *controls))
        yield "sample", Case(f"V {vocabulary}", (scores, *keys), {"stream": 0})


# PyTorch uses a second thread only from 32768 elements on, which only the widest cases have.
_COMPANIES = [
    pytest.param(op, case, threads, id=f"{op}-{case.name}-{threads}")
    for op, case in _real_sizes()
    for threads in ((1, 3) if "1023" in case.name or "2049" in case.name else (1,))
]


@pytest.mark.parametrize(("op", "case", "threads"), _COMPANIES)
def test_rows_keep_their_bits_at_real_sizes_with_any_number_of_threads(op: str, case: Case, threads: int) -> None:
    contract = contract_of(op)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in dtypes_of(contract):
            for kernel in REFERENCE.kernels_for(op):
                if kernel.is_row_invariant(1):
                    result = check_row_invariance(kernel, contract, case, dtype)
                    assert result.passed, str(result)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_attention_does_not_depend_on_which_pages_hold_the_tokens(dtype: DType) -> None:
    contract = contract_of("attention")
    kernel = REFERENCE.kernel("attention.by_row")
    case = next(case for case in cases_of(contract) if case.name == "ragged batch with an empty draft")
    inputs = case_inputs(contract, case, dtype)
    q, k_cache, v_cache, starts, kv_len, table = (value for value in inputs if value is not None)
    size = int(case.attrs["page_size"])
    order = torch.randperm(len(k_cache) // size, generator=torch.Generator().manual_seed(5))
    where = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    moved = [cache.view(-1, size, *cache.shape[1:])[order].flatten(0, 1) for cache in (k_cache, v_cache)]
    call = call_of(contract, inputs, case.attrs)
    results = []
    for caches, pages in (((k_cache, v_cache), table), (moved, where[table.long()].to(torch.int32))):
        out = torch.empty(call.outputs[0].sizes(), dtype=dtype.torch)
        kernel.bind((q, *caches, starts, kv_len, pages), (out,), call.attrs, None)()
        results.append(out)
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["attention.by_row", "attention.whole"])
def test_rows_that_belong_to_no_sequence_are_zero(name: str) -> None:
    contract = contract_of("attention")
    case = next(case for case in cases_of(contract) if case.name == "verify k+1 rows over a page edge")
    q, k_cache, v_cache, starts, kv_len, table = case_inputs(contract, case, DType.F32)
    assert starts is not None
    shorter = (starts - 2).clamp(min=0)
    out = torch.full((6, 192), float("nan"))
    attrs = contract.complete_attrs(case.attrs)
    REFERENCE.kernel(name).bind((q, k_cache, v_cache, shorter, kv_len, table), (out,), attrs, None)()
    assert out[4:].eq(0).all()
    assert out[:4].ne(0).any(-1).all()


@pytest.mark.parametrize("kernel", REFERENCE.kernels, ids=lambda kernel: kernel.name)
def test_a_bound_launch_reads_its_inputs_anew_each_time(kernel) -> None:  # type: ignore[no-untyped-def]
    contract = contract_of(kernel.op)
    several = [case for case in cases_of(contract) if (case.inputs[0] is not None and len(case.inputs[0]) > 1)]
    case = several[0]
    inputs = case_inputs(contract, case, DType.F32)
    call = call_of(contract, inputs, case.attrs)

    def fresh() -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty(spec.sizes(), dtype=spec.dtype.torch) for spec in call.outputs)

    def changed() -> list[torch.Tensor]:
        """What a launch leaves: its outputs and the caches it wrote."""
        caches = [v for a, v in zip(contract.inputs, buffers, strict=True) if a.cache == "writes" and v is not None]
        return [tensor.clone() for tensor in (*outputs, *caches)]

    buffers = tuple(None if value is None else torch.zeros_like(value) for value in inputs)
    outputs = fresh()
    launch = kernel.bind(buffers, outputs, call.attrs, None)
    for buffer, value in zip(buffers, inputs, strict=True):
        if buffer is not None and value is not None:
            buffer.copy_(value)
    launch()
    first = changed()
    launch()
    assert all(torch.equal(a, b) for a, b in zip(first, changed(), strict=True))
    twin = run_case(kernel, contract, case, DType.F32)
    assert twin.passed, str(twin)
    again = fresh()
    kernel.bind(inputs, again, call.attrs, None)()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=False))


def _call(op: str, *specs: TensorSpec, **attrs: int | float | str) -> CallSpec:
    full = contract_of(op).complete_attrs(attrs)
    return CallSpec(op, specs, contract_of(op).infer(specs, full), full)


def test_a_refusal_gives_the_numbers() -> None:
    def f32(*shape: int) -> TensorSpec:
        return TensorSpec(DType.F32, shape)

    i32 = TensorSpec(DType.I32, (4,))
    cache = f32(64, 3, 8)
    starts, pages = TensorSpec(DType.I32, (2,)), TensorSpec(DType.I32, (1, 4))
    one = TensorSpec(DType.I32, (1,))
    calls = {
        "linear_gated.by_row": (_call("linear_gated", f32(4, 8), f32(6, 8), activation="relu"), "'relu' is not one of"),
        "gated_activation.whole": (_call("gated_activation", f32(4, 8), f32(4, 8), activation="relu"), "silu, gelu"),
        "rotary.whole": (
            _call("rotary", f32(4, 2, 8), f32(4, 2, 8), i32, f32(9, 5), f32(9, 5)),
            "width 5 rotate 10 dimensions, but a head has 8",
        ),
        "attention.by_row": (
            _call("attention", f32(4, 4, 8), cache, cache, starts, one, pages, layer=0, page_size=16, scale=1.0),
            "4 query heads cannot share 3",
        ),
        "rms_norm.whole": (_call("rms_norm", f32(4, 40000), f32(40000), eps=1e-6), "the limit is 32767"),
    }
    for name, (call, words) in calls.items():
        reason = REFERENCE.kernel(name).refuses(call)
        assert reason is not None, name
        assert words in reason
    assert REFERENCE.kernel("rms_norm.by_row").refuses(calls["rms_norm.whole"][0]) is None
