"""No two values that are alive at the same time share a byte of the arena: lifetimes are worked out again here."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.backend import Backend, Kernel
from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Graph, Selection
from slotwise.core.sizes import size
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.passes.plan_buffers import ALIGNMENT, Placement, arena_bytes, plan_buffers
from slotwise.plans.plan import Plan
from slotwise.plans.show import show_program

SCRATCH = Kernel("linear", "linear", lambda *_: lambda: None, workspace=lambda call: 100)
BACKENDS = {"fake": Backend("fake", (SCRATCH,), lambda: None)}


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random products of random widths, some of which need a workspace, some of which are outputs."""
    g = GraphBuilder("g")
    x = g.input("x", TensorSpec(DType.F32, (3, 8)))
    values = [x]
    for index in range(draw(st.integers(1, 15))):
        source = draw(st.sampled_from(values))
        width = draw(st.integers(1, 200))
        weight = g.parameter(f"w{index}", TensorSpec(DType.F32, (width, int(source.spec.shape[1]))), f"w{index}")
        values.append(g.op("linear", source, weight, None)[0])
    outputs = draw(st.lists(st.sampled_from(values[1:]), unique_by=lambda v: v.name, max_size=3))
    graph = g.finish(*outputs)
    chosen = draw(st.lists(st.booleans(), min_size=len(graph.nodes), max_size=len(graph.nodes)))
    selection = Selection("fake:linear", "the only one")
    return graph.with_nodes(
        [dataclasses.replace(n, selection=selection) if c else n for n, c in zip(graph.nodes, chosen, strict=True)]
    )


def _alive(graph: Graph, index: int) -> dict[str, int]:
    """Name -> bytes of what must exist while node `index` runs, by the definition: made by now, needed now or later."""
    outputs = {value.name for value in graph.outputs}
    made = {v.name: v for node in graph.nodes[: index + 1] for v in node.outputs if v.name not in outputs}
    needed = {v.name for node in graph.nodes[index:] for v in node.inputs if v is not None}
    needed |= {v.name for v in graph.nodes[index].outputs}
    alive = {name: value.spec.nbytes() for name, value in made.items() if name in needed}
    return alive | ({f"ws{index}": 100} if graph.nodes[index].selection is not None else {})


@given(graphs())
def test_live_values_do_not_share_bytes_and_the_arena_holds_them(graph: Graph) -> None:
    placements = plan_buffers(graph, BACKENDS)
    places = {place.value: place for place in placements}
    assert len(places) == len(placements)
    peak = 0
    seen: set[str] = set()
    for index in range(len(graph.nodes)):
        alive = _alive(graph, index)
        seen |= alive.keys()
        peak = max(peak, sum(alive.values()))
        end = 0
        for place in sorted((places[name] for name in alive), key=lambda p: p.offset):
            assert place.first <= index <= place.last
            assert place.nbytes == alive[place.value]
            assert place.offset % ALIGNMENT == 0
            assert place.offset >= end, f"{place} begins before the last value ends at {end}"
            end = place.offset + place.nbytes
            assert end <= arena_bytes(placements)
    assert seen == places.keys(), "something is placed that is never alive, or the other way round"
    assert arena_bytes(placements) >= peak


@given(graphs())
def test_placements_are_a_function_of_the_graph(graph: Graph) -> None:
    assert plan_buffers(graph, BACKENDS) == plan_buffers(graph, BACKENDS)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        (Placement("a", 0, 10, 0, 1), Placement("b", 9, 1, 1, 2), True),
        (Placement("a", 0, 10, 0, 1), Placement("b", 10, 1, 1, 2), False),
        (Placement("a", 0, 10, 0, 1), Placement("b", 0, 10, 2, 3), False),
    ],
    ids=["both", "in time alone", "in space alone"],
)
def test_placements_overlap_in_space_and_time(one: Placement, other: Placement, overlap: bool) -> None:
    assert one.overlaps(other) == other.overlaps(one) == overlap


def test_values_that_are_never_together_share_bytes(tiny_plan: Plan) -> None:
    for program in tiny_plan.programs:
        assert program.arena_bytes <= sum(-(-p.nbytes // ALIGNMENT) * ALIGNMENT for p in program.placements)
    widest = max(tiny_plan.programs, key=lambda program: len(program.placements))
    assert widest.arena_bytes < sum(p.nbytes for p in widest.placements) / 2


def test_the_arena_is_printed(tiny_plan: Plan) -> None:
    assert f"arena {size(tiny_plan.arena_bytes)} (peak activations)" in str(tiny_plan)
    program = tiny_plan.programs[0]
    text = show_program(program)
    for place in program.placements:
        assert f"{place.value} @{place.offset}+{place.nbytes} until {place.last}" in text
