"""What the contract's cases leave out: long contexts in splits, K in parts, padding, broken rows, configurations."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[triton]'")

import triton
import triton.language as tl

from slotwise.backends.cuda_triton import configurations, linear, tuning
from slotwise.backends.cuda_triton.attention import SPLIT, split_size
from slotwise.backends.cuda_triton.interpreter import interpret
from slotwise.backends.cuda_triton.noise import uniform_noise
from slotwise.core.backend import Kernel, load_backend
from slotwise.core.contract import Case, Inputs
from slotwise.core.errors import BackendError
from slotwise.core.graph import Attr
from slotwise.core.layouts import ROWS
from slotwise.core.ops import contract_of, contracts
from slotwise.core.ops.attention import _paged
from slotwise.core.ops.noise import ACCEPT_STREAM, DRAFT_STREAM, TARGET_STREAM
from slotwise.core.ops.noise import uniform_noise as definition
from slotwise.core.quantise import SCHEMES, quantise
from slotwise.core.specs import DType
from slotwise.proving.validate import call_of, case_inputs, cases_of, run_case, try_case

TRITON = load_backend("cuda_triton")


def _check(kernel: Kernel, case: Case, dtype: DType) -> None:
    result = run_case(kernel, contract_of(kernel.op), case, dtype, device=TRITON.device)
    assert result.passed, str(result)


def _check_rows_alone(kernel: Kernel, case: Case, most: int = 8) -> None:
    """Each of the first and last rows, `most` at most, alone has the bits that it has among all rows."""
    contract = contract_of(kernel.op)

    def launched(inputs: Inputs) -> torch.Tensor:
        call = call_of(contract, inputs, case.attrs)
        out = torch.empty(call.outputs[0].sizes(), device=TRITON.device)
        scratch = torch.full((kernel.workspace(call),), 0xFF, dtype=torch.uint8, device=TRITON.device)
        kernel.bind(inputs, (out,), call.attrs, scratch)()
        return out

    inputs = case_inputs(contract, case, DType.F32, TRITON.device)
    together = launched(inputs)
    for row in sorted({*range(len(together))[: most // 2], *range(len(together))[-(most // 2) :]}):
        assert torch.equal(launched(contract.inputs_of_rows(inputs, [row]))[0], together[row]), f"row {row}"


def _long_attention(rows: tuple[int, ...], lengths: tuple[int, ...], window: int = 0, softcap: float = 0.0) -> Case:
    rng = torch.Generator().manual_seed(3)
    starts, kv_len, table, pages = _paged(rng, rows, lengths, 16)
    q = torch.randn(sum(rows), 2, 24, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(pages * 16, 1, 24, generator=rng, dtype=torch.float64) for _ in range(2))
    attrs = {"layer": 0, "page_size": 16, "scale": 24**-0.5, "window": window, "softcap": softcap}
    return Case("long", (q, k, v, starts, kv_len, table), attrs)


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(
    ("rows", "lengths"), [((3, 1, 2), (2 * SPLIT + 1, SPLIT, SPLIT + 1)), ((2, 0, 9), (520, 0, 260))]
)
def test_attention_over_several_splits_is_attention(
    rows: tuple[int, ...], lengths: tuple[int, ...], window: int
) -> None:
    _check(TRITON.kernel("attention.split"), _long_attention(rows, lengths, window), DType.F32)


def test_attention_tiles_take_long_contexts() -> None:
    _check(TRITON.kernel("attention.tiles"), _long_attention((30, 2), (300, 40), window=70), DType.BF16)


@pytest.mark.parametrize("window", [0, 70])
def test_rows_over_several_splits_keep_their_bits_alone(window: int) -> None:
    _check_rows_alone(TRITON.kernel("attention.split"), _long_attention((5, 1), (SPLIT + 3, 300), window, softcap=5.0))


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("attention.split", "ragged batch with an empty draft"),
        ("attention.split", "sliding window"),
        ("linear.rows", "k + 1 rows"),
        ("linear_gated.rows", "odd sizes, silu"),
        ("rms_norm.rows", "ragged rows, offset 0"),
    ],
)
def test_rows_keep_their_bits_alone(kernel: str, name: str) -> None:
    found = TRITON.kernel(kernel)
    _check_rows_alone(found, next(case for case in cases_of(contract_of(found.op)) if case.name == name))


def test_a_page_table_gets_at_most_as_many_splits_as_planned() -> None:
    for keys in (1, SPLIT, SPLIT + 1, 8192, 8193, 131072, 1_000_000):
        assert -(-keys // split_size(keys)) <= 32
        assert split_size(keys) >= SPLIT


@pytest.mark.parametrize("name", ["attention.split", "attention.tiles"])
@pytest.mark.parametrize("lengths", [(40, 17), (600, 300)])
def test_rows_that_belong_to_no_sequence_are_zero(name: str, lengths: tuple[int, ...]) -> None:
    contract = contract_of("attention")
    case = _long_attention((4, 3), lengths)
    q, k, v, starts, kv_len, table = case_inputs(contract, case, DType.F32, TRITON.device)
    assert starts is not None
    starts[2] = 5  # two rows of padding
    attrs = contract.complete_attrs(case.attrs)
    out = torch.full((7, 48), float("nan"), device=TRITON.device)
    scratch = torch.zeros(1 << 20, dtype=torch.uint8, device=TRITON.device)
    TRITON.kernel(name).bind((q, k, v, starts, kv_len, table), (out,), attrs, scratch)()
    assert out[5:].eq(0).all()
    assert out[:5].ne(0).any(-1).all()


def _product_case(op: str, rows: int, inner: int, outputs: int) -> Case:
    rng = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=rng, dtype=torch.float64)
    kinds = 2 if op == "linear_gated" else 1
    weight = torch.randn(kinds * outputs, inner, generator=rng, dtype=torch.float64) / inner**0.5
    if op == "linear_qkv":
        bias = torch.randn(outputs, generator=rng, dtype=torch.float64)
        return Case("deep", (x, weight, bias), {"q_heads": 3, "kv_heads": 1, "head_dim": outputs // 5})
    if op == "linear_gated":
        return Case("deep", (x, weight), {"activation": "silu"})
    if op == "logits":
        return Case("deep", (x, weight), {"softcap": 3.0})
    return Case("deep", (x, weight, None))


@pytest.mark.parametrize("op", ["linear", "linear_qkv", "linear_gated", "logits"])
def test_a_product_whose_k_is_cut_in_parts_is_the_product(op: str) -> None:
    assert linear.parts_of(40, 2100) == 2
    _check(TRITON.kernel(f"{op}.rows"), _product_case(op, 5, 2100, 40), DType.BF16)


def test_rows_of_a_product_in_parts_keep_their_bits_alone() -> None:
    _check_rows_alone(TRITON.kernel("linear.rows"), _product_case("linear", 20, 2100, 16), most=4)


@pytest.mark.parametrize(("op", "scheme"), [("linear_q", "int8"), ("linear_gated_q", "int4"), ("linear_q", "int4_zp")])
def test_a_quantised_product_whose_k_is_cut_in_parts_is_the_product(op: str, scheme: str) -> None:
    assert linear.parts_of(16, 2080) == 2
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(3, 2080, generator=rng, dtype=torch.float64)
    weight = quantise(torch.randn(32 if "gated" in op else 16, 2080, generator=rng) / 2080**0.5, scheme)
    attrs: dict[str, Attr] = {"bits": SCHEMES[scheme].bits}
    case = Case("deep", (x, *weight), attrs | {"activation": "silu"})
    if "gated" not in op:
        case = Case("deep", (x, *weight, None), attrs)
    trial = try_case(TRITON.kernel(f"{op}.rows"), contract_of(op), case, DType.F32, device=TRITON.device)
    assert trial.result.passed, str(trial.result)
    # Activations in f32 are not rounded, so the sum is far closer than the op's tolerance asks.
    assert trial.result.max_abs < 1e-5


def test_parts_depend_on_the_weight_alone_and_stay_long() -> None:
    assert linear.parts_of(128256, 4096) == 1
    assert linear.parts_of(4096, 14336) == 1
    for outputs in (16, 1024, 2048):
        for inner in (512, 2048, 8192, 14336):
            assert inner / linear.parts_of(outputs, inner) >= min(inner, linear.SMALLEST_PART)


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7F800000], ids=["NaN", "negative NaN", "infinity"])
@pytest.mark.parametrize("control", [(0.0, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (0.7, 0, 0.5, 0.0), (1.0, 9, 0.9, 0.1)])
def test_a_broken_row_is_still_broken_after_the_filters(bits: int, control: tuple[float, int, float, float]) -> None:
    device = TRITON.device
    logits = torch.randn(1, 200, generator=torch.Generator().manual_seed(1)).to(device)
    logits.view(torch.int32)[0, 130] = bits - 2**32 if bits >= 2**31 else bits
    controls = [torch.tensor([value]).to(device) for value in control]
    controls[1] = controls[1].int()
    scores = torch.zeros(1, 200, device=device)
    TRITON.kernel("filter_logits.rows").bind((logits, *controls), (scores,), {}, None)()
    tokens, ok = torch.zeros(1, dtype=torch.int32, device=device), torch.ones(1, dtype=torch.bool, device=device)
    scratch = torch.zeros(4096, dtype=torch.uint8, device=device)
    TRITON.kernel("greedy.pieces").bind((scores,), (tokens, ok), {}, scratch)()
    assert not ok.item()
    assert 0 <= tokens.item() < 200


def test_equal_tokens_are_kept_from_the_lowest_up() -> None:
    device = TRITON.device
    logits = torch.zeros(2, 150, device=device)
    controls = (torch.ones(2), torch.zeros(2, dtype=torch.int32), torch.tensor([0.1, 0.9]), torch.zeros(2))
    scores = torch.zeros(2, 150, device=device)
    TRITON.kernel("filter_logits.rows").bind((logits, *(c.to(device) for c in controls)), (scores,), {}, None)()
    kept = scores.isfinite()
    assert kept[0].nonzero().flatten().tolist() == list(range(15))
    assert kept[1].nonzero().flatten().tolist() == list(range(135))


def test_draws_over_many_pieces_are_those_of_the_definition() -> None:
    rng = torch.Generator().manual_seed(8)
    scores = torch.randn(3, 9000, generator=rng, dtype=torch.float64)
    keys = (torch.tensor([1, -7, 2**40]), torch.tensor([0, 5, 4095], dtype=torch.int32))
    for stream in (0, 3):
        _check(TRITON.kernel("sample.pieces"), Case("wide", (scores, *keys), {"stream": stream}), DType.F32)
    _check(TRITON.kernel("greedy.pieces"), Case("wide", (scores,)), DType.F32)


@pytest.mark.parametrize("refusing", [False, True], ids=["drafts like the target's", "one token drafted too often"])
def test_drafts_over_many_blocks_are_judged_as_defined(refusing: bool) -> None:
    rng = torch.Generator().manual_seed(2)
    starts = torch.tensor([0, 4, 5, 8], dtype=torch.int32)
    target = 3 * torch.randn(8, 130, generator=rng, dtype=torch.float64)
    target[:, 7] = target.logsumexp(-1)  # half of all draws
    draft = target.clone()
    if refusing:
        draft[:, 7] += 3
    # A sequence's last row has no draft after it: whatever stands there must not be looked at.
    draft[starts[1:].long() - 1] = torch.randn(3, 130, generator=rng, dtype=torch.float64)
    for seed in range(2):
        tokens = torch.full((8,), 7, dtype=torch.int32)
        keys = torch.arange(8) + 100 * seed, torch.arange(8, dtype=torch.int32)
        case = Case("wide", (target, draft, tokens, starts, *keys))
        _check(TRITON.kernel("accept_rejection.sequences"), case, DType.F32)


@triton.jit
def _copy_without_a_mask(source, target, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    index = tl.arange(0, BLOCK)
    tl.store(target + index, tl.load(source + index), mask=index < size)


def test_a_launch_leaves_the_environment_as_it_was() -> None:
    """A process started afterwards would inherit what was left, and refuse the backend for it."""
    before = dict(os.environ)
    target = torch.zeros(16)
    interpret(_copy_without_a_mask, (1,), {"source": torch.ones(16), "target": target, "size": 16, "BLOCK": 16})
    assert target.sum() == 16
    assert dict(os.environ) == before


def test_an_interpreted_load_beyond_a_tensor_is_an_error_though_nothing_of_it_is_stored() -> None:
    source, target = torch.arange(24.0)[:16], torch.zeros(16)
    interpret(_copy_without_a_mask, (1,), {"source": source, "target": target, "size": 16, "BLOCK": 16})
    assert target.equal(source)
    with pytest.raises(BackendError, match="a load of 32 elements"):
        interpret(_copy_without_a_mask, (1,), {"source": source, "target": target, "size": 16, "BLOCK": 32})


@triton.jit
def _write_noise(seed, position, out, first, STREAM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    numbers = uniform_noise(tl.load(seed), tl.load(position), first, STREAM, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), numbers)


@pytest.mark.parametrize(
    ("seed", "position", "stream"),
    [(0, 0, TARGET_STREAM), (2**63 - 1, 5, DRAFT_STREAM), (-7, 2**31 - 1, ACCEPT_STREAM)],
)
def test_noise_is_the_definitions_to_the_bit(seed: int, position: int, stream: int) -> None:
    keys, positions = torch.tensor([seed]), torch.tensor([position], dtype=torch.int32)
    found = torch.zeros(64)
    given = {"seed": keys, "position": positions, "out": found, "first": 64, "STREAM": stream, "BLOCK": 64}
    interpret(_write_noise, (1,), given)
    assert found.equal(definition(keys, positions, 128, stream)[0, 64:])


def _entries() -> list[object]:
    return [
        pytest.param(name, entry, id=str(entry))
        for name in (*tuning.TUNED, "attention_split", "attention_tiles")
        for entry in sorted(
            {str(e): e for g in configurations.GENERATIONS for e in configurations.entries(name, g)}.values(), key=str
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("table", "entry"), _entries())
def test_every_configuration_computes_the_op(
    table: str, entry: configurations.Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, _, kind = table.rpartition("_")
    op = op.replace("gated", "linear_gated")
    chosen = configurations.configure

    def forced(kernel: str, generation: str, **facts: int) -> configurations.Configuration:
        return entry if kernel == table else chosen(kernel, generation, **facts)

    for module in ("linear", "attention"):
        monkeypatch.setattr(f"slotwise.backends.cuda_triton.{module}.configure", forced)
    contract = contracts()[op]
    in_rows = [case for case in cases_of(contract) if case.attrs.get("layout", ROWS) == ROWS]
    for case in in_rows[:8]:
        result = run_case(TRITON.kernel(f"{op}.{kind}"), contract, case, DType.BF16, device=TRITON.device)
        assert result.passed, str(result)


def test_a_table_with_a_mistake_is_refused_with_its_place(tmp_path: Path) -> None:
    for text, words in (
        ("[add\n", "cannot be read"),
        ("[add]\nsm_70 = []\n", "add.sm_70 is no generation"),
        ("[add]\nany = [{ block = 96 }]\n", "BLOCK that is no power of two"),
        ("[add]\nany = [{ blocks = 0 }]\n", "whole numbers above 0"),
        ("[add]\nany = [{ stagse = 2 }]\n", "stagse; known are"),
        ("add = 3\n", "must be a table"),
    ):
        (tmp_path / "table.toml").write_text(text)
        with pytest.raises(BackendError, match=words):
            configurations.read_table(tmp_path / "table.toml")


def test_the_first_entry_whose_limits_hold_is_used() -> None:
    few = configurations.configure("linear_rows", "sm_90", rows=16, outputs=4096, itemsize=2)
    many = configurations.configure("linear_rows", "sm_90", rows=17, outputs=4096, itemsize=2)
    assert few.block["BLOCK_M"] == 16
    assert many.block["BLOCK_M"] == 32
    four, eight = (configurations.configure("linear_q_rows", "sm_90", rows=17, itemsize=2, bits=b) for b in (4, 8))
    assert four.block["BLOCK_N"] == 2 * eight.block["BLOCK_N"]
    with pytest.raises(BackendError, match="no table for nothing"):
        configurations.configure("nothing", "sm_90")


def test_a_candidate_keeps_its_limits_and_a_decode_tile_its_rows() -> None:
    for table in tuning.TUNED:
        for entry in configurations.entries(table, "sm_90"):
            found = list(tuning.candidates(table, entry))
            assert found
            assert entry not in found
            for candidate in found:
                assert candidate.limits == entry.limits
                assert candidate.constants.keys() == entry.constants.keys()
                if table.endswith("_rows"):
                    assert candidate.block["BLOCK_M"] == entry.block["BLOCK_M"]


def test_an_entry_is_replaced_only_by_one_that_is_faster_beyond_noise() -> None:
    entry = configurations.entries("linear_rows", "sm_90")[0]
    wanted = list(tuning.candidates("linear_rows", entry))[5]
    for seconds, expected in ((0.5, wanted), (0.98, None), (2.0, None)):
        chosen = tuning.best_of(
            "linear_rows",
            entry,
            lambda _, c, s=seconds: s if c == wanted else 1.0 if c == entry else 3.0,
            lambda _: None,
        )
        assert chosen == expected


def test_a_tuned_table_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    entries = configurations.entries("linear_rows", "sm_90")
    tuning.write_table(tmp_path / "own" / "table.toml", {"linear_rows": {"sm_90": entries}})
    assert configurations.read_table(tmp_path / "own" / "table.toml") == {"linear_rows": {"sm_90": entries}}


def test_the_users_own_entries_are_asked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    configurations._user_table.cache_clear()
    try:
        (entry, *_) = configurations.entries("add_parts", "sm_90")
        own = dataclasses.replace(entry, num_warps=8)
        tuning.write_table(configurations.user_file(), {"add_parts": {"sm_90": [own]}})
        configurations._user_table.cache_clear()
        assert configurations.configure("add_parts", "sm_90") == own
        assert configurations.configure("add_parts", "sm_80") == entry
        assert configurations.configure("add_parts", "interpreter").num_warps == 4
    finally:
        configurations._user_table.cache_clear()
