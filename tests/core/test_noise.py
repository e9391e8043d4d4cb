"""Noise has the published bits, is exact in float32, and depends on its four keys alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.ops.noise import ACCEPT_STREAM, DRAFT_STREAM, RESIDUAL_STREAM, TARGET_STREAM, philox, uniform_noise

ONES = 0xFFFFFFFF


def _word(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_random123s_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    c0, c1, c2, c3 = (_word(word) for word in counter)
    words = philox((c0, c1, c2, c3), (_word(key[0]), _word(key[1])))
    assert tuple(int(word) for word in words) == expected


def _plain(seed: int, position: int, token: int, stream: int) -> float:
    """The definition in Python's integers."""
    c, k = [token // 4, position & ONES, stream, 0], [seed & ONES, (seed >> 32) & ONES]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & ONES, (p0 >> 32) ^ c[3] ^ k[1], p0 & ONES]
        k = [(k[0] + 0x9E3779B9) & ONES, (k[1] + 0xBB67AE85) & ONES]
    return (2 * (c[token % 4] >> 9) + 1) / 2**24


@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 2**31 - 1),
    token=st.integers(0, 70),
    stream=st.sampled_from([TARGET_STREAM, DRAFT_STREAM, ACCEPT_STREAM, RESIDUAL_STREAM]),
)
def test_noise_is_the_definition_exactly(seed: int, position: int, token: int, stream: int) -> None:
    noise = uniform_noise(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32), token + 1, stream)
    assert float(noise[0, token]) == _plain(seed, position, token, stream)


@given(seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), count=st.integers(1, 40))
def test_noise_depends_on_no_other_row_and_on_no_other_token(seeds: list[int], count: int) -> None:
    positions = torch.arange(len(seeds), dtype=torch.int32)
    together = uniform_noise(torch.tensor(seeds), positions, count, TARGET_STREAM)
    for i, seed in enumerate(seeds):
        alone = uniform_noise(torch.tensor([seed]), positions[i : i + 1], count + 3, TARGET_STREAM)
        assert torch.equal(alone[0, :count], together[i])


def test_the_extreme_numbers_are_inside_the_open_interval_with_finite_gumbels() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    numbers = ((words >> 9).float() + 0.5) * 2.0**-23
    assert numbers.double().tolist() == [2**-24, 2**-24, 0.5 + 2**-24, 1 - 2**-24]
    gumbels = -torch.log(-torch.log(numbers))
    assert bool(gumbels.isfinite().all())


def test_noise_is_uniform_and_streams_seeds_and_positions_differ() -> None:
    count, buckets = 200_000, 64
    draws = []
    for seed, position, stream in (
        (1, 5, TARGET_STREAM),
        (1, 5, DRAFT_STREAM),
        (1, 6, TARGET_STREAM),
        (2, 5, TARGET_STREAM),
        (1 + 2**32, 5, TARGET_STREAM),
    ):
        noise = uniform_noise(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32), count, stream)[0]
        assert noise.dtype == torch.float32
        seen = torch.histc(noise, buckets, 0, 1).double()
        chi_square = float(((seen - count / buckets) ** 2 / (count / buckets)).sum())
        assert chi_square < 120  # 63 degrees of freedom: P < 2e-5, and the seeds are fixed
        draws.append(noise)
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 5 / count**0.5
