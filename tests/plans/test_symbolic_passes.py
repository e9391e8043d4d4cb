"""Each pass over a model's graph fuses what it says, leaves apart what must stay apart, and keeps what it means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slotwise.core.check import check_graph
from slotwise.core.errors import GraphError
from slotwise.core.graph import Graph
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state
from slotwise.plans.compile import symbolic_passes
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.fuse_add_norm import FuseAddNorm
from slotwise.plans.passes.fuse_projections import FuseProjections
from slotwise.plans.passes.fuse_rotary_write import FuseRotaryWrite
from slotwise.plans.passes.lower_cache import LowerCache
from slotwise.proving.interpret import interpret

from .graphs import Builder, D, H, ops_of

TinyModel = Callable[..., ModelSpec]


def _values(before: Graph, after: Graph, rows: int = 5) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random inputs and weights for both graphs: a joined weight is its sources, joined."""
    rng = torch.Generator().manual_seed(3)
    values: dict[str, torch.Tensor] = {}
    for value in before.inputs:
        shape = value.spec.sizes({"T": rows, "R": rows})
        ids = torch.arange(rows, dtype=torch.int32)
        values[value.name] = ids if value.spec.dtype is DType.I32 else torch.randn(*shape, generator=rng).double()
    by_source = {}
    for parameter in before.parameters:
        shape = parameter.value.spec.sizes({"M": 64})
        tensor = torch.randn(*shape, generator=rng).to(parameter.value.spec.dtype.torch)
        by_source[parameter.sources[0]] = values[parameter.value.name] = tensor
    joined = {p.value.name: torch.cat([by_source[s] for s in p.sources]) for p in after.parameters}
    return values, {**{v.name: values[v.name] for v in after.inputs}, **joined}


def _same_meaning(before: Graph, after: Graph) -> None:
    check_graph(after)
    left, right = _values(before, after)
    for expected, found in zip(interpret(before, left), interpret(after, right), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# --- fuse_add_norm


def test_a_sum_and_its_norm_are_fused_and_the_sum_stays_available() -> None:
    g = Builder("g")
    total = g.one("add", g.rows("x"), g.rows("y"))
    normed = g.one("rms_norm", total, g.weight("w", H), eps=1e-6)
    graph = g.finish(g.one("add", total, normed), total)
    fused = FuseAddNorm().apply(graph)
    assert ops_of(fused) == ["add_rms_norm", "add"]
    _same_meaning(graph, fused)


def test_of_two_norms_of_one_sum_one_is_fused() -> None:
    g = Builder("g")
    total = g.one("add", g.rows("x"), g.rows("y"))
    normed = [g.one("rms_norm", total, g.weight(f"w{i}", H), eps=1e-6) for i in range(2)]
    graph = g.finish(*normed)
    fused = FuseAddNorm().apply(graph)
    assert ops_of(fused) == ["add_rms_norm", "rms_norm"]
    _same_meaning(graph, fused)


def test_a_norm_whose_weight_is_computed_and_a_norm_of_no_sum_stay() -> None:
    g = Builder("g")
    x = g.rows()
    g.one("rms_norm", x, g.weight("w", H), eps=1e-6)
    total = g.one("add", x, x)
    graph = g.finish(g.one("rms_norm", total, g.input("scale", TensorSpec(DType.F64, (H,))), eps=1e-6))
    assert FuseAddNorm().apply(graph) == graph


# --- fuse_projections


def _gated(g: Builder, *, bias: bool = False, shared: bool = False, used_twice: bool = False) -> Graph:
    x = g.rows()
    weights = [g.weight("mlp.gate", 12, H), g.weight("mlp.up", 12, H)]
    gate = g.one("linear", x, weights[0], g.weight("mlp.bias", 12) if bias else None)
    up = g.one("linear", x, weights[0 if shared else 1], None)
    gated = g.one("gated_activation", gate, up, activation="gelu")
    return g.finish(gated, up) if used_twice else g.finish(gated)


def test_gate_and_up_become_one_product() -> None:
    graph = _gated(Builder("g"))
    fused = FuseProjections().apply(graph)
    assert ops_of(fused) == ["linear_gated"]
    assert [p.sources for p in fused.parameters] == [("mlp.gate.weight", "mlp.up.weight")]
    _same_meaning(graph, fused)


@pytest.mark.parametrize("reason", ["bias", "shared", "used_twice"])
def test_gate_and_up_stay_apart(reason: str) -> None:
    graph = _gated(Builder("g"), **{reason: True})
    fused = FuseProjections().apply(graph)
    assert ops_of(fused) == ops_of(graph)
    _same_meaning(graph, fused)


def _attention(
    g: Builder,
    *,
    biases: str = "",
    weights: tuple[str, str, str] = ("a.q", "a.k", "a.v"),
    inputs: tuple[int, int, int] = (0, 0, 0),
    shared_bias: bool = False,
) -> Graph:
    xs = [g.rows(f"x{i}") for i in range(2)]
    made = {name: g.weight(name, D, H) for name in dict.fromkeys(weights)}
    common = g.weight("a.bias", D) if shared_bias else None
    parts = []
    for part, name, index in zip("qkv", weights, inputs, strict=True):
        bias = common or (g.weight(f"a.{part}_bias", D) if part in biases else None)
        parts.append(g.one("linear_heads", xs[index], made[name], bias, heads=1, head_dim=D))
    g.state(kv_state(0, 1, D, DType.F64))
    return g.finish(g.one("attend", *parts, layer=0, scale=1.0))


@pytest.mark.parametrize("biases", ["", "qkv"])
def test_queries_keys_and_values_become_one_product(biases: str) -> None:
    graph = _attention(Builder("g"), biases=biases)
    fused = FuseProjections().apply(graph)
    assert ops_of(fused) == ["linear_qkv", "attend"]
    assert fused.parameters[0].sources == ("a.q.weight", "a.k.weight", "a.v.weight")
    _same_meaning(graph, fused)


@pytest.mark.parametrize(
    "options",
    [
        {"biases": "qk"},
        {"biases": "kv"},
        {"weights": ("a.q", "a.k", "a.k")},
        {"inputs": (0, 0, 1)},
        {"shared_bias": True},
    ],
    ids=["no bias for values", "no bias for queries", "shared weight", "other input", "shared bias"],
)
def test_queries_keys_and_values_stay_apart(options: dict[str, Any]) -> None:
    graph = _attention(Builder("g"), **options)
    fused = FuseProjections().apply(graph)
    assert ops_of(fused) == ops_of(graph)
    _same_meaning(graph, fused)


def test_layers_that_share_keys_and_values_are_fused_once() -> None:
    g = Builder("g")
    x = g.rows()
    q, k, v, other = (
        g.one("linear_heads", x, g.weight(f"a.{n}", D, H), None, heads=1, head_dim=D) for n in ("q", "k", "v", "other")
    )
    outputs = []
    for layer, query in enumerate((q, other)):
        g.state(kv_state(layer, 1, D, DType.F64))
        outputs.append(g.one("attend", query, k, v, layer=layer, scale=1.0))
    graph = g.finish(*outputs)
    fused = FuseProjections().apply(graph)
    assert sorted(ops_of(fused)) == ["attend", "attend", "linear_heads", "linear_qkv"]
    _same_meaning(graph, fused)


def test_joined_weights_of_two_layers_keep_apart_whatever_their_names() -> None:
    g = Builder("g")
    x = g.rows()
    for layer in range(2):
        parts = [
            g.one("linear_heads", x, g.weight(f"{n}{layer}", H, H), None, heads=2, head_dim=D) for n in ("q", "k", "v")
        ]
        g.state(kv_state(layer, 2, D, DType.F64))
        x = g.one("attend", *parts, layer=layer, scale=1.0)
    graph = g.finish(x)
    fused = FuseProjections().apply(graph)
    assert ops_of(fused) == ["linear_qkv", "attend"] * 2
    _same_meaning(graph, fused)


# --- lower_cache and fuse_rotary_write


def _rotated(*, keys_given: bool = False, keys_read: bool = False, query_used: bool = False) -> Graph:
    g = Builder("g")
    q, k, v = (g.input(n, TensorSpec(DType.F64, ("T", 2, D))) for n in "qkv")
    positions = g.input("positions", TensorSpec(DType.I32, ("T",)))
    tables = [g.parameter(f"rope.{f}", TensorSpec(DType.F32, ("M", D // 2)), f"rope.{f}") for f in ("cos", "sin")]
    q, k = g.op("rotary", q, k, positions, *tables)
    outputs = [k] if keys_given else []
    if keys_read:
        outputs.append(g.one("head_rms_norm", k, g.weight("keys", D), eps=1e-6))
    if query_used:
        q = g.one("head_rms_norm", q, g.weight("norm", D), eps=1e-6)
    g.state(kv_state(0, 2, D, DType.F64))
    return g.finish(g.one("attend", q, k, v, layer=0, scale=1.0), *outputs)


def test_attention_becomes_a_write_and_a_read_of_slots() -> None:
    graph = LowerCache(page_size=16, speculates=True).apply(_rotated())
    check_graph(graph)
    assert ops_of(graph) == ["rotary", "write_slots", "attention"]
    assert [str(e) for node in graph.nodes for e in node.effects] == [
        "writes kv0[slots]",
        "reads kv0[page_table up to kv_len]",
    ]
    assert graph.nodes[-1].attr("page_size") == 16


@pytest.mark.parametrize(
    ("options", "ops"),
    [
        ({}, ["rotary_write", "attention"]),
        ({"keys_given": True}, ["rotary", "write_slots", "attention"]),
        ({"keys_read": True}, ["rotary", "head_rms_norm", "write_slots", "attention"]),
        ({"query_used": True}, ["rotary", "head_rms_norm", "write_slots", "attention"]),
    ],
    ids=["fused", "keys are an output", "keys read twice", "queries read before the write"],
)
def test_rotary_and_the_write_are_fused_where_nothing_comes_between(options: dict[str, bool], ops: list[str]) -> None:
    graph = FuseRotaryWrite().apply(LowerCache(page_size=4, speculates=False).apply(_rotated(**options)))
    check_graph(graph)
    assert ops_of(graph) == ops


def test_a_state_that_cannot_be_cut_back_is_refused_when_speculating(tiny_model: TinyModel) -> None:
    graph = tiny_model(on_rejection="replay").graph
    with pytest.raises(GraphError, match=r"kv0 cannot be cut back \('replay'\).*compile with speculate=0"):
        LowerCache(page_size=4, speculates=True).apply(graph)
    check_graph(LowerCache(page_size=4, speculates=False).apply(graph))


# --- all of them


@pytest.mark.parametrize("bias", [False, True])
def test_the_fusions_keep_what_a_model_means(tiny_model: TinyModel, bias: bool) -> None:
    graph = tiny_model(bias=bias, dtype=DType.F64).graph
    fused = FuseProjections().apply(FuseAddNorm().apply(graph))
    assert ops_of(fused).count("linear_qkv") == ops_of(fused).count("linear_gated") == 2
    assert ops_of(fused).count("add_rms_norm") == 3
    _same_meaning(graph, fused)


def test_a_pass_changes_nothing_the_second_time(tiny_model: TinyModel) -> None:
    graph = tiny_model().graph
    for each in symbolic_passes(PlanOptions(), {}):
        graph = each.apply(graph)
        assert each.apply(graph) == graph or each.name == "lower_cache"
