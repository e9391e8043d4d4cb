"""Each pass fuses what it says, leaves apart what must stay apart, and never changes what a graph means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.backend import Backend, Kernel, load_backend
from slotwise.core.check import check_graph
from slotwise.core.errors import GraphError, KernelSelectionError
from slotwise.core.graph import Graph, GraphBuilder, Value
from slotwise.core.interpret import interpret
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.compile import program_passes, symbolic_passes
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.fuse_add_norm import FuseAddNorm
from slotwise.plans.passes.fuse_projections import FuseProjections
from slotwise.plans.passes.fuse_rotary_write import FuseRotaryWrite
from slotwise.plans.passes.lower_cache import LowerCache
from slotwise.plans.passes.schedule import Schedule, peak_bytes
from slotwise.plans.passes.select_kernels import SelectKernels
from slotwise.plans.passes.specialise import Specialise

H, D = 16, 8
TinyModel = Callable[..., ModelSpec]


class Builder(GraphBuilder):
    """A graph builder that names weights by itself."""

    def rows(self, name: str = "x") -> Value:
        return self.input(name, TensorSpec(DType.F64, ("T", H)))

    def weight(self, name: str, *shape: int) -> Value:
        return self.parameter(name, TensorSpec(DType.F64, shape), f"{name}.weight")

    def one(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.op(op, *inputs, **attrs)[0]


def _ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.nodes]


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
    assert _ops(fused) == ["add_rms_norm", "add"]
    _same_meaning(graph, fused)


def test_of_two_norms_of_one_sum_one_is_fused() -> None:
    g = Builder("g")
    total = g.one("add", g.rows("x"), g.rows("y"))
    normed = [g.one("rms_norm", total, g.weight(f"w{i}", H), eps=1e-6) for i in range(2)]
    graph = g.finish(*normed)
    fused = FuseAddNorm().apply(graph)
    assert _ops(fused) == ["add_rms_norm", "rms_norm"]
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
    assert _ops(fused) == ["linear_gated"]
    assert [p.sources for p in fused.parameters] == [("mlp.gate.weight", "mlp.up.weight")]
    _same_meaning(graph, fused)


@pytest.mark.parametrize("reason", ["bias", "shared", "used_twice"])
def test_gate_and_up_stay_apart(reason: str) -> None:
    graph = _gated(Builder("g"), **{reason: True})
    fused = FuseProjections().apply(graph)
    assert _ops(fused) == _ops(graph)
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
    g.cache(0, 1, D)
    return g.finish(g.one("attend", *parts, layer=0, scale=1.0))


@pytest.mark.parametrize("biases", ["", "qkv"])
def test_queries_keys_and_values_become_one_product(biases: str) -> None:
    graph = _attention(Builder("g"), biases=biases)
    fused = FuseProjections().apply(graph)
    assert _ops(fused) == ["linear_qkv", "attend"]
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
    assert _ops(fused) == _ops(graph)
    _same_meaning(graph, fused)


def test_layers_that_share_keys_and_values_are_fused_once() -> None:
    g = Builder("g")
    x = g.rows()
    q, k, v, other = (
        g.one("linear_heads", x, g.weight(f"a.{n}", D, H), None, heads=1, head_dim=D) for n in ("q", "k", "v", "other")
    )
    outputs = []
    for layer, query in enumerate((q, other)):
        g.cache(layer, 1, D)
        outputs.append(g.one("attend", query, k, v, layer=layer, scale=1.0))
    graph = g.finish(*outputs)
    fused = FuseProjections().apply(graph)
    assert sorted(_ops(fused)) == ["attend", "attend", "linear_heads", "linear_qkv"]
    _same_meaning(graph, fused)


def test_joined_weights_of_two_layers_keep_apart_whatever_their_names() -> None:
    g = Builder("g")
    x = g.rows()
    for layer in range(2):
        parts = [
            g.one("linear_heads", x, g.weight(f"{n}{layer}", H, H), None, heads=2, head_dim=D) for n in ("q", "k", "v")
        ]
        g.cache(layer, 2, D)
        x = g.one("attend", *parts, layer=layer, scale=1.0)
    graph = g.finish(x)
    fused = FuseProjections().apply(graph)
    assert _ops(fused) == ["linear_qkv", "attend"] * 2
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
    g.cache(0, 2, D)
    return g.finish(g.one("attend", q, k, v, layer=0, scale=1.0), *outputs)


def test_attention_becomes_a_write_and_a_read_of_slots() -> None:
    graph = LowerCache(page_size=16, speculates=True).apply(_rotated())
    check_graph(graph)
    assert _ops(graph) == ["rotary", "write_slots", "attention"]
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
    assert _ops(graph) == ops


@pytest.mark.parametrize("rollback", ["none", "checkpoint"])
def test_a_layer_that_cannot_be_rolled_back_is_refused_when_speculating(tiny_model: TinyModel, rollback: str) -> None:
    graph = tiny_model(rollback=rollback).graph
    with pytest.raises(GraphError, match=f"layer 0 declares rollback '{rollback}'.*compile with speculate=0"):
        LowerCache(page_size=4, speculates=True).apply(graph)
    check_graph(LowerCache(page_size=4, speculates=False).apply(graph))


# --- all of them


@pytest.mark.parametrize("bias", [False, True])
def test_the_fusions_keep_what_a_model_means(tiny_model: TinyModel, bias: bool) -> None:
    graph = tiny_model(bias=bias, dtype=DType.F64).graph
    fused = FuseProjections().apply(FuseAddNorm().apply(graph))
    assert _ops(fused).count("linear_qkv") == _ops(fused).count("linear_gated") == 2
    assert _ops(fused).count("add_rms_norm") == 3
    _same_meaning(graph, fused)


def test_a_pass_changes_nothing_the_second_time(tiny_model: TinyModel) -> None:
    graph = tiny_model().graph
    for each in symbolic_passes(PlanOptions(), {}):
        graph = each.apply(graph)
        assert each.apply(graph) == graph or each.name == "lower_cache"


# --- specialise


def test_specialising_leaves_no_name(tiny_model: TinyModel) -> None:
    graph = tiny_model().graph
    every = Specialise((("M", 64), ("R", 4), ("T", 4)), all_rows=True).apply(graph)
    check_graph(every)
    assert "take_rows" not in _ops(every)
    assert "logit_rows" not in [value.name for value in every.inputs]
    last = Specialise((("M", 64), ("R", 1), ("T", 4)), all_rows=False).apply(graph)
    check_graph(last)
    assert "take_rows" in _ops(last)
    for made in (every, last):
        assert all(isinstance(d, int) for node in made.nodes for v in (*node.inputs, *node.outputs) if v
                   for d in v.spec.shape)  # fmt: skip
    with pytest.raises(GraphError, match="dimension 'M' has no size"):
        Specialise((("R", 1), ("T", 4)), all_rows=False).apply(graph)


# --- select_kernels


def _linear(rows: int = 4) -> Graph:
    g = Builder("proj")
    x = g.input("x", TensorSpec(DType.F32, (rows, H)))
    return g.finish(g.one("linear", x, g.parameter("w", TensorSpec(DType.F32, (8, H)), "w"), None))


def _fake(*kernels: Kernel) -> Backend:
    return Backend("fake", kernels, lambda: None)


def _kernel(name: str, *, invariant: int | None = None, refuses: str | None = None) -> Kernel:
    return Kernel("linear", name, lambda *_: lambda: None, lambda call: refuses, invariant)


def _select(options: PlanOptions, *kernels: Kernel, invariant_rows: int | None = 64) -> Graph:
    backends = {"reference": load_backend("reference"), "fake": _fake(*kernels)}
    return SelectKernels(options, backends, invariant_rows).apply(_linear())


BOTH = PlanOptions(backend={"*": "reference", "linear": ["fake", "reference"]})  # type: ignore[arg-type]


def test_the_first_kernel_that_can_is_chosen_and_the_others_are_recorded() -> None:
    chosen = _select(
        BOTH, _kernel("picky", refuses="H must be 17"), _kernel("split", invariant=32), _kernel("never", invariant=0)
    ).nodes[0].selection  # fmt: skip
    assert chosen is not None
    assert chosen.kernel == "reference:linear.by_row"
    assert chosen.backend == "reference"
    assert chosen.row_invariant
    assert chosen.reason == "choice 2 for linear"
    assert [(r.kernel, r.reason) for r in chosen.rejected] == [
        ("fake:picky", "H must be 17"),
        ("fake:split", "its rows are only up to 32 rows invariant; the decode side needs it up to 64"),
        ("fake:never", "its rows are never invariant; the decode side needs it up to 64"),
    ]


def test_a_backend_without_a_kernel_for_the_op_is_recorded() -> None:
    chosen = _select(BOTH).nodes[0].selection
    assert chosen is not None
    assert [(r.kernel, r.reason) for r in chosen.rejected] == [("fake:*", "has no kernel for linear")]


def test_prefill_prefers_the_kernel_that_gives_invariance_up() -> None:
    kernels = (_kernel("rows"), _kernel("fast", invariant=0))
    decode, prefill = (_select(BOTH, *kernels, invariant_rows=n).nodes[0].selection for n in (64, None))
    assert decode is not None
    assert prefill is not None
    assert (decode.kernel, decode.row_invariant) == ("fake:rows", True)
    assert (prefill.kernel, prefill.row_invariant) == ("fake:fast", False)


def test_an_op_that_nothing_runs_is_an_error_that_names_everything() -> None:
    with pytest.raises(KernelSelectionError) as caught:
        _select(PlanOptions(backend={"*": "fake"}), _kernel("picky", refuses="H must be 17"))  # type: ignore[arg-type]
    text = str(caught.value)
    for part in ("graph proj", "op linear", "x: f32[4, 16], w: f32[8, 16], none", "fake:picky: H must be 17"):
        assert part in text
    assert "'linear': 'reference'" in text


# --- schedule


@st.composite
def bound_graphs(draw: st.DrawFn) -> Graph:
    """A random legal graph of sums, norms, and reads and writes of two caches, all bound."""
    g = Builder("g")
    values = [g.input("x", TensorSpec(DType.F64, (2, H)))]
    weight = g.weight("w", H)
    slots, kv_len = g.input("slots", TensorSpec(DType.I32, (2,))), g.input("kv_len", TensorSpec(DType.I32, (2,)))
    starts = g.input("row_start", TensorSpec(DType.I32, (3,)))
    table = g.input("page_table", TensorSpec(DType.I32, (2, 2)))
    caches = []
    for layer in range(2):
        g.cache(layer, 2, D)
        caches.append([Value(f"kv{layer}.{n}", TensorSpec(DType.F64, (12, 2, D)), "cache") for n in "kv"])
    heads = [g.input("h", TensorSpec(DType.F64, (2, 2, D)))]
    written: set[int] = set()
    wide = g.weight("wide", 4 * H, H)
    narrow = g.weight("narrow", H, 4 * H)
    for _ in range(draw(st.integers(1, 14))):
        kind = draw(st.sampled_from(("add", "norm", "wide", "heads", "write", "read")))
        x = draw(st.sampled_from(values))
        if kind == "add":
            values.append(g.one("add", x, draw(st.sampled_from(values))))
        elif kind == "norm":
            values.append(g.one("rms_norm", x, weight, eps=1e-6))
        elif kind == "wide":
            values.append(g.one("linear", g.one("linear", x, wide, None), narrow, None))
        elif kind == "heads":
            split = g.weight(f"split{len(heads)}", H, H)
            heads.append(g.one("linear_heads", x, split, None, heads=2, head_dim=D))
        else:
            layer = draw(st.integers(0, 1))
            head = draw(st.sampled_from(heads))
            if kind == "write" or layer not in written:
                written.add(layer)
                g.op("write_slots", head, draw(st.sampled_from(heads)), *caches[layer], slots, layer=layer)
            else:
                paging = (starts, kv_len, table)
                values.append(g.one("attention", head, *caches[layer], *paging, layer=layer, page_size=4, scale=1.0))
    outputs = draw(st.lists(st.sampled_from(values[1:] or values), unique_by=lambda v: v.name, max_size=3))
    return g.finish(*outputs)


@given(bound_graphs())
def test_scheduling_keeps_data_and_effects_in_order_and_lowers_the_peak_or_nothing(graph: Graph) -> None:
    scheduled = Schedule().apply(graph)
    check_graph(scheduled)
    place = {id(node): index for index, node in enumerate(scheduled.nodes)}
    assert sorted(place) == sorted(map(id, graph.nodes))
    for i, first in enumerate(graph.nodes):
        for second in graph.nodes[i + 1 :]:
            data = any(v in second.inputs for v in first.outputs)
            clash = any(
                a.layer == b.layer and "writes" in (a.kind, b.kind) for a in first.effects for b in second.effects
            )
            if data or clash:
                assert place[id(first)] < place[id(second)]
    assert peak_bytes(scheduled) <= peak_bytes(graph)
    assert Schedule().apply(graph) == scheduled


def test_scheduling_lowers_the_peak_where_it_can() -> None:
    g = Builder("g")
    x = g.input("x", TensorSpec(DType.F64, (2, H)))
    wide = [g.one("linear", x, g.weight(f"up{i}", 64, H), None) for i in range(4)]
    ends = [g.one("linear", value, g.weight(f"down{i}", H, 64), None) for i, value in enumerate(wide)]
    graph = g.finish(*ends)
    assert peak_bytes(graph) == 4 * 2 * 64 * 8
    assert peak_bytes(Schedule().apply(graph)) == 2 * 64 * 8


def test_the_order_of_passes_is_the_one_that_is_shown() -> None:
    names = [p.name for p in (*symbolic_passes(PlanOptions(), {}), *program_passes(PlanOptions(), {}, {}, None))]
    assert names == [
        "fuse_add_norm",
        "fuse_projections",
        "lower_cache",
        "fuse_rotary_write",
        "quantise_weights",
        "lay_out_weights",
        "specialise",
        "select_kernels",
        "schedule",
    ]
