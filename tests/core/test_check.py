"""The checker rejects each kind of bad graph, names the fault and shows the lines around it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slotwise.core.builder import make_node
from slotwise.core.check import check_graph
from slotwise.core.errors import GraphError
from slotwise.core.graph import Effect, Graph, Node, Parameter, Value
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state

HEAD = TensorSpec(DType.F32, ("T", 2, 12))
CACHE = TensorSpec(DType.F32, ("S", 2, 12))
FIRST, SECOND = (kv_state(layer, 2, 12, DType.F32) for layer in (0, 1))
I32 = DType.I32


def _value(name: str, dtype: DType, *shape: int | str) -> Value:
    return Value(name, TensorSpec(dtype, shape))


IDS = replace(_value("token_ids", I32, "T"), kind="input")
SLOTS = replace(_value("slots", I32, "T"), kind="input")
STARTS = replace(_value("row_start", I32, "B+1"), kind="input")
LENGTHS = replace(_value("kv_len", I32, "B"), kind="input")
PAGES = replace(_value("page_table", I32, "B", "P"), kind="input")
TABLE = Value("embed", TensorSpec(DType.F32, (101, 24)), "parameter")
WEIGHT = Value("w", TensorSpec(DType.F32, (24, 24)), "parameter")
K_CACHE, V_CACHE = Value("kv0.k", CACHE, "cache"), Value("kv0.v", CACHE, "cache")
X, Q, K, V, OUT = (
    _value("%0", DType.F32, "T", 24),
    Value("%1", HEAD),
    Value("%2", HEAD),
    Value("%3", HEAD),
    _value("%4", DType.F32, "T", 24),
)
HEADS = {"heads": 2, "head_dim": 12}


def _good() -> Graph:
    nodes = (
        make_node("embedding", (IDS, TABLE), {}, None, [X]),
        *(make_node("linear_heads", (X, WEIGHT, None), HEADS, None, [out]) for out in (Q, K, V)),
        make_node("write_slots", (K, V, K_CACHE, V_CACHE, SLOTS), {"layer": 0}, None, []),
        make_node(
            "attention",
            (Q, K_CACHE, V_CACHE, STARTS, LENGTHS, PAGES),
            {"layer": 0, "page_size": 16, "scale": 0.25},
            None,
            [OUT],
        ),
    )
    parameters = (Parameter(TABLE, ("embed.weight",)), Parameter(WEIGHT, ("w.weight",)))
    return Graph("g", (IDS, SLOTS, STARTS, LENGTHS, PAGES), parameters, (FIRST,), nodes, (OUT,))


def _with(index: int, **changes: object) -> Graph:
    graph = _good()
    nodes = list(graph.nodes)
    nodes[index] = replace(nodes[index], **changes)  # type: ignore[arg-type]
    return graph.with_nodes(nodes)


def _inputs(index: int, place: int, value: Value | None) -> Graph:
    inputs = list(_good().nodes[index].inputs)
    inputs[place] = value
    return _with(index, inputs=tuple(inputs))


def _order(*order: int) -> Graph:
    graph = _good()
    return graph.with_nodes([graph.nodes[i] for i in order])


def test_a_good_graph_passes() -> None:
    check_graph(_good())


BAD = {
    "use before definition": (_order(1, 0, 2, 3, 4, 5), 0, "%0 is used before it is defined"),
    "use of what nobody defines": (_inputs(1, 0, _value("%9", DType.F32, "T", 24)), 1, "%9 is used before"),
    "two definitions": (_order(0, 0, 1, 2, 3, 4, 5), 1, "%0 is defined twice; in SSA"),
    "a node defines an input": (_with(0, outputs=(replace(X, name="slots"),)), 0, "slots is defined twice"),
    "an input's spec differs from its definition": (
        _inputs(1, 0, _value("%0", DType.F32, "T", 23)),
        1,
        r"%0 is f32\[T, 23\] \(value\) here, but was defined as f32\[T, 24\]",
    ),
    "an input's kind differs from its definition": (
        _inputs(1, 1, replace(WEIGHT, kind="value")),
        1,
        r"w is f32\[24, 24\] \(value\) here, but was defined as f32\[24, 24\] \(parameter\)",
    ),
    "wrong output spec": (
        _with(0, outputs=(_value("%0", DType.F32, "T", 23),)),
        0,
        r"the contract infers f32\[T, 24\]",
    ),
    "wrong output dtype": (_with(0, outputs=(_value("%0", DType.F16, "T", 24),)), 0, "the contract infers f32"),
    "inputs against the contract": (_inputs(1, 1, TABLE), 1, "linear_heads: weight has 101 rows"),
    "unknown op": (_with(1, op="linear_head"), 1, r"'linear_head' is not known \(did you mean 'linear_heads'\?\)"),
    "missing input": (_inputs(0, 1, None), 0, "input 'table' is missing"),
    "missing attribute": (_with(1, attrs=(("heads", 2),)), 1, r"needs the attributes \['head_dim'\]"),
    "unknown attribute": (
        _with(1, attrs=(("head_dim", 12), ("head_sim", 1), ("heads", 2))),
        1,
        r"no attribute 'head_sim' \(did you mean 'head_dim'\?\)",
    ),
    "cache read before its write": (_order(0, 1, 2, 3, 5), 4, "reads kv0.* before any node has written"),
    "cache read moved before its write": (_order(0, 1, 2, 3, 5, 4), 4, "reads kv0.* before any node has written"),
    "undeclared cache": (replace(_good(), states=()), 4, "kv0.* the graph does not declare; it has none"),
    "cache declared for another layer": (replace(_good(), states=(SECOND,)), 4, "does not declare; it has kv1"),
    "cache of another dtype": (
        replace(_good(), states=(kv_state(0, 2, 12, DType.F16),)),
        4,
        r"kv0.k is f32\[S, 2, 12\], but kv0: k f16\[2, 12\]",
    ),
    "cache of another shape": (
        replace(_good(), states=(kv_state(0, 1, 24, DType.F32),)),
        4,
        r"kv0.k is f32\[S, 2, 12\], but kv0: k f32\[1, 24\]",
    ),
    "one cache under two layers": (
        replace(_with(5, attrs=tuple({**_good().nodes[5].attr_dict, "layer": 1}.items())), states=(FIRST, SECOND)),
        5,
        "kv0.k is the cache of layer 1 here, but was that of layer 0",
    ),
    "cache where a value is expected": (
        _inputs(4, 0, replace(K, name="kv0.x", kind="cache")),
        4,
        "kv0.x is of kind cache, but 'k' of write_slots must be no cache",
    ),
    "value where a cache is expected": (
        _inputs(4, 2, Value("%1", CACHE)),
        4,
        r"%1 is f32\[S, 2, 12\]",
    ),
    "effects left out": (_with(4, effects=()), 4, "effects do not follow from the contract, which says: writes kv0"),
    "effects made up": (_with(0, effects=(Effect("writes", "kv0", "slots"),)), 0, "which says: none"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_graph_is_rejected_with_the_lines_around_the_fault(fault: str) -> None:
    graph, index, message = BAD[fault]
    with pytest.raises(GraphError, match=message) as caught:
        check_graph(graph)
    text = str(caught.value)
    assert text.startswith(f"graph g, node {index}: ")
    arrows = [line for line in text.splitlines() if line.startswith("->")]
    assert [line.split()[1] for line in arrows] == [str(index)]
    assert f"{graph.nodes[index].op}(" in arrows[0]
    assert len(text.splitlines()) >= min(len(graph.nodes), 5)


def test_an_output_that_nothing_defines_is_rejected() -> None:
    with pytest.raises(GraphError, match=r"graph g: output %9: f32\[T\] is not defined"):
        check_graph(replace(_good(), outputs=(_value("%9", DType.F32, "T"),)))


def test_an_input_given_twice_is_rejected() -> None:
    with pytest.raises(GraphError, match="graph g: token_ids is defined twice"):
        check_graph(replace(_good(), inputs=(IDS, *_good().inputs)))


def test_a_cache_declared_twice_is_rejected() -> None:
    with pytest.raises(GraphError, match="a layer's state is declared twice"):
        check_graph(replace(_good(), states=(FIRST, FIRST)))


def test_a_value_that_is_no_cache_cannot_stand_for_one() -> None:
    graph = _inputs(4, 2, Value("fake", CACHE, "input"))
    with pytest.raises(GraphError, match="fake is of kind input, but 'k_cache' of write_slots must be a cache"):
        check_graph(replace(graph, inputs=(*graph.inputs, Value("fake", CACHE, "input"))))


def test_a_node_is_only_a_record_until_it_is_checked() -> None:
    nonsense = Node("nonsense", (), ())
    with pytest.raises(GraphError, match="graph g, node 6: op 'nonsense' is not known"):
        check_graph(_good().with_nodes([*_good().nodes, nonsense]))
