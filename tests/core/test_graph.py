"""Graphs are built through contracts, never change in place, and print the same text every time."""

from __future__ import annotations

import dataclasses

import pytest

from slotwise.core.builder import FreshNames, GraphBuilder, make_node
from slotwise.core.errors import GraphError
from slotwise.core.graph import Graph, Rejection, Selection, Value
from slotwise.core.printer import format_around, format_graph, format_node
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state


def _small() -> Graph:
    g = GraphBuilder("tiny")
    ids = g.input("token_ids", TensorSpec(DType.I32, ("T",)))
    rows = g.input("rows", TensorSpec(DType.I32, ("R",)))
    table = g.parameter("embed", TensorSpec(DType.F32, (101, 24)), "model.embed_tokens.weight")
    norm = g.parameter("norm", TensorSpec(DType.F32, (24,)), "model.norm.weight")
    qkv = g.parameter("qkv", TensorSpec(DType.F32, (48, 24)), "q.weight", "k.weight", "v.weight")
    g.state(kv_state(0, 1, 12, DType.F32))
    (x,) = g.op("embedding", ids, table, scale=2.5)
    (normed,) = g.op("rms_norm", x, norm, eps=1e-6)
    q, k, v = g.op("linear_qkv", normed, qkv, None, q_heads=2, kv_heads=1, head_dim=12)
    (attended,) = g.op("attend", q, k, v, layer=0, scale=0.25)
    total, _ = g.op("add_rms_norm", x, attended, norm, eps=1e-6)
    (last,) = g.op("take_rows", total, rows)
    (scores,) = g.op("logits", last, table)
    return g.finish(scores)


GOLDEN = """\
graph tiny
  input token_ids: i32[T]
  input rows: i32[R]
  parameter embed: f32[101, 24] = model.embed_tokens.weight
  parameter norm: f32[24] = model.norm.weight
  parameter qkv: f32[48, 24] = q.weight ++ k.weight ++ v.weight
  state kv0: k f32[1, 12], v f32[1, 12], a slot a token, truncate
  %0: f32[T, 24] = embedding(token_ids, embed) {scale=2.5}
  %1: f32[T, 24] = rms_norm(%0, norm) {eps=1e-06, weight_offset=0.0}
  %2: f32[T, 2, 12], %3: f32[T, 1, 12], %4: f32[T, 1, 12] = linear_qkv(%1, qkv, none) {head_dim=12, kv_heads=1, q_heads=2}
  %5: f32[T, 24] = attend(%2, %3, %4) {layer=0, scale=0.25, softcap=0.0, window=0}  # writes kv0[the sequence's tokens]; reads kv0[the sequence's tokens]
  %6: f32[T, 24], %7: f32[T, 24] = add_rms_norm(%0, %5, norm) {eps=1e-06, weight_offset=0.0}
  %8: f32[R, 24] = take_rows(%6, rows)
  %9: f32[R, 101] = logits(%8, embed) {softcap=0.0}
  return %9"""  # noqa: E501


def test_a_graph_prints_as_this_text() -> None:
    assert format_graph(_small()) == GOLDEN


def test_a_node_prints_its_kernel_before_its_effects() -> None:
    node = _small().nodes[3]
    chosen = dataclasses.replace(node, selection=Selection("reference:x.whole", "first", (Rejection("a:b", "no"),)))
    assert "# reference:x.whole; writes kv0[" in format_node(chosen)
    assert chosen.selection is not None
    assert chosen.selection.backend == "reference"


def test_a_node_without_outputs_prints_as_a_call() -> None:
    head = TensorSpec(DType.F32, ("T", 1, 12))
    cache = TensorSpec(DType.F32, ("S", 1, 12))
    values = (Value("k", head), Value("v", head), Value("kv0.k", cache, "cache"), Value("kv0.v", cache, "cache"))
    node = make_node("write_slots", (*values, Value("slots", TensorSpec(DType.I32, ("T",)))), {"layer": 0}, None, [])
    assert format_node(node) == "write_slots(k, v, kv0.k, kv0.v, slots) {layer=0}  # writes kv0[slots]"


def test_around_a_node_the_arrow_stands_at_it() -> None:
    graph = _small()
    lines = format_around(graph, 1, reach=2).splitlines()
    assert [line[:2] for line in lines] == ["  ", "->", "  ", "  "]
    assert lines[1].split()[1:3] == ["1", "%1:"]
    assert len(format_around(graph, 6, reach=2).splitlines()) == 3


def test_a_graph_is_frozen_and_with_nodes_makes_another() -> None:
    graph = _small()
    with pytest.raises(dataclasses.FrozenInstanceError):
        graph.name = "other"  # type: ignore[misc]
    shorter = graph.with_nodes(graph.nodes[:2])
    assert len(shorter.nodes) == 2
    assert len(graph.nodes) == 7
    assert hash(graph) == hash(_small())


def test_producers_and_uses_are_found_by_value_name() -> None:
    graph = _small()
    assert graph.producer()["%3"].op == "linear_qkv"
    assert [node.op for node in graph.uses()["%0"]] == ["rms_norm", "add_rms_norm"]
    assert "%9" not in graph.uses()


def test_fresh_names_start_after_the_last_used_one() -> None:
    fresh = FreshNames(_small())
    assert [fresh(), fresh()] == ["%10", "%11"]


def test_an_attribute_is_read_by_name_or_refused_by_name() -> None:
    node = _small().nodes[1]
    assert node.attr("eps") == 1e-6
    assert node.attr_dict == {"eps": 1e-6, "weight_offset": 0.0}
    with pytest.raises(GraphError, match="rms_norm has no attribute 'epsilon'"):
        node.attr("epsilon")


def _builder() -> tuple[GraphBuilder, Value]:
    g = GraphBuilder("bad")
    return g, g.input("x", TensorSpec(DType.F32, ("T", 24)))


def test_a_name_is_given_once() -> None:
    g, _ = _builder()
    with pytest.raises(GraphError, match="graph bad: the name 'x' is taken"):
        g.parameter("x", TensorSpec(DType.F32, (24,)), "w")


def test_wrong_inputs_are_refused_where_they_are_given() -> None:
    g, x = _builder()
    narrow = g.parameter("narrow", TensorSpec(DType.F32, (23,)), "w")
    with pytest.raises(GraphError, match=r"rms_norm: input 'weight' is f32\[23\], but dimension H must be 24"):
        g.op("rms_norm", x, narrow, eps=1e-6)
    half = g.parameter("half", TensorSpec(DType.F16, (24,)), "w")
    with pytest.raises(GraphError, match="'weight' must be a floating-point tensor of dtype f32 like the others"):
        g.op("rms_norm", x, half, eps=1e-6)
    with pytest.raises(GraphError, match=r"takes 2 inputs \(x, weight\); 1 were given"):
        g.op("rms_norm", x, eps=1e-6)
    with pytest.raises(GraphError, match="input 'weight' is missing and is not optional"):
        g.op("rms_norm", x, None, eps=1e-6)
    with pytest.raises(GraphError, match=r"input 'token_ids' must be i32, is f32\[T, 24\]"):
        g.op("embedding", x, x)
    with pytest.raises(GraphError, match="input 'weight' must have the dimensions"):
        g.op("rms_norm", x, x, eps=1e-6)


def test_weights_that_do_not_make_the_heads_are_refused_with_the_numbers() -> None:
    g, x = _builder()
    weight = g.parameter("w", TensorSpec(DType.F32, (47, 24)), "w")
    with pytest.raises(GraphError, match=r"linear_qkv: weight has 47 rows.*make 48"):
        g.op("linear_qkv", x, weight, None, q_heads=2, kv_heads=1, head_dim=12)
    with pytest.raises(GraphError, match="linear_heads: weight has 47 rows; 4 heads of 12 need another number"):
        g.op("linear_heads", x, weight, None, heads=4, head_dim=12)
    with pytest.raises(GraphError, match=r"linear_gated: weight must have an even number of rows.*has 47"):
        g.op("linear_gated", x, weight, activation="silu")


def test_outputs_that_are_kept_must_fit_the_contract() -> None:
    _, x = _builder()
    kept = Value("%0", TensorSpec(DType.F32, ("T", 24)))
    assert make_node("add", (x, x), {}, None, [kept]).outputs == (kept,)
    wrong = Value("%0", TensorSpec(DType.F32, ("T", 25)))
    with pytest.raises(GraphError, match=r"node add: outputs are f32\[T, 25\], its contract says f32\[T, 24\]"):
        make_node("add", (x, x), {}, None, [wrong])
    with pytest.raises(GraphError, match="source of fresh names"):
        make_node("add", (x, x), {}, None)
