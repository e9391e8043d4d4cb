"""A program has no name left, the first kernel that can for each call, and an order with the lowest peak found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.backend import Backend, Kernel, load_backend
from slotwise.core.check import check_graph
from slotwise.core.errors import GraphError, KernelSelectionError
from slotwise.core.graph import Graph, Value
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state
from slotwise.plans.compile import program_passes, symbolic_passes
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.schedule import Schedule, peak_bytes
from slotwise.plans.passes.select_kernels import SelectKernels
from slotwise.plans.passes.specialise import Specialise

from .graphs import Builder, D, H, ops_of

TinyModel = Callable[..., ModelSpec]


# --- specialise


def test_specialising_leaves_no_name(tiny_model: TinyModel) -> None:
    graph = tiny_model().graph
    every = Specialise((("M", 64), ("R", 4), ("T", 4)), all_rows=True).apply(graph)
    check_graph(every)
    assert "take_rows" not in ops_of(every)
    assert "logit_rows" not in [value.name for value in every.inputs]
    last = Specialise((("M", 64), ("R", 1), ("T", 4)), all_rows=False).apply(graph)
    check_graph(last)
    assert "take_rows" in ops_of(last)
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
        g.state(kv_state(layer, 2, D, DType.F64))
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
                a.state == b.state and "writes" in (a.kind, b.kind) for a in first.effects for b in second.effects
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
