"""What `numba_cpu` promises beyond its kernels' cases: threads, chains, faults, noise, and its arithmetic."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.backend import Kernel, load_backend
from slotwise.core.contract import Case
from slotwise.core.errors import BackendError
from slotwise.core.ops import contract_of, contracts
from slotwise.core.ops.noise import uniform_noise
from slotwise.core.specs import DType
from slotwise.proving.validate import call_of, case_inputs, cases_of

BACKEND = load_backend("numba_cpu")
if BACKEND.unavailable() is not None:
    pytest.skip(str(BACKEND.unavailable()), allow_module_level=True)

from numba import int64, njit, types  # noqa: E402

from slotwise.backends.numba_cpu import memory, noise, threads  # noqa: E402
from slotwise.backends.numba_cpu.attention_runs import RUN  # noqa: E402
from slotwise.backends.numba_cpu.calls import Call, Chain, Part  # noqa: E402
from slotwise.backends.numba_cpu.vectors import BF16  # noqa: E402

DECODE_KERNELS = [kernel for kernel in BACKEND.kernels if kernel.invariant_rows is None]


def results(kernel: Kernel, case: Case, dtype: DType, workers: int, times: int = 1) -> list[torch.Tensor]:
    """What a kernel makes of a case on that many threads: its outputs, and the inputs that it may write."""
    contract = contract_of(kernel.op)
    inputs = case_inputs(contract, case, dtype)
    call = call_of(contract, inputs, case.attrs)
    outputs = tuple(torch.empty(spec.sizes(), dtype=spec.dtype.torch) for spec in call.outputs)
    workspace = torch.empty(kernel.workspace(call), dtype=torch.uint8)
    launch = kernel.bind(inputs, outputs, call.attrs, workspace)
    assert BACKEND.chain is not None
    chained = BACKEND.chain([launch] * times, workers)
    chained()
    written = [v for a, v in zip(contract.inputs, inputs, strict=True) if a.cache == "writes" and v is not None]
    return [*outputs, *written]


@pytest.mark.parametrize("kernel", BACKEND.kernels, ids=lambda kernel: str(kernel.name))
def test_the_number_of_threads_changes_no_bit(kernel: Kernel) -> None:
    for case in cases_of(contracts()[kernel.op])[:6]:
        alone = results(kernel, case, DType.BF16, 1)
        for found, expected in zip(results(kernel, case, DType.BF16, 3), alone, strict=True):
            assert found.equal(expected) or bool(found.isnan().any()), f"{kernel.name} {case.name}"


def test_a_chain_runs_its_calls_in_order_again_and_again() -> None:
    add = BACKEND.kernel("add")
    a, b, c = torch.ones(3, 40), torch.ones(3, 40), torch.empty(3, 40)
    first, second = add.bind((a, b), (c,), {}, None), add.bind((c, b), (a,), {}, None)
    chain = Chain([first, second], 2)  # type: ignore[list-item]
    for turn in range(1, 200):
        chain()
        assert a[0, 0] == 1 + 2 * turn
        assert a.eq(a[0, 0]).all()


def test_runs_from_several_python_threads_take_turns() -> None:
    add = BACKEND.kernel("add")

    def work(found: list[torch.Tensor], number: int) -> None:
        a, b, c = (torch.full((64, 256), float(number)) for _ in range(3))
        chain = Chain([add.bind((a, b), (c,), {}, None)], 2)  # type: ignore[list-item]
        for _ in range(200):
            chain()
        found.append(c)

    found: list[torch.Tensor] = []
    workers = [threading.Thread(target=work, args=(found, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sorted(float(c[0, 0]) for c in found) == [0, 2, 4, 6]
    assert all(c.eq(c[0, 0]).all() for c in found)


def _in_child(chain: Callable[[], None], c: torch.Tensor, queue: Any) -> None:
    c.zero_()
    chain()
    queue.put(float(c.sum()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_gets_threads_of_its_own() -> None:
    a, c = torch.ones(8, 16), torch.empty(8, 16)
    chain = Chain([BACKEND.kernel("add").bind((a, a), (c,), {}, None)], 2)  # type: ignore[list-item]
    chain()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(chain, c, queue))
    child.start()
    assert queue.get(timeout=60) == 2 * 8 * 16
    child.join(60)
    assert child.exitcode == 0
    chain()
    assert c.eq(2).all()


def faults() -> Sequence[Any]:
    table, x = torch.randn(7, 8), torch.randn(2, 8)
    q, k = torch.randn(1, 2, 8), torch.randn(1, 1, 8)
    cos, position = torch.ones(4, 4), torch.tensor([0], dtype=torch.int32)
    cache = torch.zeros(6, 1, 8)
    starts, page = torch.tensor([0, 1], dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)

    def of(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    attention = {"page_size": 3, "window": 0, "scale": 1.0, "softcap": 0.0}
    return (
        pytest.param("embedding", (of(0, 7), table), (x.clone(),), {"scale": 1.0}, "table of 7 rows", id="token id"),
        pytest.param("embedding", (of(-1, 0), table), (x.clone(),), {"scale": 1.0}, "table of 7 rows", id="below 0"),
        pytest.param("take_rows", (x, of(2)), (x[:1].clone(),), {}, "table of 2 rows", id="row"),
        pytest.param("rotary", (q, k, of(4), cos, cos), (q.clone(), k.clone()), {}, "rotary table of 4", id="position"),
        pytest.param(
            "rotary_write",
            (q, k, k, position, cos, cos, cache, cache, of(6)),
            (q.clone(),),
            {},
            "cache of 6",
            id="slot",
        ),
        pytest.param("write_slots", (k, k, cache, cache, of(-1)), (), {}, "cache of 6", id="negative slot"),
        pytest.param(
            "attention", (q, cache, cache, starts, of(7), page), (x[:1].clone(),), attention, "2 pages", id="length"
        ),
    )


@pytest.mark.parametrize(("op", "inputs", "outputs", "attrs", "message"), faults())
def test_an_index_out_of_range_is_an_error_that_names_the_op_and_touches_nothing(
    op: str, inputs: Any, outputs: Any, attrs: Any, message: str
) -> None:
    kernel = BACKEND.kernels_for(op)[0]
    before = [value.clone() for value in inputs]
    workspace = torch.empty(2**24, dtype=torch.uint8)
    launch = kernel.bind(inputs, outputs, attrs, workspace)
    for _ in range(2):  # the second time shows that the first left no mark
        with pytest.raises(BackendError, match=f"op {op}: .*{message}"):
            launch()
    assert all(value.equal(old) for value, old in zip(inputs, before, strict=True))


@njit((int64, int64, int64))  # type: ignore[untyped-decorator, unused-ignore]
def _round(source: int, target: int, count: int) -> None:
    x, y = memory.floats(source, count), memory.elements(BF16, target, count)
    for i in range(count):
        y[i] = memory.narrow(BF16, x[i])


def evaluate(function: Any, values: np.ndarray) -> np.ndarray:
    """A float32 function of `memory.py` over an array."""

    def over(source: int, target: int, count: int) -> None:
        x, y = memory.floats(source, count), memory.floats(target, count)
        for i in range(count):
            y[i] = function(x[i])

    values = np.ascontiguousarray(values, np.float32)
    out = np.empty_like(values)
    njit((int64, int64, int64))(over)(values.ctypes.data, out.ctypes.data, len(values))
    return out


def test_exp_is_right_to_two_units_in_the_last_place_and_keeps_nan() -> None:
    x = np.concatenate([np.linspace(-86.9, 87.9, 200_001), [0.0, -0.0]]).astype(np.float32)
    want = np.exp(x.astype(np.float64))
    assert (np.abs(evaluate(memory.exp, x) - want) / np.spacing(want.astype(np.float32))).max() <= 2
    special = evaluate(memory.exp, np.array([-200.0, -np.inf, np.nan, 100.0]))
    assert special[0] == special[1] == 0
    assert np.isnan(special[2])
    assert special[3] > 1e38


def test_tanh_is_right_to_a_millionth_and_has_its_limits() -> None:
    x = np.linspace(-100, 100, 200_001).astype(np.float32)
    found = evaluate(memory.tanh, x)
    assert np.abs(found - np.tanh(x.astype(np.float64))).max() < 1e-6
    assert (found[0], found[-1]) == (-1, 1)


@given(st.lists(st.floats(width=32), min_size=1, max_size=64))
def test_bf16_is_rounded_as_pytorch_rounds(values: list[float]) -> None:
    x = np.array(values, np.float32)
    found = np.empty(len(x), np.uint16)
    _round(x.ctypes.data, found.ctypes.data, len(x))
    want = torch.from_numpy(x).bfloat16()
    got = torch.from_numpy(found).view(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~got.isnan()], want[~want.isnan()])


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31 - 1), st.integers(0, 3), st.integers(1, 70))
def test_the_noise_has_the_bits_of_its_definition(seed: int, position: int, stream: int, count: int) -> None:
    found = np.empty(-(-count // 4) * 4, np.float32)
    for block in range(len(found) // 4):
        noise.noise_block(seed, position, block, stream, found[4 * block : 4 * block + 4])
    want = uniform_noise(torch.tensor([seed]), torch.tensor([position], dtype=torch.int32), count, stream)
    assert np.array_equal(found[:count], want[0].numpy())


@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.floats(0.1, 30))
def test_noise_left_out_for_hopeless_tokens_changes_no_token(seed: int, size: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(3, size, generator=generator) * spread).contiguous()
    scores[1, ::2] = -float("inf")
    keys = torch.randint(-(2**62), 2**62, (3,), generator=generator)
    positions = torch.randint(0, 999, (3,), generator=generator).int()
    tokens, ok = torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.bool)
    BACKEND.kernel("sample").bind((scores, keys, positions), (tokens, ok), {"stream": 0}, None)()
    gumbel = -torch.log(-torch.log(uniform_noise(keys, positions, size, 0).double()))
    total = scores.double() + gumbel
    chosen = total.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    assert ok.all()
    assert (total.max(1).values - chosen).max() < 1e-4  # the winner, or its equal in float32


@pytest.mark.parametrize("length", [1, RUN - 1, RUN, RUN + 1, 3 * RUN + 5])
def test_attention_handed_out_by_runs_has_the_bits_of_attention_in_one_piece(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    kernel, page_size = BACKEND.kernel("attention"), 16
    columns = -(-length // page_size)
    k, v = (torch.randn((columns + 1) * page_size, 2, 32, generator=generator).bfloat16() for _ in range(2))
    table = (torch.randperm(columns, generator=generator) + 1).int().unsqueeze(0)
    attrs = {"layer": 0, "page_size": page_size, "scale": 0.2, "window": 0, "softcap": 0.0}

    def attend(rows: int) -> torch.Tensor:
        q = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16().repeat(rows, 1, 1)
        starts = torch.arange(rows + 1, dtype=torch.int32)
        lengths = torch.full((rows,), length, dtype=torch.int32)
        inputs = (q, k, v, starts, lengths, table.repeat(rows, 1).contiguous())
        out = torch.empty(rows, 192, dtype=torch.bfloat16)
        call = call_of(contract_of("attention"), inputs, attrs)
        workspace = torch.empty(kernel.workspace(call), dtype=torch.uint8)
        launch = kernel.bind(inputs, (out,), attrs, workspace)
        assert len(launch.parts) == (2 if rows == 1 else 1)  # type: ignore[attr-defined]
        launch()
        return out

    assert attend(1)[0].equal(attend(40)[17])


def test_integer_products_are_the_same_by_every_instruction() -> None:
    """The portable form is what other processors run; here both run on the same codes, a group's eight words each."""
    from llvmlite import ir

    from slotwise.backends.numba_cpu.machine import HAS_AVX2
    from slotwise.backends.numba_cpu.octets_q import Products
    from slotwise.backends.numba_cpu.vectors import intrinsic, load, store

    codes = ir.VectorType(ir.IntType(8), 32)

    def product(signed: bool, portable: bool) -> Any:
        @intrinsic
        def multiply(typing: Any, a: Any, b: Any, out: Any) -> Any:
            def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                products = Products(builder, narrow=not signed, avx2=HAS_AVX2 and not portable, vnni=False)
                total = products.zero()
                for word in range(8):
                    left, right = (load(builder, codes, address, 32 * word) for address in arguments[:2])
                    total = (products.add_signed if signed else products.add)(total, left, right)
                store(builder, products.whole(total), arguments[2])
                return context.get_dummy_value()

            return types.void(int64, int64, int64), generate

        return njit((int64, int64, int64))(lambda a, b, out: multiply(a, b, out))

    generator = np.random.default_rng(0)
    for signed, low, high in ((True, -127, 127), (False, 0, 15)):
        forms = [product(signed, portable) for portable in (False, True)]
        for turn in range(50):
            a = generator.integers(low, high + 1, (8, 32)).astype(np.int8)
            b = generator.integers(-127, 128, (8, 32)).astype(np.int8)
            if turn == 0:
                a[:], b[:] = high, 127
            if turn == 1:
                a[:], b[:] = low, -127
            want = (a.astype(np.int32) * b.astype(np.int32)).reshape(8, 8, 4).sum((0, 2))
            for form in forms:
                out = np.zeros(8, np.int32)
                form(a.ctypes.data, b.ctypes.data, out.ctypes.data)
                assert np.array_equal(out, want), f"signed {signed}, {'portable' if form is forms[1] else 'native'}"


def test_a_record_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BackendError, match="do not fit a record"):
        Chain([Call(Part("add", 1, (0,) * threads.FIELDS))], 1)


def test_float64_is_refused_with_the_reason() -> None:
    x = torch.randn(2, 8, dtype=torch.float64)
    call = call_of(contract_of("add"), (x, x), {})
    assert "would lose digits" in str(BACKEND.kernel("add").refuses(call))
