"""The layout of weights follows from the preferred backend, op by op, and a plan says what stands how."""

from __future__ import annotations

from dataclasses import replace

import pytest

from slotwise.core.backend import Backend, Kernel
from slotwise.core.builder import GraphBuilder
from slotwise.core.check import check_graph
from slotwise.core.errors import VerificationError
from slotwise.core.graph import Graph
from slotwise.core.layouts import OCTETS
from slotwise.core.printer import format_graph
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.lay_out_weights import LayOutWeights
from slotwise.plans.passes.quantise_weights import QuantiseWeights
from slotwise.plans.plan import Plan

from .conftest import TinyModel

OPS = ("embedding", "linear", "linear_q", "logits")


def _backend(name: str, layout: str, ops: tuple[str, ...] = OPS) -> Backend:
    kernels = tuple(Kernel(op, op, lambda *_: lambda: None) for op in ops)
    return Backend(name, kernels, lambda: None, layout=layout)


def _tied(rows: int = 16) -> Graph:
    g = GraphBuilder("g")
    ids = g.input("token_ids", TensorSpec(DType.I32, ("T",)))
    table = g.parameter("table", TensorSpec(DType.BF16, (rows, 32)), "table.weight")
    (x,) = g.op("embedding", ids, table)
    (y,) = g.op("linear", x, g.parameter("w", TensorSpec(DType.BF16, (32, 32)), "w.weight"), None)
    return g.finish(*g.op("logits", y, table))


def _laid(graph: Graph, backend: object, *backends: Backend) -> Graph:
    after = LayOutWeights(PlanOptions(backend=backend), {b.name: b for b in backends}).apply(graph)  # type: ignore[arg-type]
    check_graph(after)
    return after


def _parameters(graph: Graph) -> list[tuple[str, str, int]]:
    return [(p.value.name, p.layout, p.word) for p in graph.parameters]


def test_every_weight_stands_as_the_backend_likes_and_a_tied_one_stands_once() -> None:
    after = _laid(_tied(), "a", _backend("a", OCTETS))
    assert [node.attr("layout") for node in after.nodes] == [OCTETS] * 3
    assert _parameters(after) == [("table.octets", OCTETS, 2), ("w.octets", OCTETS, 2)]
    assert "bf16[16, 32] = table.weight in octets" in format_graph(after)


def test_a_backend_that_likes_rows_leaves_the_graph_as_it_is() -> None:
    graph = _tied()
    assert _laid(graph, "a", _backend("a", "rows")) == graph


def test_each_op_has_its_own_preference_and_a_weight_may_stand_in_both() -> None:
    after = _laid(_tied(), {"*": "a", "embedding": "b"}, _backend("a", OCTETS), _backend("b", "rows"))
    assert [node.attr("layout") for node in after.nodes] == ["rows", OCTETS, OCTETS]
    assert [name for name, _, _ in _parameters(after)] == ["table", "table.octets", "w.octets"]


def test_a_backend_without_a_kernel_for_the_op_is_not_asked() -> None:
    after = _laid(_tied(), ("a", "b"), _backend("a", OCTETS, ("linear",)), _backend("b", "rows"))
    assert [node.attr("layout") for node in after.nodes] == ["rows", OCTETS, "rows"]


def test_a_weight_that_does_not_divide_stays_in_rows() -> None:
    after = _laid(_tied(rows=12), "a", _backend("a", OCTETS))
    assert [node.attr("layout") for node in after.nodes] == ["rows", OCTETS, "rows"]


def test_the_parts_of_a_quantised_weight_stand_alike() -> None:
    after = _laid(QuantiseWeights("int4_zp").apply(_tied()), "a", _backend("a", OCTETS))
    assert ("w.codes.octets", OCTETS, 4) in _parameters(after)
    assert {("w.scale.octets", OCTETS, 1), ("w.offset.octets", OCTETS, 1)} <= set(_parameters(after))


def test_a_plan_with_octets_is_read_back_and_a_layout_that_cannot_be_is_refused(tiny_model: TinyModel) -> None:
    pytest.importorskip("numba")
    plan = compile_plan(tiny_model(vocab=40), options=PlanOptions(backend="numba_cpu", capacity=40))
    assert {p.layout for p in plan.target.parameters} == {"rows", OCTETS}
    assert Plan.from_json(plan.to_json()) == plan

    def broken(parameters: tuple[object, ...]) -> tuple[object, ...]:
        return tuple(replace(p, word=7) if p.layout == OCTETS else p for p in parameters)  # type: ignore[attr-defined]

    role = replace(plan.target, parameters=broken(plan.target.parameters))
    programs = tuple(replace(p, graph=replace(p.graph, parameters=broken(p.graph.parameters))) for p in plan.programs)
    with pytest.raises(VerificationError, match=r"cannot stand in 'octets' of words of 7"):
        replace(plan, roles=(role,), programs=programs).verify()
