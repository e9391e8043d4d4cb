"""What ops mean, by definitions that others wrote: PyTorch's attention, transformers' layers, chance."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers.activations import ACT2FN
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, eager_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from slotwise.core.contract import Case
from slotwise.core.ops import contract_of
from slotwise.core.ops.attention import attend, attention
from slotwise.core.ops.embedding import embedding
from slotwise.core.ops.linear import activate, linear_gated, linear_qkv, logits
from slotwise.core.ops.noise import DRAFT_STREAM, TARGET_STREAM
from slotwise.core.ops.norm import add_rms_norm, head_rms_norm, rms_norm
from slotwise.core.ops.rotary import rotary
from slotwise.core.ops.sampling import (
    accept_coupled,
    accept_rejection,
    filter_logits,
    greedy,
    sample,
)
from slotwise.proving.validate import cases_of

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Attention


def _visible(kv_len: int, rows: int, window: int) -> torch.Tensor:
    """Row j of the last `rows` sees key i: written out one by one."""
    return torch.tensor(
        [
            [i <= kv_len - rows + j and (window == 0 or i > kv_len - rows + j - window) for i in range(kv_len)]
            for j in range(rows)
        ]
    )


def _one_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, case: Case) -> torch.Tensor:
    """q [n, Hq, D] over k and v [kv_len, Hkv, D] by PyTorch, or by transformers where scores are capped."""
    scale, window, softcap = (float(case.attrs[name]) for name in ("scale", "window", "softcap"))
    visible = _visible(len(k), len(q), int(window))
    group = q.shape[1] // k.shape[1]
    heads = [tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v)]
    if softcap == 0:
        repeated = (heads[0], *(tensor.repeat_interleave(group, 1) for tensor in heads[1:]))
        out = F.scaled_dot_product_attention(*repeated, attn_mask=visible, scale=scale)[0].transpose(0, 1)
    else:
        module = SimpleNamespace(num_key_value_groups=group, training=False, head_dim=q.shape[2])
        mask = torch.zeros(visible.shape, dtype=q.dtype).masked_fill(~visible, -INF)
        out = eager_attention_forward(module, *heads, mask, scaling=scale, softcap=softcap)[0][0]
    return out.flatten(1)


def _close(case: Case) -> float:
    """transformers takes the softmax of capped scores in float32, PyTorch takes the others' in float64."""
    return 1e-6 if float(case.attrs["softcap"]) else 1e-12


@pytest.mark.parametrize("case", cases_of(contract_of("attention")), ids=lambda case: case.name)
def test_attention_is_masked_attention_over_the_gathered_pages(case: Case) -> None:
    q, k_cache, v_cache, starts, kv_len, table = (tensor for tensor in case.inputs if tensor is not None)
    got = attention(q, k_cache, v_cache, starts, kv_len, table, **case.attrs)  # type: ignore[arg-type]
    size = int(case.attrs["page_size"])
    for b, length in enumerate(kv_len.tolist()):
        first, last = int(starts[b]), int(starts[b + 1])
        if first == last:
            continue
        slots = [int(table[b, i // size]) * size + i % size for i in range(length)]
        want = _one_sequence(q[first:last], k_cache[slots], v_cache[slots], case)
        torch.testing.assert_close(got[first:last], want, rtol=0, atol=_close(case))


@pytest.mark.parametrize("case", cases_of(contract_of("attend")), ids=lambda case: case.name)
def test_attend_is_causal_attention_of_a_whole_sequence(case: Case) -> None:
    q, k, v = (tensor for tensor in case.inputs if tensor is not None)
    got = attend(q, k, v, **case.attrs)  # type: ignore[arg-type]
    torch.testing.assert_close(got, _one_sequence(q, k, v, case), rtol=0, atol=_close(case))


# Norms, rotary embedding, products


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_llamas_and_with_an_offset_gemmas(dtype: torch.dtype) -> None:
    x, weight = (_randn(5, 40) * 3).to(dtype), _randn(40, seed=1).to(dtype)
    for offset, layer in ((0.0, LlamaRMSNorm(40, 1e-5)), (1.0, Gemma2RMSNorm(40, 1e-5))):
        layer = layer.to(dtype)
        layer.weight.data.copy_(weight)
        with torch.no_grad():
            want = layer(x)
        assert torch.equal(rms_norm(x, weight, eps=1e-5, weight_offset=offset), want)
        residual = _randn(5, 40, seed=2).to(dtype)
        total, normed = add_rms_norm(x, residual, weight, eps=1e-5, weight_offset=offset)
        with torch.no_grad():
            assert torch.equal(normed, layer(x + residual))
            heads = x.view(5, 1, 40).repeat(1, 3, 1)
            assert torch.equal(head_rms_norm(heads, weight, eps=1e-5, weight_offset=offset), layer(heads))
        assert torch.equal(total, x + residual)


def test_rotary_is_transformers_rotation_by_the_position() -> None:
    q, k, positions = _randn(6, 4, 24), _randn(6, 2, 24, seed=1), _ints(0, 7, 3, 3, 88, 1)
    angle = torch.outer(torch.arange(90.0), 100.0 ** -(torch.arange(12.0) / 12))
    got = rotary(q, k, positions, angle.cos(), angle.sin())
    both = torch.cat((angle, angle), -1)[positions.long()].unsqueeze(0)
    want = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], both.cos(), both.sin())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs[0].transpose(0, 1))


def test_rotary_leaves_what_lies_beyond_the_tables_alone() -> None:
    q = _randn(3, 2, 40)
    angle = torch.outer(torch.arange(9.0), torch.ones(8))
    turned, _ = rotary(q, q, _ints(0, 4, 8), angle.cos(), angle.sin())
    assert torch.equal(turned[..., 16:], q[..., 16:])
    assert not torch.equal(turned[1, :, :16], q[1, :, :16])
    torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))


def test_activations_are_those_that_checkpoints_name() -> None:
    x = _randn(100) * 3
    for ours, theirs in (("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu", "gelu")):
        torch.testing.assert_close(activate(x, ours), ACT2FN[theirs](x), rtol=0, atol=0)


def test_joined_weights_come_apart_in_the_order_they_are_named() -> None:
    x = _randn(3, 24).double()
    q, k, v, gate, up = (_randn(n, 24, seed=n).double() for n in (48, 12, 13, 31, 32))
    v, up = v[:12], up[:31]
    parts = linear_qkv(x, torch.cat((q, k, v)), None, q_heads=4, kv_heads=1, head_dim=12)
    for part, weight in zip(parts, (q, k, v), strict=True):
        torch.testing.assert_close(part.flatten(1), x @ weight.T)
    joined = linear_gated(x, torch.cat((gate, up)), activation="silu")
    torch.testing.assert_close(joined, F.silu(x @ gate.T) * (x @ up.T))


def test_logits_are_float32_and_capped() -> None:
    x, weight = _randn(2, 24).bfloat16(), _randn(50, 24, seed=1).bfloat16()
    plain, capped = logits(x, weight, softcap=0.0), logits(x, weight, softcap=5.0)
    assert plain.dtype == capped.dtype == torch.float32
    assert float(plain.abs().max()) > 5 > float(capped.abs().max())
    torch.testing.assert_close(capped, 5 * torch.tanh(plain / 5))


def test_an_embedding_is_scaled_by_the_scale_rounded_to_its_dtype() -> None:
    table, scale = _randn(9, 24).bfloat16(), 24**0.5
    rounded = torch.tensor(scale).bfloat16()
    assert torch.equal(embedding(_ints(3, 8), table, scale=scale), table[[3, 8]] * rounded)


# Sampling: filters


def _filtered(scores: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    controls = (torch.tensor([temperature]), _ints(top_k), torch.tensor([top_p]), torch.tensor([min_p]))
    return filter_logits(scores.unsqueeze(0), *controls)[0]


@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 0.7, 1.0, 1.9]),
    top_k=st.sampled_from([0, 1, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.83, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.2, 0.9]),
)
def test_filters_are_transformers_warpers_in_their_order(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    start = _randn(64, seed=seed).double() * 3
    want = TemperatureLogitsWarper(temperature)(None, start.unsqueeze(0))
    if top_k:
        want = TopKLogitsWarper(top_k)(None, want)
    if top_p < 1:
        want = TopPLogitsWarper(top_p)(None, want)
    if min_p:
        want = MinPLogitsWarper(min_p)(None, want)
    got = _filtered(start, temperature, top_k, top_p, min_p)
    assert torch.equal(got.isinf(), want[0].isinf())
    torch.testing.assert_close(got, want[0], rtol=1e-6, atol=1e-6)


def test_temperature_zero_leaves_the_first_of_the_greatest() -> None:
    got = _filtered(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0.0, 0, 1.0, 0.0)
    assert got.tolist() == [-INF, 0.0, -INF, -INF]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_with_a_nan_stays_broken_through_the_filters(temperature: float) -> None:
    row = torch.tensor([1.0, float("nan"), 3.0])
    _, ok = sample(
        _filtered(row, temperature, 0, 1.0, 0.0).unsqueeze(0), torch.tensor([1]), _ints(0), stream=TARGET_STREAM
    )
    assert not bool(ok[0])


def test_tokens_that_equal_the_kth_greatest_stay() -> None:
    kept = _filtered(torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0]), 1.0, 2, 1.0, 0.0).isfinite()
    assert kept.tolist() == [True, True, True, True, False]


# Sampling: chance


def _chi_square(tokens: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * len(tokens)
    seen = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    return float(((seen - expected) ** 2 / expected).sum())


LIMIT = {3: 21.1, 4: 23.5, 6: 27.9}
"""Chi-square exceeded with probability 1e-4, by degrees of freedom; seeds are fixed, so a pass stays a pass."""


@pytest.mark.parametrize("stream", [TARGET_STREAM, DRAFT_STREAM])
def test_samples_have_the_distribution_of_their_scores(stream: int) -> None:
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -2.0, 1.5])
    rows = 20_000
    tokens, ok = sample(scores.repeat(rows, 1), torch.arange(rows), _ints(17).repeat(rows), stream=stream)
    assert bool(ok.all())
    assert _chi_square(tokens, scores.double().softmax(-1)) < LIMIT[6]


def test_a_token_without_probability_is_never_sampled() -> None:
    scores = _filtered(_randn(50) * 2, 1.0, 3, 1.0, 0.0)
    tokens, _ = sample(scores.repeat(2000, 1), torch.arange(2000), _ints(4).repeat(2000), stream=TARGET_STREAM)
    assert set(tokens.tolist()) == set(scores.isfinite().nonzero().flatten().tolist())


def test_a_row_without_a_finite_greatest_score_is_not_ok() -> None:
    rows = torch.tensor([[0.0, 1.0], [0.0, float("nan")], [0.0, INF], [-INF, -INF], [-INF, 0.0]])
    _, ok = sample(rows, torch.arange(5), _ints(0).repeat(5), stream=TARGET_STREAM)
    assert ok.tolist() == greedy(rows)[1].tolist() == [True, False, False, False, True]
    assert greedy(rows)[0][[0, 4]].tolist() == [1, 1]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=0, max_size=5), st.integers(0, 99)), min_size=1, max_size=4)
)
def test_coupled_acceptance_counts_the_common_prefix(sequences: list[tuple[list[int], int]]) -> None:
    starts, fed, drawn, want = [0], [], [], []
    for drafts, seed in sequences:
        rng = torch.Generator().manual_seed(seed)
        samples = torch.randint(0, 3, (len(drafts) + 1,), generator=rng).tolist()
        fed += [99, *drafts]
        drawn += samples
        starts.append(len(fed))
        count = 0
        while count < len(drafts) and drafts[count] == samples[count]:
            count += 1
        want.append(count)
    assert accept_coupled(_ints(*drawn), _ints(*fed), _ints(*starts)).tolist() == want


def _speculate(
    target: Sequence[torch.Tensor], draft: torch.Tensor, sequences: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One draft for each of many sequences: (drafted, accepted, following), each [sequences]."""
    seed = torch.arange(sequences)
    positions = _ints(30).repeat(sequences)
    drafted, _ = sample(draft.repeat(sequences, 1), seed, positions, stream=DRAFT_STREAM)
    fed = torch.stack((torch.zeros_like(drafted), drafted), 1).flatten()
    scores = torch.stack(tuple(target)).repeat(sequences, 1)
    drafter = torch.stack((draft, torch.zeros_like(draft))).repeat(sequences, 1)
    starts = torch.arange(0, 2 * sequences + 1, 2, dtype=torch.int32)
    rows = (seed.repeat_interleave(2), torch.stack((positions, positions + 1), 1).flatten())
    accepted, following, ok = accept_rejection(scores, drafter, fed, starts, *rows)
    assert bool(ok.all())
    return drafted, accepted, following


def test_rejection_keeps_the_targets_distribution_at_both_positions() -> None:
    target = (torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2]), torch.tensor([-0.5, 1.0, 0.3, 0.0, 0.1]))
    draft = torch.tensor([-1.0, 0.5, 1.0, 0.0, 0.4])
    drafted, accepted, following = _speculate(target, draft, 2000)
    first = torch.where(accepted == 1, drafted, following)
    assert _chi_square(first, target[0].double().softmax(-1)) < LIMIT[4]
    assert _chi_square(following[accepted == 1], target[1].double().softmax(-1)) < LIMIT[4]
    p, q = target[0].double().softmax(-1), draft.double().softmax(-1)
    rate = float(torch.minimum(p, q).sum())
    assert abs(float(accepted.double().mean()) - rate) < 4 * (rate * (1 - rate) / 2000) ** 0.5
    # The drafter alone has another distribution, so the test above can tell them apart.
    assert _chi_square(drafted, p) > 10 * LIMIT[4]


def test_what_replaces_a_refused_draft_owes_nothing_to_the_number_that_refused_it() -> None:
    p, q = torch.tensor([0.1, 0.6, 0.1, 0.1, 0.1]), torch.tensor([1e-6, 1.0, 1e-6, 1e-6, 1e-6])
    drafted, accepted, following = _speculate((p.log(), p.log()), q.log(), 2000)
    assert set(drafted.tolist()) == {1}
    refused = following[accepted == 0]
    assert not bool((refused == 1).any())
    assert _chi_square(refused - (refused > 1).int(), torch.full((4,), 0.25).double()) < LIMIT[3]


def test_rejection_accepts_everything_from_a_drafter_that_is_the_target() -> None:
    scores = torch.tensor([1.0, 0.0, -1.0, 0.5, 0.2])
    _, accepted, _ = _speculate((scores, scores), scores, 200)
    assert accepted.tolist() == [1] * 200


def test_rejection_never_keeps_what_the_target_cannot_say() -> None:
    target = torch.tensor([0.3, -INF, 0.1, -INF, 0.0])
    draft = torch.tensor([-INF, 1.0, -INF, 0.5, -INF])
    _, accepted, following = _speculate((target, target), draft, 200)
    assert accepted.tolist() == [0] * 200
    assert set(following.tolist()) <= {0, 2, 4}


def test_rejection_names_the_sequence_with_a_broken_row() -> None:
    scores = torch.zeros(4, 5)
    scores[3, 2] = float("nan")
    keys = (torch.arange(4), _ints(0, 1, 2, 3))
    ok = accept_rejection(scores, torch.zeros(4, 5), _ints(0, 1, 2, 3), _ints(0, 2, 4), *keys)[2]
    assert ok.tolist() == [True, False]


def test_a_row_that_cannot_be_drawn_from_ends_a_run_of_rejection_and_what_stood_before_it_stands() -> None:
    scores = torch.zeros(4, 5)
    drafts = torch.tensor([9, 1, 2, 3], dtype=torch.int32)
    for broken in range(4):
        target, draft = scores.clone(), scores.clone()
        # The drafter proposes what the target is sure of, so every draft before the broken row is accepted.
        for row in range(3):
            target[row], draft[row] = -INF, -INF
            target[row, int(drafts[row + 1])] = draft[row, int(drafts[row + 1])] = 0
        target[broken, 0] = float("nan")
        keys = torch.zeros(4, dtype=torch.int64), torch.arange(4, dtype=torch.int32)
        accepted, _, ok = accept_rejection(target, draft, drafts, torch.tensor([0, 4], dtype=torch.int32), *keys)
        assert (accepted.tolist(), ok.tolist()) == ([broken], [False])
