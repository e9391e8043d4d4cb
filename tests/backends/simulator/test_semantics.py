"""What simulated kernels compute: what each thread by itself would, in Numba's types."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import itertools
import linecache
import math
import operator
import random
import types
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba.core.registry import cpu_target

from slotwise.backends.numba_cuda.simulator import Kernel, cuda, device, kernel, simulate
from slotwise.backends.numba_cuda.simulator import values as arithmetic

BLOCKS, THREADS = 3, 7


def _thread_by_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Runs a kernel that shares nothing between threads as plain Python, one thread after another."""
    for block, thread in itertools.product(range(BLOCKS), range(THREADS)):
        here = types.SimpleNamespace(
            threadIdx=types.SimpleNamespace(x=thread), blockIdx=types.SimpleNamespace(x=block),
            blockDim=types.SimpleNamespace(x=THREADS), grid=lambda axes, i=block * THREADS + thread: i,
        )  # fmt: skip
        scope = dict(function.__globals__, cuda=here)
        types.FunctionType(function.__code__, scope, function.__name__, None, function.__closure__)(*arguments)


class _Writer:
    """Writes random kernels: assignments, branches, loops, early ends, in every nesting."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._counters = 0

    def kernel(self) -> str:
        body = self._block(1, 3, False)
        head = ["def made(x, out):", "    i = cuda.grid(1)", "    a = i % 5", "    b = x[i]", "    c = 3", "    d = 0"]
        ending = ["    out[i] += (a + 7 * b + 49 * c + 343 * d) % 10007"]
        return "\n".join([*head, *body, *ending]) + "\n"

    def _block(self, depth: int, size: int, in_loop: bool) -> list[str]:
        return [line for _ in range(self._random.randint(1, size)) for line in self._statement(depth, in_loop)]

    def _statement(self, depth: int, in_loop: bool) -> list[str]:
        pad = "    " * depth
        kinds = ["assign", "augment", "tuple", "store"] + (["if", "if", "while", "for"] if depth < 4 else [])
        kinds += ["break", "continue"] if in_loop else []
        kinds += ["return"] if depth > 1 else []
        kind = self._random.choice(kinds)
        if kind == "assign":
            return [f"{pad}{self._name()} = ({self._number()}) % 101"]
        if kind == "augment":
            return [f"{pad}{self._name()} {self._random.choice(['+=', '-='])} ({self._number()}) % 7"]
        if kind == "tuple":
            first, second = self._random.sample("abcd", 2)
            return [f"{pad}{first}, {second} = {second}, ({self._number()}) % 101"]
        if kind == "store":
            return [f"{pad}out[i] += {self._name()}"]
        if kind == "if":
            lines = [f"{pad}if {self._truth()}:", *self._block(depth + 1, 2, in_loop)]
            if self._random.random() < 0.5:
                lines += [f"{pad}else:", *self._block(depth + 1, 2, in_loop)]
            return lines
        if kind == "while":
            self._counters += 1
            k = f"k{self._counters}"
            body = self._block(depth + 1, 2, True)
            return [f"{pad}{k} = 0", f"{pad}while {self._truth()} and {k} < 5:", f"{pad}    {k} += 1", *body]
        if kind == "for":
            bounds = self._random.choice(["3", "a % 4", "1, 6, 2", "b % 5, -1, -1", "i, i + c % 3"])
            target = self._random.choice("abcdj")
            return [f"{pad}for {target} in range({bounds}):", *self._block(depth + 1, 2, True)]
        if kind == "return":
            return [f"{pad}out[i] += 1", f"{pad}return"]
        return [f"{pad}{kind}"]

    def _name(self) -> str:
        return self._random.choice("abcd")

    def _number(self, depth: int = 0) -> str:
        kind = self._random.choice(["name", "name", "constant", "sum", "load", "choice"]) if depth < 2 else "name"
        if kind == "sum":
            return f"{self._number(depth + 1)} {self._random.choice('+-*')} {self._number(depth + 1)}"
        if kind == "load":
            return f"x[({self._number(depth + 1)}) % 21]"
        if kind == "choice":
            return f"({self._number(depth + 1)} if {self._truth(depth + 1)} else {self._number(depth + 1)})"
        return self._name() if kind == "name" else str(self._random.randint(0, 9))

    def _truth(self, depth: int = 0) -> str:
        if depth < 2 and self._random.random() < 0.3:
            word = self._random.choice(["and", "or"])
            return f"({self._truth(depth + 1)} {word} {self._truth(depth + 1)})"
        left, right = self._number(depth + 1), self._number(depth + 1)
        return f"({left} {self._random.choice(['<', '>=', '==', '!='])} {right})"


def _function(source: str, number: int) -> Callable[..., Any]:
    file = f"<made {number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"cuda": cuda, "__name__": __name__}
    exec(compile(source, file, "exec"), scope)
    made: Callable[..., Any] = scope["made"]
    return made


def _compare(seed: int) -> None:
    source = _Writer(seed).kernel()
    function = _function(source, seed)
    x = np.random.default_rng(seed).integers(0, 50, BLOCKS * THREADS)
    expected, found = np.zeros((2, BLOCKS * THREADS), np.int64)
    _thread_by_thread(function, (x, expected))
    Kernel(function).simulate(BLOCKS, THREADS, (x, found))
    assert np.array_equal(found, expected), source


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_random_kernel_computes_what_each_thread_by_itself_would(seed: int) -> None:
    _compare(seed)


@pytest.mark.slow
def test_a_thousand_random_kernels_compute_what_each_thread_by_itself_would() -> None:
    for seed in range(1000):
        _compare(seed)


NUMBERS = [
    np.bool_(True), np.int8(-7), np.uint8(200), np.int16(-300), np.uint16(60000), np.int32(-5), np.uint32(2**32 - 3),
    np.int64(-(2**40)), np.uint64(2**63 + 5), np.float32(1.1), np.float64(2.3),
]  # fmt: skip


def _numba_type(operate: Callable[..., Any], *operands: Any) -> np.dtype[Any]:
    """The type that Numba infers, without compiling anything."""
    context = cpu_target.typing_context
    context.refresh()
    found = context.resolve_function_type(operate, tuple(map(numba.typeof, operands)), {})
    return np.dtype(str(found.return_type).replace("boolean", "bool"))


@pytest.mark.parametrize(
    ("ours", "operate"),
    [
        (arithmetic.add, operator.add), (arithmetic.subtract, operator.sub), (arithmetic.multiply, operator.mul),
        (arithmetic.divide, operator.truediv), (arithmetic.bit_and, operator.and_), (arithmetic.bit_or, operator.or_),
        (arithmetic.bit_xor, operator.xor), (arithmetic.shift_left, operator.lshift), (arithmetic.maximum, max),
    ],
)  # fmt: skip
def test_a_result_has_the_type_that_numba_infers(ours: Any, operate: Callable[..., Any]) -> None:
    of_bits = operate in (operator.and_, operator.or_, operator.xor, operator.lshift)
    for a, b in itertools.product(NUMBERS, NUMBERS):
        if (of_bits and "f" in a.dtype.kind + b.dtype.kind) or (operate is max and "b" in a.dtype.kind + b.dtype.kind):
            continue
        with np.errstate(all="ignore"):
            found = ours(a, b)
        assert found.dtype == _numba_type(operate, a, b), (a.dtype, b.dtype)


def test_the_values_that_kernels_lean_on_are_numbas() -> None:
    @numba.njit
    def theirs(f, w, h, s):
        return f * f, f * 0.1, f * 2, w + w, w - s, h << 16, (h << 16) ^ w, w // 7, s // 2, s % 3, -s, ~w

    a = arithmetic
    numbers = np.float32(0.1), np.uint32(2**32 - 1), np.uint16(0x8001), np.int32(-5)
    f, w, h, s = numbers
    tenth, two, three, seven, sixteen = map(a.typed, (0.1, 2, 3, 7, 16))
    with np.errstate(all="ignore"):
        ours = (
            a.multiply(f, f), a.multiply(f, tenth), a.multiply(f, two), a.add(w, w), a.subtract(w, s),
            a.shift_left(h, sixteen), a.bit_xor(a.shift_left(h, sixteen), w), a.floor_divide(w, seven),
            a.floor_divide(s, two), a.remainder(s, three), a.negative(s), a.invert(w),
        )  # fmt: skip
    assert [float(value) for value in ours] == [float(value) for value in theirs(*numbers)]


@kernel
def literals(x, out):
    i = cuda.threadIdx.x
    out[i] = x[i] * 0.1
    acc = np.float32(0)
    for _ in range(3):
        acc += x[i]
    out[i + 4] = acc


def test_a_literal_is_a_float64_and_float32_stays_float32() -> None:
    x, out = np.array([1.1, 2.7, 3.3, 16777216.5], np.float32), np.zeros(8)
    literals.simulate(1, 4, (x, out))
    assert out[:4].tolist() == (x.astype(np.float64) * 0.1).tolist()
    assert out[4:].tolist() == ((x + x) + x).astype(np.float64).tolist()


@kernel
def reductions(x, out):
    i = cuda.threadIdx.x
    v = x[cuda.blockIdx.x, i]
    for k in (16, 8, 4, 2, 1):
        v += cuda.shfl_xor_sync(0xFFFFFFFF, v, k)
    up = cuda.shfl_up_sync(0xFFFFFFFF, i, 3)
    down = cuda.shfl_down_sync(0xFFFFFFFF, i, 3)
    turned = cuda.shfl_sync(0xFFFFFFFF, i, (i + 5) % 32)
    row = cuda.blockIdx.x
    out[row, 0, i] = v
    out[row, 1, i] = up
    out[row, 2, i] = down
    out[row, 3, i] = turned
    out[row, 4, i] = cuda.popc(cuda.ballot_sync(0xFFFFFFFF, i % 3 == 0))
    out[row, 5, i] = cuda.any_sync(0xFFFFFFFF, i == 40) + 2 * cuda.all_sync(0xFFFFFFFF, i >= 32)
    out[row, 6, i] = cuda.syncthreads_count(i % 4 == 0)


def test_warp_operations() -> None:
    x = np.random.default_rng(0).integers(0, 100, (5, 64))
    out = np.zeros((5, 7, 64), np.int64)
    reductions.simulate(5, 64, (x, out))
    lane, warp = np.arange(64) % 32, np.arange(64) // 32
    assert np.array_equal(out[:, 0], x.reshape(5, 2, 32).sum(2).repeat(32, 1))
    assert np.array_equal(out[0, 1], np.where(lane >= 3, np.arange(64) - 3, np.arange(64)))
    assert np.array_equal(out[0, 2], np.where(lane < 29, np.arange(64) + 3, np.arange(64)))
    assert np.array_equal(out[0, 3], warp * 32 + (lane + 5) % 32)
    assert np.array_equal(out[0, 4], np.where(warp == 0, 11, 11))
    assert np.array_equal(out[0, 5], np.where(warp == 1, 3, 0))
    assert (out[:, 6] == 16).all()


@kernel
def a_part_of_a_warp(out):
    i = cuda.threadIdx.x
    if i % 2 == 0:
        out[i] = cuda.shfl_xor_sync(0x55555555, i, 2)
    elif i >= 40:
        return
    else:
        cuda.syncwarp(0xAAAAAAAA if i < 32 else 0xAA)
        out[i] = cuda.ballot_sync(0xAAAAAAAA if i < 32 else 0xAA, i % 4 == 1)


def test_the_lanes_that_a_mask_names_are_enough() -> None:
    out = np.zeros(64, np.int64)
    a_part_of_a_warp.simulate(1, 64, (out,))
    even = np.arange(0, 64, 2)
    assert np.array_equal(out[even], even ^ 2)
    assert out[1] == 0x22222222
    assert out[33] == 0x22
    assert not out[41::2].any()


@kernel
def atomics(counts, most, old):
    i = cuda.grid(1)
    old[i] = cuda.atomic.add(counts, i % 3, 2)
    cuda.atomic.max(most, 0, np.float32(i % 11))
    cuda.atomic.cas(counts, 3, 0, i + 1)


def test_atomic_operations_give_the_old_values() -> None:
    counts, most, old = np.zeros(4, np.int32), np.zeros(1, np.float32), np.zeros(64, np.int64)
    atomics.simulate(2, 32, (counts, most, old))
    assert counts.tolist() == [44, 42, 42, 1]
    assert most[0] == 10
    assert sorted(old[::3]) == list(range(0, 44, 2))


@kernel
def three_axes(out):
    x, y, z = cuda.grid(3)
    out[z, y, x] = cuda.threadIdx.x + 10 * cuda.threadIdx.y + 100 * cuda.threadIdx.z + 1000 * cuda.blockIdx.y


def test_three_axes_of_threads_and_blocks() -> None:
    out = np.zeros((2, 6, 8), np.int64)
    three_axes.simulate((2, 2, 1), (4, 3, 2), (out,))
    z, y, x = np.indices(out.shape)
    assert np.array_equal(out, x % 4 + 10 * (y % 3) + 100 * z + 1000 * (y // 3))


@kernel
def dynamic(x, out, n):
    floats = cuda.shared.array(0, np.float32)
    halves = cuda.shared.array(0, np.uint16)[2 * n : 3 * n]
    i = cuda.threadIdx.x
    floats[i] = x[i]
    halves[i] = i
    cuda.syncthreads()
    out[i] = floats[n - 1 - i] + halves[n - 1 - i]


def test_dynamic_shared_memory_is_one_memory_under_several_types() -> None:
    x, out = np.random.default_rng(0).standard_normal(16).astype(np.float32), np.zeros(16)
    dynamic.simulate(1, 16, (x, out, 16), shared_bytes=96)
    assert np.allclose(out, (x + np.arange(16))[::-1])


@device
def steps(n):
    count = 0
    while n != 1:
        if count > 30:
            return -1
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        count += 1
    return count


@kernel
def collatz(out):
    i = cuda.grid(1)
    if i > 0:
        out[i] = steps(i)


def test_a_device_function_ends_for_each_thread_in_its_own_time() -> None:
    out = np.zeros(64, np.int64)
    collatz.simulate(2, 32, (out,))

    def length(n: int) -> int:
        count = 0
        while n != 1:
            if count > 30:
                return -1
            n, count = (n // 2 if n % 2 == 0 else 3 * n + 1), count + 1
        return count

    assert out[1:].tolist() == [length(n) for n in range(1, 64)]


def test_a_factory_gives_each_kernel_its_own_constants() -> None:
    def times(factor: int) -> Kernel:
        @kernel
        def made(out):
            out[cuda.threadIdx.x] = cuda.threadIdx.x * factor

        return made  # type: ignore[no-any-return]

    out = np.zeros(4, np.int64)
    for factor in (2, 5):
        times(factor).simulate(1, 4, (out,))
        assert out.tolist() == [factor * i for i in range(4)]


def test_arrays_need_not_be_contiguous_and_plain_functions_are_kernels_too() -> None:
    def transpose(x, out):
        i, j = cuda.threadIdx.x, cuda.threadIdx.y
        out[i, j] = x[j, i]

    x, out = np.arange(24).reshape(4, 6)[:, ::2], np.zeros((3, 4), np.int64)
    simulate(transpose, 1, (3, 4), (x, out))
    assert np.array_equal(out, x.T)


@kernel
def bits(x, out):
    i = cuda.threadIdx.x
    word = np.uint32(x[i])
    out[0, i] = cuda.clz(word)
    out[1, i] = cuda.ffs(word)
    out[2, i] = cuda.brev(word)
    out[3, i] = np.uint32(word << 16).view(np.float32) if i > 4 else np.float32(word).view(np.uint32)
    out[4, i] = math.floor(math.sqrt(np.float64(word)))


def test_functions_of_bits() -> None:
    x = np.array([0, 1, 2, 0x80000000, 12345, 0x3F80, 0x4040], np.uint32)
    out = np.zeros((5, 7))
    bits.simulate(1, 7, (x, out))
    words = [f"{int(word):032b}" for word in x]
    assert out[0].tolist() == [len(w) - len(w.lstrip("0")) for w in words]
    assert out[1].tolist() == [len(w) - len(w.rstrip("0")) + 1 if "1" in w else 0 for w in words]
    assert out[2].tolist() == [int(w[::-1], 2) for w in words]
    assert out[3, 1] == 0x3F800000
    assert out[3, 5:].tolist() == [1.0, 3.0]
    assert out[4].tolist() == [math.isqrt(int(word)) for word in x]
