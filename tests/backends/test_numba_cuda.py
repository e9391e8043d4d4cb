"""What the contract's cases leave out: long contexts, wide heads, odd memory, padding, broken rows, mixing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slotwise import LLM, Sampling
from slotwise.backends.numba_cuda.attention import SPLIT, split_size
from slotwise.backends.numba_cuda.linear_q import SPANS
from slotwise.backends.numba_cuda.linear_rows import CHUNK, warps_for
from slotwise.core.backend import Kernel, load_backend
from slotwise.core.contract import Case, Inputs
from slotwise.core.ops import contract_of
from slotwise.core.ops.attention import _paged
from slotwise.core.quantise import SCHEMES, quantise
from slotwise.core.specs import DType
from slotwise.proving.validate import call_of, case_inputs, cases_of, run_case

NUMBA = load_backend("numba_cuda")


def _check(kernel: str, case: Case, dtype: DType) -> None:
    found = NUMBA.kernel(kernel)
    result = run_case(found, contract_of(found.op), case, dtype, device=NUMBA.device)
    assert result.passed, str(result)


def _launched(kernel: Kernel, inputs: Inputs, case: Case) -> torch.Tensor:
    inputs = tuple(None if value is None else value.to(NUMBA.device) for value in inputs)
    call = call_of(contract_of(kernel.op), inputs, case.attrs)
    (spec,) = call.outputs
    out = torch.full(spec.sizes(), torch.nan, dtype=spec.dtype.torch, device=NUMBA.device)  # none may be left
    scratch = torch.full((kernel.workspace(call),), 0xFF, dtype=torch.uint8, device=NUMBA.device)
    kernel.bind(inputs, (out,), call.attrs, scratch)()
    return out


def _check_rows_alone(kernel: str, case: Case, dtype: DType) -> None:
    """Each row alone has the bits that it has among all rows."""
    found = NUMBA.kernel(kernel)
    contract = contract_of(found.op)
    inputs = case_inputs(contract, case, dtype, NUMBA.device)
    together = _launched(found, inputs, case)
    for row in range(len(together)):
        alone = _launched(found, contract.inputs_of_rows(inputs, [row]), case)
        assert torch.equal(alone[0], together[row]), f"row {row}"


def _attention(
    rows: tuple[int, ...], lengths: tuple[int, ...], dim: int = 24, heads: int = 2, window: int = 0, softcap: float = 0
) -> Case:
    rng = torch.Generator().manual_seed(3)
    starts, kv_len, table, pages = _paged(rng, rows, lengths, 16)
    q = torch.randn(sum(rows), heads, dim, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(pages * 16, 1, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    attrs = {"layer": 0, "page_size": 16, "scale": dim**-0.5, "window": window, "softcap": float(softcap)}
    return Case("more", (q, k, v, starts, kv_len, table), attrs)


def _product(rows: int, inner: int, outputs: int) -> Case:
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=rng, dtype=torch.float64)
    return Case("more", (x, torch.randn(outputs, inner, generator=rng, dtype=torch.float64) / inner**0.5, None))


def _quantised_product(rows: int, inner: int, outputs: int, scheme: str) -> tuple[Case, int]:
    x, weight, _ = _product(rows, inner, outputs).inputs
    assert weight is not None
    bits = SCHEMES[scheme].bits
    return Case("more", (x, *quantise(weight, scheme), None), {"bits": bits}), bits


@pytest.mark.parametrize("window", [0, 300])
def test_attention_over_several_splits_is_attention(window: int) -> None:
    _check("attention.split", _attention((3, 1, 0, 2), (2 * SPLIT + 1, SPLIT, 0, SPLIT + 1), window=window), DType.F32)


def test_attention_tiles_take_long_contexts() -> None:
    _check("attention.tiles", _attention((70, 2), (300, 40), window=70), DType.BF16)


def test_attention_tiles_cap_scores_as_far_as_exponentials_overflow() -> None:
    _check("attention.tiles", _attention((20, 2), (50, 40), softcap=1e-2), DType.BF16)


@pytest.mark.parametrize("kernel", ["attention.split", "attention.tiles"])
@pytest.mark.parametrize("dim", [16, 72, 144, 200])
def test_heads_of_any_width_are_attended(kernel: str, dim: int) -> None:
    _check(kernel, _attention((5, 1), (40, 9), dim=dim), DType.BF16)


def test_a_head_that_fits_no_16_byte_access_is_read_element_by_element() -> None:
    case = _attention((5, 1), (40, 9), dim=33)
    _check("attention.split", case, DType.BF16)
    call = call_of(contract_of("attention"), case_inputs(contract_of("attention"), case, DType.BF16), case.attrs)
    assert "a head of 33 has a rest" in str(NUMBA.kernel("attention.tiles").refuses(call))


def test_eight_query_heads_can_share_a_kv_head() -> None:
    _check("attention.split", _attention((2, 1), (20, 9), heads=8), DType.F16)


def test_rows_over_several_splits_keep_their_bits_alone() -> None:
    _check_rows_alone("attention.split", _attention((5, 1), (SPLIT + 3, 300), window=70, softcap=5), DType.BF16)


@pytest.mark.parametrize(
    ("kernel", "name", "dtype"),
    [
        ("attention.split", "ragged batch with an empty draft", DType.F32),
        ("linear.rows", "k + 1 rows", DType.BF16),
        ("linear.rows", "odd sizes", DType.BF16),
        ("linear_gated.rows", "odd sizes, silu", DType.F32),
        ("linear_q.rows", "odd sizes, int4 with offset, rows, bias", DType.BF16),
        ("linear_gated_q.rows", "k + 1 rows, int8, rows, gelu_tanh", DType.F16),
        ("linear_q.rows", "k + 1 rows, int4, rows, bias", DType.F32),
        ("rms_norm.rows", "ragged rows, offset 0", DType.F32),
    ],
)
def test_rows_keep_their_bits_alone(kernel: str, name: str, dtype: DType) -> None:
    cases = cases_of(contract_of(NUMBA.kernel(kernel).op))
    _check_rows_alone(kernel, next(case for case in cases if case.name == name), dtype)


def test_rows_of_a_deep_product_keep_their_bits_whichever_tile_they_are_in() -> None:
    assert warps_for(40, 1024) > 4  # more warps share K, so more partial sums are added
    case = _product(13, 1024, 40)
    _check("linear.rows", case, DType.BF16)
    _check_rows_alone("linear.rows", case, DType.BF16)


@pytest.mark.parametrize(("scheme", "inner"), [("int8", 2048), ("int4", 4096)])
def test_rows_of_a_deep_quantised_product_keep_their_bits_whichever_tile_they_are_in(scheme: str, inner: int) -> None:
    case, bits = _quantised_product(9, inner, 24, scheme)
    assert warps_for(24, inner, 8 * SPANS[bits]) > 4
    _check("linear_q.rows", case, DType.BF16)
    _check_rows_alone("linear_q.rows", case, DType.BF16)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_codes_at_an_odd_place_in_memory_give_the_same_product(scheme: str, dtype: DType) -> None:
    case, _ = _quantised_product(6, 96, 21, scheme)
    kernel = NUMBA.kernel("linear_q.rows")
    x, codes, *rest = case_inputs(contract_of("linear_q"), case, dtype, NUMBA.device)
    assert codes is not None
    held = torch.zeros(codes.numel() + 8, dtype=codes.dtype, device=NUMBA.device)
    moved = held[3 : 3 + codes.numel()].view(codes.shape).copy_(codes)
    expected = _launched(kernel, (x, codes, *rest), case)
    assert (_launched(kernel, (x, moved, *rest), case) - expected).abs().max() < (0.05 if dtype is DType.BF16 else 1e-5)
    assert expected.abs().max() > 1


def test_warps_share_a_sum_only_while_each_has_two_chunks() -> None:
    for outputs, inner in ((16, 64), (1024, 2048), (4096, 14336), (128256, 4096)):
        warps = warps_for(outputs, inner)
        assert warps == 4 or inner >= 2 * warps * CHUNK


@pytest.mark.parametrize("kernel", ["linear.rows", "linear.tiles"])
@pytest.mark.parametrize("rows", [9, 130])
def test_a_product_of_more_outputs_than_a_tile_is_the_product(kernel: str, rows: int) -> None:
    _check(kernel, _product(rows, 104, 200), DType.BF16)


@pytest.mark.parametrize(("op", "offset"), [("linear.rows", 1), ("linear.tiles", 1), ("linear.rows", 3)])
def test_weights_at_an_odd_place_in_memory_give_the_same_product(op: str, offset: int) -> None:
    case = _product(6, 64, 40)
    kernel = NUMBA.kernel(op)
    x, weight, bias = case_inputs(contract_of("linear"), case, DType.BF16, NUMBA.device)
    assert weight is not None
    held = torch.zeros(weight.numel() + 8, dtype=weight.dtype, device=NUMBA.device)
    moved = held[offset : offset + weight.numel()].view(weight.shape).copy_(weight)
    difference = _launched(kernel, (x, moved, bias), case) - _launched(kernel, (x, weight, bias), case)
    assert difference.abs().max() < 0.05


def test_a_page_table_gets_at_most_as_many_splits_as_planned() -> None:
    for keys in (1, SPLIT, SPLIT + 1, 8192, 8193, 131072, 1_000_000):
        assert -(-keys // split_size(keys)) <= 32
        assert split_size(keys) >= SPLIT


@pytest.mark.parametrize("name", ["attention.split", "attention.tiles"])
@pytest.mark.parametrize("lengths", [(40, 17), (600, 300)])
def test_rows_that_belong_to_no_sequence_are_zero(name: str, lengths: tuple[int, ...]) -> None:
    case = _attention((4, 3), lengths)
    inputs = case_inputs(contract_of("attention"), case, DType.BF16, NUMBA.device)
    starts = inputs[3]
    assert starts is not None
    starts[2] = 5  # two rows of padding
    out = _launched(NUMBA.kernel(name), inputs, case)
    assert out[5:].eq(0).all()
    assert out[:5].ne(0).any(-1).all()


@pytest.mark.parametrize("op", ["write_slots", "rotary_write"])
def test_of_rows_with_one_slot_the_last_writes_it(op: str) -> None:
    contract = contract_of(op)
    case = cases_of(contract)[1]
    inputs = case_inputs(contract, case, DType.F32, NUMBA.device)
    slots = inputs[-1]
    assert slots is not None
    slots[:] = 1  # as padded rows have one
    outputs = tuple(torch.empty_like(inputs[0]) for _ in contract.outputs)  # type: ignore[arg-type]
    kernel = next(kernel for kernel in NUMBA.kernels if kernel.op == op)
    kernel.bind(inputs, outputs, contract.complete_attrs(case.attrs), None)()
    v, v_cache = (inputs[1], inputs[3]) if op == "write_slots" else (inputs[2], inputs[7])
    assert v is not None
    assert v_cache is not None
    assert torch.equal(v_cache[1], v[-1])


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800000], ids=["NaN", "negative NaN", "infinity"])
@pytest.mark.parametrize("control", [(0.0, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.0, 9, 0.9, 0.1)])
def test_a_broken_row_is_still_broken_after_the_filters(bits: int, control: tuple[float, int, float, float]) -> None:
    device = NUMBA.device
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).to(device)
    logits.view(torch.int32)[0, 130] = bits - 2**32 if bits >= 2**31 else bits
    controls = [torch.tensor([value]).to(device) for value in control]
    controls[1] = controls[1].int()
    scores = torch.zeros(1, 200, device=device)
    NUMBA.kernel("filter_logits.rows").bind((logits, *controls), (scores,), {}, None)()
    tokens, ok = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.bool, device=device)
    scratch = torch.zeros(4096, dtype=torch.uint8, device=device)
    NUMBA.kernel("greedy.pieces").bind((scores,), (tokens, ok), {}, scratch)()
    assert not ok.item()
    assert 0 <= tokens.item() < 200


def test_equal_tokens_are_kept_from_the_lowest_up() -> None:
    device = NUMBA.device
    logits = torch.zeros(2, 1500, device=device)  # more tokens than a block has threads
    controls = (torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.tensor([0.1, 0.9]), torch.zeros(2))
    scores = torch.zeros(2, 1500, device=device)
    NUMBA.kernel("filter_logits.rows").bind((logits, *(c.to(device) for c in controls)), (scores,), {}, None)()
    kept = scores.isfinite()
    for row, expected in ((0, 150), (1, 1350)):
        assert kept[row].nonzero().flatten().tolist() == list(range(expected))


def _acceptance(target: torch.Tensor, draft: torch.Tensor, drafted: int) -> Case:
    """Sequences of one draft each; `target` and `draft` are a row of scores for each, the token after it is any."""
    count, size = target.shape
    rng = torch.Generator().manual_seed(11)
    after = torch.randn(count, size, generator=rng, dtype=torch.float64)
    rows = [torch.stack((scores, after), 1).reshape(2 * count, size) for scores in (target, draft)]
    token_ids = torch.full((2 * count,), drafted, dtype=torch.int32)
    starts = torch.arange(0, 2 * count + 1, 2, dtype=torch.int32)
    keys = torch.randint(-(2**62), 2**62, (2 * count,), generator=rng), torch.arange(2 * count, dtype=torch.int32)
    return Case("wide", (*rows, token_ids, starts, *keys))


def test_mass_anywhere_in_a_wide_row_decides_about_a_draft() -> None:
    """One token beside the draft holds nearly all mass: forget it, and an unlikely draft looks certain."""
    drafted, size = 300, 600  # more tokens than two rounds of a block
    places = [0, 1, 255, 256, 511, 512, 599] * 4
    unlikely = torch.full((len(places), size), -30.0, dtype=torch.float64)
    unlikely[range(len(places)), places] = 3.0
    unlikely[:, drafted] = 0.0
    certain = torch.full((len(places), size), -30.0, dtype=torch.float64)
    certain[:, drafted], certain[:, 7] = 0.0, -0.5
    _check("accept_rejection.sequences", _acceptance(unlikely, certain, drafted), DType.F32)
    _check("accept_rejection.sequences", _acceptance(certain, unlikely, drafted), DType.F32)


def test_a_nan_anywhere_in_a_wide_row_ends_the_run_there() -> None:
    target = torch.randn(6, 600, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target[range(5), [0, 5, 256, 300, 599]] = torch.nan
    case = _acceptance(target, target.nan_to_num(0.0), 300)
    _check("accept_rejection.sequences", case, DType.F32)
    _, _, ok = contract_of("accept_rejection").function(*case.inputs)
    assert ok.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("bad", [0, 2, 1023, 4095, 4098, 8999])
def test_a_nan_anywhere_in_a_row_of_many_pieces_is_seen(bad: int) -> None:
    scores = torch.randn(2, 9000, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores[1, bad] = torch.nan
    tokens, ok = (torch.zeros(2, dtype=kind, device=NUMBA.device) for kind in (torch.int32, torch.bool))
    scratch = torch.zeros(4096, dtype=torch.uint8, device=NUMBA.device)
    NUMBA.kernel("greedy.pieces").bind((scores.float().to(NUMBA.device),), (tokens, ok), {}, scratch)()
    assert ok.tolist() == [True, False]


@pytest.mark.parametrize("count", [8, 520, 1024, 1032])
def test_gated_rows_that_end_anywhere_in_a_block_are_all_there(count: int) -> None:
    rng = torch.Generator().manual_seed(count)
    gate, up = (torch.randn(1, count, generator=rng, dtype=torch.float64) for _ in range(2))
    _check("gated_activation.flat", Case("gates", (gate, up), {"activation": "silu"}), DType.BF16)


@pytest.mark.parametrize("stream", [0, 3])
def test_draws_over_many_pieces_are_those_of_the_definition(stream: int) -> None:
    rng = torch.Generator().manual_seed(8)
    scores = torch.randn(3, 9000, generator=rng, dtype=torch.float64)
    keys = (torch.tensor([1, -7, 2**40]), torch.tensor([0, 5, 4095], dtype=torch.int32))
    _check("sample.pieces", Case("wide", (scores, *keys), {"stream": stream}), DType.F32)
    _check("greedy.pieces", Case("wide", (scores,)), DType.F32)


def test_attention_of_this_backend_joins_the_rest_of_another(stories_draft: Path) -> None:
    sampling = Sampling(max_new_tokens=4)
    options = {"dtype": "f32", "capacity": 32, "speculate": 0, "max_sequences": 1, "decode_rows": 1, "prefill_chunk": 8}
    mixed = LLM(stories_draft, backend={"*": "reference", "attention": "numba_cuda"}, **options)  # type: ignore[arg-type]
    chosen = {node.selection.kernel for program in mixed.plan().programs for node in program.graph.nodes}  # type: ignore[union-attr]
    assert "numba_cuda:attention.split" in chosen
    assert any(name.startswith("reference:") for name in chosen)
    expected = LLM(stories_draft, backend="reference", **options).generate("Once", sampling)  # type: ignore[arg-type]
    assert mixed.generate("Once", sampling).token_ids == expected.token_ids
