"""Quantising a weight: how far elements may move, what never moves, and which weights are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core import quantise as quantising
from slotwise.core.errors import CheckpointError, OptionError
from slotwise.core.quantise import GROUP, SCHEMES, dequantise, pack, quantise, unpack

Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


@st.composite
def weights(draw: st.DrawFn, least: int = -16, greatest: int = 14) -> torch.Tensor:
    """Up to 5 rows of up to 4 groups, each group of its own kind and size (2**least to 2**greatest)."""
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    parts = []
    for _ in range(rows * groups):
        values = torch.randn(GROUP, generator=generator)
        kind = draw(st.sampled_from(["normal", "positive", "negative", "one outlier", "constant", "zero", "sparse"]))
        if kind in ("positive", "negative"):
            values = values.abs() * (1 if kind == "positive" else -1)
        elif kind == "one outlier":
            values[draw(st.integers(0, GROUP - 1))] *= 100
        elif kind == "constant":
            values = torch.full((GROUP,), draw(st.floats(-3, 3, width=32)))
        elif kind == "zero":
            values = torch.zeros(GROUP)
        elif kind == "sparse":
            values[torch.rand(GROUP, generator=generator) < 0.9] = 0
        top = values.abs().max()
        size = 2.0 ** draw(st.floats(least, greatest))
        parts.append(values / top * size if top > 0 else values)
    return torch.stack(parts).view(rows, groups * GROUP)


def restored(made: Made, scheme: str) -> torch.Tensor:
    return dequantise(*made, bits=SCHEMES[scheme].bits, dtype=torch.float64)


def by_group(weight: torch.Tensor) -> torch.Tensor:
    return weight.double().view(len(weight), -1, GROUP)


@pytest.mark.parametrize("scheme", ["int8", "int4_zp"])
@given(weight=weights(least=-40))
def test_no_element_is_off_by_more_than_half_a_step(scheme: str, weight: torch.Tensor) -> None:
    made = quantise(weight, scheme)
    step = made[1].double()[..., None]
    off = (by_group(restored(made, scheme)) - by_group(weight)).abs()
    # Beside half a step: the rounding of float32 in which codes are computed.
    assert (off <= step / 2 + by_group(weight).abs().amax(-1, keepdim=True) * 2**-22).all()


@given(weight=weights(least=-5))
def test_int4_has_no_greater_squared_error_than_the_nearest_of_15_even_codes(weight: torch.Tensor) -> None:
    off = (by_group(restored(quantise(weight, "int4"), "int4")) - by_group(weight)).square().sum(-1)
    groups = by_group(weight)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp(min=1e-30)
    plain = ((groups / scale).round() * scale - groups).square().sum(-1)
    # Its scale is rounded to float16, which moves 8 codes by 2**-11 of their size at most.
    slack = groups.square().sum(-1) * 2**-16
    assert (off <= plain * 1.05 + slack).all()


@given(weight=weights(least=-40))
def test_int4_never_clips_by_more_than_two_steps(weight: torch.Tensor) -> None:
    made = quantise(weight, "int4")
    off = (by_group(restored(made, "int4")) - by_group(weight)).abs()
    assert (off <= made[1].double().abs()[..., None] * 2 + 2.0**-24).all()


@pytest.mark.parametrize("scheme", list(SCHEMES))
@given(weight=weights())
def test_groups_of_zeros_stay_zeros_and_so_does_each_zero_where_codes_are_symmetric(
    scheme: str, weight: torch.Tensor
) -> None:
    groups, found = by_group(weight), by_group(restored(quantise(weight, scheme), scheme))
    empty = (groups == 0).all(-1)
    assert (found[empty] == 0).all()
    if scheme != "int4_zp":
        assert (found[groups == 0] == 0).all()


@given(weight=weights(least=-5))
def test_under_int8_what_was_quantised_once_is_quantised_without_loss(weight: torch.Tensor) -> None:
    # Above 2**-5: a scale that is no normal float16 is rounded by more than a code can absorb.
    once = restored(quantise(weight, "int8"), "int8")
    assert torch.equal(restored(quantise(once, "int8"), "int8"), once)


@given(weight=weights(least=-5))
def test_under_int4_what_was_quantised_once_moves_by_no_more_than_a_scale_is_rounded(weight: torch.Tensor) -> None:
    # Sparse groups have several exact solutions (7 times one scale, 8 times another), each rounded its own way.
    once = restored(quantise(weight, "int4"), "int4")
    off = by_group(restored(quantise(once, "int4"), "int4") - once).abs()
    assert (off <= by_group(once).abs().amax(-1, keepdim=True) * 2**-10).all()


@given(weight=weights(least=-5))
def test_with_an_offset_what_was_quantised_once_moves_by_half_a_step_at_most(weight: torch.Tensor) -> None:
    once = restored(quantise(weight, "int4_zp"), "int4_zp")
    again = quantise(once, "int4_zp")
    off = by_group(restored(again, "int4_zp") - once).abs()
    assert (off <= again[1].double()[..., None] * 0.501).all()


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_taken_and_gives_what_float32_gives(scheme: str, dtype: torch.dtype) -> None:
    weight = torch.randn(9, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    for one, other in zip(quantise(weight, scheme), quantise(weight.float(), scheme), strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_rows_are_worked_on_some_at_a_time_and_none_depends_on_where_the_cuts_are(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(23, 64, generator=torch.Generator().manual_seed(2))
    whole = quantise(weight, scheme)
    sizes: list[int] = []
    solve = quantising._solve

    def counted(groups: torch.Tensor, scheme: str, name: str) -> Made:
        sizes.append(groups.numel())
        return solve(groups, scheme, name)

    monkeypatch.setattr(quantising, "_solve", counted)
    monkeypatch.setattr(quantising, "_CHUNK", 300)
    cut = quantise(weight, scheme)
    assert sizes == [4 * 64] * 5 + [3 * 64]
    for one, other in zip(whole, cut, strict=True):
        assert one is other is None or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_shapes_and_dtypes_are_those_that_the_scheme_says(scheme: str, rows: int) -> None:
    made = [value for value in quantise(torch.ones(rows, 96), scheme) if value is not None]
    specs = list(SCHEMES[scheme].specs(rows, 96).values())
    assert [(value.dtype, tuple(value.shape)) for value in made] == [(s.dtype.torch, s.sizes()) for s in specs]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_packed_codes_are_unpacked_again(rows: int, groups: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, groups * GROUP), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.shape == (rows, groups * GROUP // 2)
    assert torch.equal(unpack(packed).long(), codes)
    for element in (0, 15, 16, 31):
        byte = int(packed[0, element % 16])
        assert (byte >> 4 if element >= 16 else byte & 15) == int(codes[0, element])


def test_quality_on_gaussian_groups_orders_the_schemes() -> None:
    weight = torch.randn(500, 256, generator=torch.Generator().manual_seed(3))
    lost = {
        scheme: float((restored(quantise(weight, scheme), scheme) - weight).square().sum() / weight.square().sum())
        for scheme in SCHEMES
    }
    assert lost["int8"] < 3e-5
    assert lost["int4_zp"] < lost["int4"] < 6.7e-3  # -8 for the greatest alone would lose 7.4e-3


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_a_value_that_is_not_finite_is_refused_with_the_weights_name(scheme: str, value: float) -> None:
    weight = torch.zeros(3, 32, dtype=torch.float64)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match=f"layers.0.down holds a value that is not a finite.*{scheme}"):
        quantise(weight, scheme, name="layers.0.down")


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 65504 * 127.0), ("int4", 65504 * 7.0), ("int4_zp", 65504.0)])
def test_a_scale_or_offset_beyond_float16_is_refused_with_the_weights_name(scheme: str, limit: float) -> None:
    weight = torch.zeros(3, 64)
    weight[1, 40] = -limit
    assert restored(quantise(weight, scheme), scheme).isfinite().all()
    weight[1, 40] *= 1.5
    with pytest.raises(CheckpointError, match=r"head is too large for .*beyond float16"):
        quantise(weight, scheme, name="head")


def test_rows_that_are_no_whole_number_of_groups_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"down is \[3, 48\].*48 is no multiple of 32.*weights='native'"):
        quantise(torch.zeros(3, 48), "int8", name="down")


def test_an_unknown_scheme_suggests_the_nearest() -> None:
    with pytest.raises(OptionError, match=r"scheme 'int5' is not known \(did you mean 'int"):
        quantise(torch.zeros(1, 32), "int5")
