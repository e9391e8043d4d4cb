"""The calls that the audit compiles kernels for.

Owns `calls_of`. What always holds: sizes are those of real models (a 1B and an 8B Llama, a 0.6B Qwen, a 9B Gemma), at
every row count where a table of configurations changes its mind; nothing is allocated, calls are specs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from slotwise.core.backend import CallSpec
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.core.quantise import PARTS, SCHEMES
from slotwise.core.specs import DType, TensorSpec


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's sizes."""

    hidden: int
    inner: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = (
    Shape(hidden=4096, inner=14336, q_heads=32, kv_heads=8, head_dim=128, vocab=128256),
    Shape(hidden=1024, inner=3072, q_heads=16, kv_heads=8, head_dim=64, vocab=151936),
    Shape(hidden=3584, inner=14336, q_heads=16, kv_heads=8, head_dim=256, vocab=256000),
)
ROWS = (1, 64, 256)
"""One row, verification and a prefill chunk."""

SMALL_ROWS = 16
PAGE_SIZE, PAGES = 16, 256
_STEP_ROWS = 6


def calls_of(op: str, dtype: DType) -> Iterator[CallSpec]:
    """The calls of `op` in `dtype`, each once."""
    seen = set()
    for shape in SHAPES:
        for rows in (*ROWS, SMALL_ROWS):
            for inputs, attrs in _arguments(op, shape, rows, dtype):
                key = (inputs, tuple(sorted(attrs.items())))
                if key not in seen:
                    seen.add(key)
                    yield call_with(op, inputs, attrs)


def call_with(op: str, inputs: tuple[TensorSpec | None, ...], attrs: Mapping[str, Attr]) -> CallSpec:
    """A call with its outputs inferred and its attributes completed."""
    contract = contract_of(op)
    full = contract.complete_attrs(attrs)
    return CallSpec(op, inputs, contract.infer(inputs, full), full)


_Arguments = Iterator[tuple[tuple[TensorSpec | None, ...], Mapping[str, Attr]]]


def _arguments(op: str, s: Shape, t: int, dtype: DType) -> _Arguments:
    def f(*shape: int) -> TensorSpec:
        return TensorSpec(dtype, shape)

    def f32(*shape: int) -> TensorSpec:
        return TensorSpec(DType.F32, shape)

    def i32(*shape: int) -> TensorSpec:
        return TensorSpec(DType.I32, shape)

    i64 = TensorSpec(DType.I64, (t,))
    q, kv, cache = f(t, s.q_heads, s.head_dim), f(t, s.kv_heads, s.head_dim), f(4096, s.kv_heads, s.head_dim)
    tables = (f32(4096, s.head_dim // 2), f32(4096, s.head_dim // 2))
    width = (s.q_heads + 2 * s.kv_heads) * s.head_dim
    heads: dict[str, Attr] = {"q_heads": s.q_heads, "kv_heads": s.kv_heads, "head_dim": s.head_dim}
    norm: dict[str, Attr] = {"eps": 1e-6}
    if op == "embedding":
        yield (i32(t), f(s.vocab, s.hidden)), {}
    elif op == "take_rows":
        yield (f(t, s.hidden), i32(1)), {}
    elif op == "add":
        yield (f(t, s.hidden), f(t, s.hidden)), {}
    elif op == "rms_norm":
        yield (f(t, s.hidden), f(s.hidden)), norm
        yield (f(t, s.hidden), f(s.hidden)), {**norm, "weight_offset": 1.0}
    elif op == "add_rms_norm":
        yield (f(t, s.hidden), f(t, s.hidden), f(s.hidden)), norm
    elif op == "head_rms_norm":
        yield (q, f(s.head_dim)), norm
    elif op == "linear":
        yield (f(t, s.hidden), f(s.hidden, s.hidden), None), {}
        yield (f(t, s.inner), f(s.hidden, s.inner), None), {}
        yield (f(t, s.hidden), f(s.inner, s.hidden), f(s.inner)), {}
    elif op == "linear_heads":
        heads_attrs: dict[str, Attr] = {"heads": s.q_heads, "head_dim": s.head_dim}
        yield (f(t, s.hidden), f(s.q_heads * s.head_dim, s.hidden), None), heads_attrs
    elif op == "linear_qkv":
        yield (f(t, s.hidden), f(width, s.hidden), None), heads
        yield (f(t, s.hidden), f(width, s.hidden), f(width)), heads
    elif op in FLOAT_OPS:
        # Every scheme for the first of the float op's calls, one for the others; a third model's sizes add no code.
        schemes = tuple(SCHEMES.values()) if t != SMALL_ROWS and s in SHAPES[:2] else ()
        for place, (inputs, given) in enumerate(_arguments(op.removesuffix("_q"), s, t, dtype)):
            x, weight, *rest = inputs
            assert weight is not None
            for scheme in schemes if place == 0 else schemes[:1]:
                parts = scheme.specs(*weight.sizes())
                yield (x, *map(parts.get, PARTS), *rest), {**given, "bits": scheme.bits}
    elif op == "gated_activation":
        yield (f(t, s.inner), f(t, s.inner)), {"activation": "silu"}
    elif op == "linear_gated":
        for activation in ("silu", "gelu_tanh"):
            yield (f(t, s.hidden), f(2 * s.inner, s.hidden)), {"activation": activation}
    elif op == "logits":
        yield (f(t, s.hidden), f(s.vocab, s.hidden)), {}
        yield (f(t, s.hidden), f(s.vocab, s.hidden)), {"softcap": 30.0}
    elif op == "rotary":
        yield (q, kv, i32(t), *tables), {}
    elif op == "rotary_write":
        yield (q, kv, kv, i32(t), *tables, cache, cache, i32(t)), {"layer": 0}
    elif op == "write_slots":
        yield (kv, kv, cache, cache, i32(t)), {"layer": 0}
    elif op == "attention":
        attrs: dict[str, Attr] = {"layer": 0, "page_size": PAGE_SIZE, "scale": s.head_dim**-0.5}
        # A table of configurations looks at no number of rows here; one row, a window and a cap are other code.
        inputs = (q, cache, cache, i32(t + 1), i32(t), i32(t, PAGES))
        if t in (1, max(ROWS)):
            yield inputs, attrs
        else:
            yield inputs, {**attrs, "softcap": 50.0, "window": 0 if t == SMALL_ROWS else 1024}
    elif op == "filter_logits":
        yield (f32(t, s.vocab), f32(t), i32(t), f32(t), f32(t)), {}
    elif op == "greedy":
        yield (f32(t, s.vocab),), {}
    elif op == "sample":
        yield (f32(t, s.vocab), i64, i32(t)), {"stream": 0}
    elif op == "accept_coupled":
        yield (i32(t), i32(t), i32(_STEP_ROWS + 1)), {}
    elif op == "accept_rejection":
        yield (f32(t, s.vocab), f32(t, s.vocab), i32(t), i32(_STEP_ROWS + 1), i64, i32(t)), {}
