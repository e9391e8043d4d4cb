"""Rows whose width no pack of eight divides: read and written element by element, none of them the next row's."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from slotwise.core.backend import load_backend
from slotwise.core.contract import Case
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.proving.validate import run_case

NUMBA = load_backend("numba_cuda")
ROWS, WIDTH = 3, 21
NORM: Mapping[str, Attr] = {"eps": 1e-6, "weight_offset": 1.0}


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _caches(width: int) -> tuple[torch.Tensor, ...]:
    slots = torch.tensor([4, 0, 9], dtype=torch.int32)
    return (_draw(ROWS, 2, width), _draw(ROWS, 2, width), _draw(12, 2, width), _draw(12, 2, width), slots)


CASES: tuple[tuple[str, tuple[torch.Tensor | None, ...], Mapping[str, Attr]], ...] = (
    ("embedding.rows", (torch.tensor([5, 0, 2], dtype=torch.int32), _draw(7, WIDTH)), {"scale": 6.25}),
    ("take_rows.rows", (_draw(6, WIDTH), torch.tensor([5, 1], dtype=torch.int32)), {}),
    ("add.flat", (_draw(ROWS, WIDTH), _draw(ROWS, WIDTH)), {}),
    ("rms_norm.rows", (_draw(ROWS, WIDTH), _draw(WIDTH)), NORM),
    ("rms_norm.rows", (_draw(ROWS, 2053), _draw(2053)), NORM),
    ("add_rms_norm.rows", (_draw(ROWS, WIDTH), _draw(ROWS, WIDTH), _draw(WIDTH)), NORM),
    ("head_rms_norm.rows", (_draw(ROWS, 2, WIDTH), _draw(WIDTH)), NORM),
    ("gated_activation.flat", (_draw(ROWS, WIDTH), _draw(ROWS, WIDTH)), {"activation": "silu"}),
    ("write_slots.rows", _caches(11), {"layer": 0}),
)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize(("kernel", "inputs", "attrs"), CASES, ids=[f"{k}-{i[0].shape[-1]}" for k, i, _ in CASES])  # type: ignore[union-attr]
def test_rows_of_an_odd_width_keep_to_themselves(
    kernel: str, inputs: tuple[torch.Tensor | None, ...], attrs: Mapping[str, Attr], dtype: DType
) -> None:
    found = NUMBA.kernel(kernel)
    result = run_case(found, contract_of(found.op), Case("odd width", inputs, attrs), dtype, device=NUMBA.device)
    assert result.passed, str(result)
