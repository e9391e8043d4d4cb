"""Intrinsics: their simulated sides are what NVIDIA's PTX manual says, their compiled sides are those instructions."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch

from slotwise.backends.numba_cuda import assembly, elements, tensor_cores
from slotwise.backends.numba_cuda.simulator import cuda, kernel

RNG = np.random.default_rng(5)


def _halves(values: Any, kind: torch.dtype) -> Any:
    """16-bit patterns of float32 values, by PyTorch's rounding."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(kind).view(torch.uint16).numpy()


def _floats(bits: Any, kind: torch.dtype) -> Any:
    return torch.from_numpy(np.ascontiguousarray(bits)).view(kind).float().numpy()


@kernel
def _multiply_bf16(a, b, c, out):  # type: ignore[no-untyped-def]
    lane = cuda.threadIdx.x
    d = tensor_cores.mma_bf16(
        a[lane, 0], a[lane, 1], a[lane, 2], a[lane, 3], b[lane, 0], b[lane, 1],
        c[lane, 0], c[lane, 1], c[lane, 2], c[lane, 3],
    )  # fmt: skip
    for i in range(4):
        out[lane, i] = d[i]


@kernel
def _multiply_f16(a, b, c, out):  # type: ignore[no-untyped-def]
    lane = cuda.threadIdx.x
    d = tensor_cores.mma_f16(
        a[lane, 0], a[lane, 1], a[lane, 2], a[lane, 3], b[lane, 0], b[lane, 1],
        c[lane, 0], c[lane, 1], c[lane, 2], c[lane, 3],
    )  # fmt: skip
    for i in range(4):
        out[lane, i] = d[i]


@pytest.mark.parametrize(
    ("run", "kind"), [(_multiply_bf16, torch.bfloat16), (_multiply_f16, torch.float16)], ids=["bf16", "f16"]
)
def test_mma_multiplies_matrices_held_in_the_layout_of_the_manual(run: Any, kind: torch.dtype) -> None:
    """PTX ISA, "Matrix fragments for mma.m16n8k16 with floating-point type": each row and column written out here.

    With groupID = lane >> 2 and threadID_in_group = lane % 4, element i of a fragment is at
    A: row = groupID for i in 0, 1, 4, 5, else groupID + 8; column = threadID_in_group * 2 + (i & 1), + 8 from i = 4;
    B: row = threadID_in_group * 2 + (i & 1), + 8 from i = 2; column = groupID;
    C: row = groupID for i in 0, 1, else groupID + 8; column = threadID_in_group * 2 + (i & 1).
    """
    a, b, c = (RNG.standard_normal(shape, np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
    a_bits, b_bits = _halves(a, kind), _halves(b, kind)
    fragments_a, fragments_b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    fragments_c = np.zeros((32, 4), np.float32)
    places_c = np.zeros((32, 4, 2), np.int64)
    for lane in range(32):
        group, member = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            fragments_a[lane, i] = a_bits[row, member * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            fragments_b[lane, i] = b_bits[member * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            places_c[lane, i] = group if i in (0, 1) else group + 8, member * 2 + (i & 1)
            fragments_c[lane, i] = c[tuple(places_c[lane, i])]
    out = np.zeros((32, 4), np.float32)
    run.simulate(1, 32, (fragments_a.view(np.uint32), fragments_b.view(np.uint32), fragments_c, out))
    product = c + _floats(a_bits, kind).astype(np.float64) @ _floats(b_bits, kind)
    for lane, i in itertools.product(range(32), range(4)):
        assert abs(out[lane, i] - product[tuple(places_c[lane, i])]) < 1e-5


@kernel
def _load_both(source, plain, turned):  # type: ignore[no-untyped-def]
    lane = cuda.threadIdx.x
    held = cuda.shared.array(256, np.uint16, alignment=16)
    for i in range(8):
        held[lane * 8 + i] = source[lane * 8 + i]
    cuda.syncthreads()
    # Rows are given in another order than they lie in, so that an address that is not looked at would show.
    row = lane ^ 5
    found = tensor_cores.load_matrices(held, row * 8)
    other = tensor_cores.load_matrices_transposed(held, row * 8)
    for i in range(4):
        plain[lane, i] = found[i]
        turned[lane, i] = other[i]


def test_ldmatrix_hands_out_matrices_in_the_layout_of_the_manual() -> None:
    """PTX ISA, "ldmatrix": thread 8 m + r gives the address of row r of matrix m; thread l then holds, of each matrix,
    elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, or with .trans, of column l / 4."""
    source = np.arange(256, dtype=np.uint16)
    plain, turned = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    _load_both.simulate(1, 32, (source, plain, turned))
    for lane, matrix in itertools.product(range(32), range(4)):
        rows = [source[((8 * matrix + r) ^ 5) * 8 :][:8] for r in range(8)]
        for half in range(2):
            element = 2 * (lane % 4) + half
            assert (plain[lane, matrix] >> (16 * half)) & 0xFFFF == rows[lane // 4][element]
            assert (turned[lane, matrix] >> (16 * half)) & 0xFFFF == rows[element][lane // 4]


@kernel
def _copy(source, out):  # type: ignore[no-untyped-def]
    lane = cuda.threadIdx.x
    held = cuda.shared.array(256, np.uint16, alignment=16)
    tensor_cores.copy_16(held, lane * 8, source, lane * 8, lane % 3 != 0)
    tensor_cores.commit_copies()
    tensor_cores.all_copies_done()
    cuda.syncthreads()
    for i in range(8):
        out[lane * 8 + i] = held[lane * 8 + i]


def test_a_copy_that_is_not_live_leaves_zeros() -> None:
    source = np.arange(1, 257, dtype=np.uint16)
    out = np.full(256, 9, np.uint16)
    _copy.simulate(1, 32, (source, out))
    assert np.array_equal(out.reshape(32, 8), source.reshape(32, 8) * (np.arange(32) % 3 != 0)[:, None])


_VALUES = np.array(
    [
        0.0,
        -0.0,
        1.0,
        -2.5,
        1 / 3,
        65504.0,
        65520.0,
        3.4e38,
        1e-7,
        6e-8,
        5.9e-8,
        np.inf,
        -np.inf,
        1.00390625,
        1.01171875,
    ],
    np.float32,
)


@pytest.mark.parametrize(
    ("narrow", "widen", "kind"),
    [
        (elements.bf16_bits, elements.of_bf16, torch.bfloat16),
        (elements.f16_bits, elements.of_f16, torch.float16),
    ],
    ids=["bf16", "f16"],
)
def test_conversions_round_to_nearest_even(narrow: Any, widen: Any, kind: torch.dtype) -> None:
    values = np.concatenate(
        (_VALUES, RNG.standard_normal(4000, np.float32), RNG.standard_normal(400, np.float32) * 1e-6)
    )
    assert np.array_equal(narrow(values), _halves(values, kind))
    assert np.isnan(widen(narrow(np.array([np.nan], np.float32)))).all()
    every = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(widen(every), _floats(every, kind), equal_nan=True)


@kernel
def _codes(words, signed, low, high):
    i = cuda.threadIdx.x
    signed[4 * i], signed[4 * i + 1], signed[4 * i + 2], signed[4 * i + 3] = elements.signed_codes(words[i])
    low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3] = elements.low_codes(words[i])
    high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3] = elements.high_codes(words[i])


def test_codes_are_the_bytes_of_a_word_and_their_halves() -> None:
    every = np.arange(256, dtype=np.uint8)
    signed, low, high = (np.zeros(256, np.float32) for _ in range(3))
    _codes.simulate(1, 64, (every.view(np.uint32), signed, low, high))
    assert np.array_equal(signed, every.view(np.int8).astype(np.float32))
    assert np.array_equal(low + 16 * high, every.astype(np.float32))


@pytest.mark.parametrize(
    ("name", "prepare", "zero"),
    [
        ("signed_codes", lambda word: word ^ 0x80808080, 128),
        ("low_codes", lambda word: word & 0x0F0F0F0F, 0),
        ("high_codes", lambda word: word >> 4 & 0x0F0F0F0F, 0),
    ],
)
def test_codes_become_floats_by_the_instructions_that_the_ptx_has(name: str, prepare: Any, zero: int) -> None:
    """The selectors and the number taken away, read off the PTX and applied as its manual says."""
    pytest.importorskip("numba_cuda", reason="needs Numba-CUDA: pip install 'numba-cuda[cu13]'")
    from numba import cuda as numba_cuda
    from numba.cuda import types

    scope: dict[str, Any] = {"call": getattr(assembly, name)()}
    exec("def run(w, o):\n    o[0], o[1], o[2], o[3] = call(w[0])", scope)
    arrays = types.Array(types.uint32, 1, "C"), types.Array(types.float32, 1, "C")
    ptx, _ = numba_cuda.compile_ptx(scope["run"], arrays, cc=(8, 0))
    selectors = re.findall(r"prmt\.b32 %r\d+, %r\d+, 0x4B000000, 0x(\w+);", ptx)
    (less,) = set(re.findall(r"(?:add|sub)(?:\.rn)?\.f32 .*0f(\w{8});", ptx))
    taken = abs(float(np.array(int(less, 16), np.uint32).view(np.float32)))
    meaning = getattr(elements, name).simulated
    for word in (0x00010203, 0xFF807F3A, 0x89ABCDEF):
        source = (prepare(word) | 0x4B000000 << 32).to_bytes(8, "little")
        chosen = [bytes(source[int(digit, 16)] for digit in reversed(selector)) for selector in selectors]
        found = [float(np.frombuffer(four, np.float32)[0]) - taken for four in chosen]
        assert found == [float(part) for part in meaning(None, np.uint32(word))]
        assert taken == 2**23 + zero


INSTRUCTIONS = {
    "mma_bf16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma_f16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "load_matrices": "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    "load_matrices_transposed": "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
    "copy_16": "cp.async.cg.shared.global",
    "commit_copies": "cp.async.commit_group",
    "copies_done": "cp.async.wait_group 1",
    "all_copies_done": "cp.async.wait_all",
    "pack_bf16": "cvt.rn.bf16x2.f32",
    "pack_f16": "cvt.rn.f16x2.f32",
    "load_words": "ld.global.v4.u32",
    "load_8_bf16": "ld.global.v4.u32",
    "load_8_f16": "ld.global.v4.u32",
    "load_8_f32": "ld.global.v4.u32",
    "store_8_bf16": "st.global.v4.u32",
    "store_8_f16": "st.global.v4.u32",
    "store_8_f32": "st.global.v4.u32",
    "round_bf16": "cvt.rn.bf16.f32",
    "round_f16": "cvt.rn.f16.f32",
    "widen_f16": "cvt.f32.f16",
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_intrinsic_compiles_to_its_instruction(name: str) -> None:
    pytest.importorskip("numba_cuda", reason="needs Numba-CUDA: pip install 'numba-cuda[cu13]'")
    from numba import cuda as numba_cuda
    from numba.cuda import types

    call = getattr(assembly, name)()
    halves, floats = types.Array(types.uint16, 1, "C"), types.Array(types.float32, 1, "C")
    f, w = np.float32(1), np.uint32(1)
    source = {
        "mma": "o[0] = call(w, w, w, w, w, w, f, f, f, f)[0]",
        "load_matrices": "o[0] = call(h, 0)[0]",
        "load_8_f32": "o[0] = call(o, 0)[0]",
        "load": "o[0] = call(h, 0)[0]",
        "copy": "call(h, 0, h, 8, o[0] > f)",
        "commit": "call()",
        "copies": "call()",
        "all": "call()",
        "pack": "o[0] = call(o[1], o[2])",
        "store_8_f32": "call(o, 0, f, f, f, f, f, f, f, f)",
        "store": "call(h, 0, f, f, f, f, f, f, f, f)",
        "round": "h[0] = call(o[0])",
        "widen": "o[0] = call(h[0])",
    }
    body = source.get(name) or source.get(name.rpartition("_")[0]) or source[name.partition("_")[0]]
    scope: dict[str, Any] = {"call": call, "f": f, "w": w}
    exec(f"def run(h, o):\n    {body}", scope)
    ptx, _ = numba_cuda.compile_ptx(scope["run"], (halves, floats), cc=(8, 0))
    assert INSTRUCTIONS[name] in ptx
