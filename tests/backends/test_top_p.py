"""Top-p at boundaries that are exact in real numbers: every backend's kernel keeps what fractions say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.backend import Backend, backend_names, load_backend
from slotwise.core.contract import Case
from slotwise.core.errors import BackendError
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.proving.validate import try_case

FILTER = contract_of("filter_logits")
VOCABULARY = 12
ASIDE = Fraction(1, 2**18)
"""What is clearly beside a boundary: four times as far as what still reaches p."""


@dataclass(frozen=True)
class Row:
    """Tokens with whole weights (0: banned), and a p at the mass of the first `reached`, or beside it.

    `aside` moves p by so many times `ASIDE`, `places` then by so many units in its last place, which decide nothing.
    """

    masses: tuple[int, ...]
    reached: int
    aside: int
    places: int
    temperature: float
    shift: float

    def order(self) -> list[int]:
        """Tokens as they stand: the likeliest first, of equals the lower."""
        return sorted(range(len(self.masses)), key=lambda token: (-self.masses[token], token))

    def p(self) -> Fraction:
        """Where the boundary is meant to be."""
        first = sum(self.masses[token] for token in self.order()[: self.reached])
        return min(max(Fraction(first, sum(self.masses)) + self.aside * ASIDE, Fraction(0)), Fraction(1))

    def kept(self) -> list[int]:
        """The tokens before which less than p stands; the likeliest at least, and nothing that is banned."""
        kept, before = [], Fraction(0)
        for token in self.order():
            mass = Fraction(self.masses[token], sum(self.masses))
            if mass > 0 and (before < self.p() or not kept):
                kept.append(token)
            before += mass
        return sorted(kept)

    def logits(self) -> list[float]:
        """Logits whose softmax, at the row's temperature, is the distribution."""
        return [self.temperature * (math.log(mass) + self.shift) if mass else -math.inf for mass in self.masses]

    def given_p(self) -> float:
        """p as a request has it, in float32."""
        p = torch.tensor(float(self.p()))
        for _ in range(abs(self.places)):
            p = p.nextafter(torch.tensor(math.copysign(math.inf, self.places)))
        return min(max(float(p), 0.0), 1.0)


@st.composite
def _rows(draw: st.DrawFn) -> Row:
    masses = draw(st.lists(st.integers(0, 20), min_size=VOCABULARY, max_size=VOCABULARY).filter(any))
    return Row(
        tuple(masses),
        draw(st.integers(0, VOCABULARY)),
        draw(st.sampled_from([0, 0, -1, 1])),
        draw(st.sampled_from([0, -1, 1])),
        draw(st.sampled_from([1.0, 0.7, 1.3])),
        draw(st.sampled_from([0.0, -4.0, 4.0])),
    )


def _case(rows: Sequence[Row]) -> Case:
    count = len(rows)
    temperature = torch.tensor([row.temperature for row in rows])
    controls = (torch.zeros(count, dtype=torch.int32), torch.tensor([row.given_p() for row in rows]))
    return Case("exact", (torch.tensor([r.logits() for r in rows]), temperature, *controls, torch.zeros(count)))


def _backend(name: str) -> Backend:
    try:
        backend = load_backend(name)
    except BackendError as error:
        pytest.skip(str(error))
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("name", backend_names())
def test_every_backend_keeps_what_fractions_say_at_and_beside_exact_boundaries(name: str) -> None:
    backend = _backend(name)
    simulated = name in ("cuda_triton", "numba_cuda") and backend.device == "cpu"

    @settings(max_examples=12 if simulated else 100)
    @given(rows=st.lists(_rows(), min_size=1, max_size=6))
    def agrees(rows: list[Row]) -> None:
        for kernel in backend.kernels_for("filter_logits"):
            trial = try_case(kernel, FILTER, _case(rows), DType.F32, device=backend.device)
            assert trial.result.passed, str(trial.result)
            for row, scores in zip(rows, trial.outputs["scores"], strict=True):
                assert scores.isfinite().nonzero().flatten().tolist() == row.kept()

    agrees()


@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000 - 2**32, 0x7F800000], ids=["NaN", "negative NaN", "infinity"])
@pytest.mark.parametrize("name", backend_names())
def test_a_broken_row_is_still_broken_after_top_p(name: str, bits: int) -> None:
    backend = _backend(name)
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    logits.view(torch.int32)[0, 23] = bits
    controls = (torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.tensor([0.5]), torch.zeros(1))
    for kernel in backend.kernels_for("filter_logits"):
        trial = try_case(kernel, FILTER, Case("broken", (logits, *controls)), DType.F32, device=backend.device)
        assert not trial.outputs["scores"].max().isfinite()
