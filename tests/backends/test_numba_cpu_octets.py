"""Products of octets on processors with wider vectors and bf16 products, as far as one without them can tell.

Wide vectors are LLVM's, so any processor runs them, in halves; the instruction for pairs of bf16 has a stand-in of
plain arithmetic, and the instruction itself is looked for in code compiled for a processor that has it.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slotwise.core.backend import load_backend
from slotwise.core.layouts import WEIGHT_WORD, to_octets
from slotwise.core.ops import contract_of
from slotwise.proving.validate import call_of

BACKEND = load_backend("numba_cpu")
if BACKEND.unavailable() is not None:
    pytest.skip(str(BACKEND.unavailable()), allow_module_level=True)

from slotwise.backends.numba_cpu import octets  # noqa: E402
from slotwise.backends.numba_cpu.vectors import BF16  # noqa: E402

ROWS = (1, 2, 3, 5, 6, 8, 49)
SIZES = ((56, 34), (104, 546))
"""Weights and width: odd numbers of octets for tiles of two and four, and more elements than a block's depth."""


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x weight^T` by the kernel of `linear`, with the weight in octets, on two threads."""
    kernel = BACKEND.kernel("linear")
    inputs, out = (x, to_octets(weight, WEIGHT_WORD), None), torch.empty(len(x), len(weight), dtype=x.dtype)
    call = call_of(contract_of("linear"), inputs, {"layout": "octets"})
    workspace = torch.empty(kernel.workspace(call), dtype=torch.uint8)
    launch = kernel.bind(inputs, (out,), call.attrs, workspace)
    assert BACKEND.chain is not None
    BACKEND.chain([launch], 2)()
    return out


def operands(rows: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return tuple(torch.randn(n, size[1], generator=generator).to(dtype) for n in (rows, size[0]))  # type: ignore[return-value]


def use(monkeypatch: pytest.MonkeyPatch, *, wide: int, paired: bool = False) -> None:
    """Multiply as a processor with or without these would."""
    made = functools.partial(octets.products_function.__wrapped__, wide=wide)
    monkeypatch.setattr(octets, "products_function", functools.cache(made))
    monkeypatch.setattr(octets, "product_kind", lambda kind: octets.EMULATED if paired and kind == BF16 else kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_vectors_of_two_octets_change_no_bit(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    cases = [operands(rows, size, dtype) for rows in ROWS for size in SIZES]
    with monkeypatch.context() as patch:
        use(patch, wide=0)
        narrow = [product(*case) for case in cases]
    use(monkeypatch, wide=1)
    for case, expected in zip(cases, narrow, strict=True):
        assert product(*case).equal(expected), f"{[tuple(each.shape) for each in case]}"


@pytest.mark.parametrize("wide", [0, 1])
def test_products_by_pairs_are_right_and_rows_keep_their_bits(monkeypatch: pytest.MonkeyPatch, wide: int) -> None:
    use(monkeypatch, wide=wide, paired=True)
    for size in SIZES:
        x, weight = operands(49, size, torch.bfloat16)
        together = product(x, weight)
        exact = x.double() @ weight.double().T
        # A product rounded once to bf16's eight bits, from a float32 sum.
        assert (together.double() - exact).abs().le(exact.abs() * 2**-8 + 1e-4 * size[1] ** 0.5).all()
        for first, last in ((0, 1), (7, 9), (3, 8), (40, 49)):
            assert product(x[first:last], weight).equal(together[first:last]), f"rows {first} to {last}"


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="another processor's instruction")
def test_a_processor_with_products_of_bf16_pairs_gets_them_on_its_widest_vectors(tmp_path: Path) -> None:
    script = """
from slotwise.backends.numba_cpu import compiled, octets
from slotwise.backends.numba_cpu.vectors import BF16
octets.products_function(BF16, octets.PAIRED, 1)
print(compiled._alive[-1]._library.get_asm_str())
"""
    features = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512bf16"
    environment = {
        **os.environ,
        "SLOTWISE_CACHE": str(tmp_path),
        "NUMBA_CPU_NAME": "znver4",
        "NUMBA_CPU_FEATURES": ",".join(f"+{name}" for name in features.split()),
    }
    made = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert made.returncode == 0, made.stderr[-2000:]
    products = re.findall(r"vdpbf16ps\s.*", made.stdout)
    assert sum("zmm" in each for each in products) >= 12, "tiles of four octets and 1 to 6 rows, two vectors each"
    assert sum("ymm" in each for each in products) >= 6, "single octets"
    assert not re.search(r"vfmadd", made.stdout), "what is multiplied in pairs needs no other product"
