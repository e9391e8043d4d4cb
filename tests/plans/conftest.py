"""Models small enough to compile in milliseconds, and the plan of the bundled pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Value
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state
from slotwise.models.load import load_model
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan

TinyModel = Callable[..., ModelSpec]


def _tiny_model(
    name: str = "tiny",
    *,
    layers: int = 2,
    bias: bool = False,
    vocab: int = 33,
    max_positions: int = 64,
    on_rejection: str = "truncate",
    dtype: DType = DType.F32,
    hidden: int = 24,
    inner: int = 20,
) -> ModelSpec:
    """A decoder with one key head, heads of 8, and head norms; with every pattern that passes fuse."""
    head_dim, q_heads = 8, hidden // 8
    g = GraphBuilder(name)
    ids, positions = (g.input(n, TensorSpec(DType.I32, ("T",))) for n in ("token_ids", "positions"))
    logit_rows = g.input("logit_rows", TensorSpec(DType.I32, ("R",)))

    def weight(path: str, *shape: int) -> Value:
        return g.parameter(path, TensorSpec(dtype, shape), f"{path}.weight")

    def one(op: str, *inputs: Value | None, **attrs: int | float | str | bool) -> Value:
        return g.op(op, *inputs, **attrs)[0]

    tables = [
        g.parameter(f"rope.{f}", TensorSpec(DType.F32, ("M", head_dim // 2)), f"rope.{f}") for f in ("cos", "sin")
    ]
    table = weight("embedding", vocab, hidden)
    x = one("embedding", ids, table)
    for layer in range(layers):
        path = f"layers.{layer}"
        normed = one("rms_norm", x, weight(f"{path}.norm", hidden), eps=1e-6)
        q, k, v = (
            one(
                "linear_heads",
                normed,
                weight(f"{path}.attention.{part}", heads * head_dim, hidden),
                weight(f"{path}.attention.{part}_bias", heads * head_dim) if bias else None,
                heads=heads,
                head_dim=head_dim,
            )
            for part, heads in (("q", q_heads), ("k", 1), ("v", 1))
        )
        q = one("head_rms_norm", q, weight(f"{path}.attention.q_norm", head_dim), eps=1e-6)
        q, k = g.op("rotary", q, k, positions, *tables)
        g.state(replace(kv_state(layer, 1, head_dim, dtype), on_rejection=on_rejection))  # type: ignore[arg-type]
        mixed = one("attend", q, k, v, layer=layer, scale=head_dim**-0.5)
        x = one("add", x, one("linear", mixed, weight(f"{path}.attention.o", hidden, q_heads * head_dim), None))
        normed = one("rms_norm", x, weight(f"{path}.second_norm", hidden), eps=1e-6)
        gate, up = (one("linear", normed, weight(f"{path}.mlp.{n}", inner, hidden), None) for n in ("gate", "up"))
        gated = one("gated_activation", gate, up, activation="silu")
        x = one("add", x, one("linear", gated, weight(f"{path}.mlp.down", hidden, inner), None))
    taken = one("take_rows", x, logit_rows)
    normed = one("rms_norm", taken, weight("final_norm", hidden), eps=1e-6)
    return ModelSpec(name, "tiny", g.finish(one("logits", normed, table)), vocab, max_positions, dtype)


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """A function that makes the `ModelSpec` of a tiny decoder."""
    return _tiny_model


@pytest.fixture(scope="session")
def tiny_plan() -> Plan:
    """A small plan with everything in it: two models, speculation, several buckets."""
    options = PlanOptions(capacity=40, page_size=3, max_sequences=2, speculate=2, prefill_chunk=20)
    return compile_plan(_tiny_model(), draft=_tiny_model("tiny-draft", layers=1, max_positions=30), options=options)


@pytest.fixture(scope="session")
def pair(stories: Path, stories_draft: Path) -> tuple[ModelSpec, ModelSpec]:
    """The bundled target and draft model."""
    return load_model(stories).spec, load_model(stories_draft).spec


@pytest.fixture(scope="session")
def pair_plan(pair: tuple[ModelSpec, ModelSpec]) -> Plan:
    """The plan of the bundled pair for two sequences."""
    return compile_plan(pair[0], draft=pair[1], options=PlanOptions(capacity=64, max_sequences=2, prefill_chunk=32))
