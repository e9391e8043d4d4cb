"""Quantised weights in a plan: what the pass makes, what it keeps, what memory says, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from slotwise.core.builder import GraphBuilder
from slotwise.core.check import check_graph
from slotwise.core.errors import PlanError, VerificationError
from slotwise.core.graph import Graph, Parameter
from slotwise.core.model import ModelSpec
from slotwise.core.printer import format_graph
from slotwise.core.quantise import SCHEMES, dequantise, quantise
from slotwise.core.specs import DType, TensorSpec
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.fuse_projections import FuseProjections
from slotwise.plans.passes.quantise_weights import QuantiseWeights
from slotwise.plans.plan import Plan
from slotwise.proving.interpret import interpret, load_parameters

TinyModel = Callable[..., ModelSpec]
WIDE: dict[str, Any] = {"hidden": 32, "inner": 64, "vocab": 40}
OPTIONS = PlanOptions(capacity=40, page_size=4, max_sequences=2, prefill_chunk=20)


class Drawn:
    """Random weights by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """See `WeightSource.tensor`; a source is as large as its parameter says, for none is joined before the pass."""
        return self.tensors[name]

    def draw(self, graph: Graph) -> Drawn:
        rng = torch.Generator().manual_seed(4)
        for parameter in graph.parameters:
            shape = parameter.value.spec.sizes({"M": 64})
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 1.0
            self.tensors[parameter.sources[0]] = torch.randn(*shape, generator=rng) * scale
        return self


def plan_of(tiny_model: TinyModel, weights: str, draft: str | None = "model") -> Plan:
    drafter = tiny_model("tiny-draft", layers=1, **WIDE) if draft == "model" else draft
    return compile_plan(tiny_model(**WIDE), draft=drafter, options=replace(OPTIONS, weights=weights))


def test_a_product_takes_codes_scale_and_offset_derived_from_its_weights_sources() -> None:
    g = GraphBuilder("g")
    x = g.input("x", TensorSpec(DType.BF16, ("T", 64)))
    weight, bias = g.parameter("w", TensorSpec(DType.BF16, (8, 64)), "a.weight", "b.weight"), None
    bias = g.parameter("w_bias", TensorSpec(DType.BF16, (8,)), "a.bias")
    (y,) = g.op("linear", x, weight, bias)
    graph = g.finish(y)
    assert format_graph(QuantiseWeights("int4_zp").apply(graph)) == (
        "graph g\n"
        "  input x: bf16[T, 64]\n"
        "  parameter w.codes: u8[8, 32] = int4_zp.codes(a.weight ++ b.weight)\n"
        "  parameter w.scale: f16[8, 2] = int4_zp.scale(a.weight ++ b.weight)\n"
        "  parameter w.offset: f16[8, 2] = int4_zp.offset(a.weight ++ b.weight)\n"
        "  parameter w_bias: bf16[8] = a.bias\n"
        "  %0: bf16[T, 8] = linear_q(x, w.codes, w.scale, w.offset, w_bias) {bits=4}\n"
        "  return %0"
    )
    assert format_graph(QuantiseWeights("int8").apply(graph)).splitlines()[2:5] == [
        "  parameter w.codes: i8[8, 64] = int8.codes(a.weight ++ b.weight)",
        "  parameter w.scale: f16[8, 2] = int8.scale(a.weight ++ b.weight)",
        "  parameter w_bias: bf16[8] = a.bias",
    ]


def test_native_leaves_the_graph_as_it_is(tiny_model: TinyModel) -> None:
    graph = tiny_model().graph
    assert QuantiseWeights("native").apply(graph) is graph


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_every_product_is_quantised_and_nothing_else_is(tiny_model: TinyModel, scheme: str) -> None:
    before = FuseProjections().apply(tiny_model(bias=True, **WIDE).graph)
    after = QuantiseWeights(scheme).apply(before)
    check_graph(after)
    products = {"linear", "linear_qkv", "linear_gated", "logits"}
    assert products <= {node.op for node in before.nodes}
    assert [node.op for node in after.nodes] == [n.op + "_q" * (n.op in products) for n in before.nodes]
    kept = [p for p in before.parameters if len(p.value.spec.shape) == 1 or p.value.name.startswith("rope")]
    assert [p for p in after.parameters if not p.derive and p.value.name != "embedding"] == kept


def test_a_tied_table_is_kept_for_look_ups_and_quantised_for_logits(tiny_model: TinyModel) -> None:
    graph = QuantiseWeights("int8").apply(tiny_model(**WIDE).graph)
    tied = [p for p in graph.parameters if p.sources == ("embedding.weight",)]
    assert [(p.value.name, p.derive) for p in tied] == [
        ("embedding", ""),
        ("embedding.codes", "int8.codes"),
        ("embedding.scale", "int8.scale"),
    ]


def test_a_weight_that_two_products_share_is_quantised_once() -> None:
    g = GraphBuilder("g")
    x = g.input("x", TensorSpec(DType.F32, ("T", 32)))
    weight = g.parameter("w", TensorSpec(DType.F32, (32, 32)), "w.weight")
    (y,) = g.op("linear", x, weight, None)
    (z,) = g.op("linear", y, weight, None)
    after = QuantiseWeights("int4").apply(g.finish(z))
    assert [p.value.name for p in after.parameters] == ["w.codes", "w.scale"]
    assert after.nodes[0].inputs[1:] == after.nodes[1].inputs[1:]


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_graph_means_what_it_meant_with_its_weights_quantised_and_restored(
    tiny_model: TinyModel, scheme: str
) -> None:
    model = tiny_model(dtype=DType.F64, bias=True, **WIDE)
    before = FuseProjections().apply(model.graph)
    after = QuantiseWeights(scheme).apply(before)
    source, restored = Drawn().draw(model.graph), Drawn()
    for name, tensor in source.tensors.items():
        is_matrix = tensor.dim() == 2 and not name.startswith("rope") and name != "embedding.weight"
        restored.tensors[name] = _restored(tensor, scheme) if is_matrix else tensor
    ids = torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32)
    rows = torch.arange(5, dtype=torch.int32)
    inputs = {"token_ids": ids, "positions": rows, "logit_rows": rows}
    plain = load_parameters(before, restored, {"M": 64})
    (expected,) = interpret(_with_own_head(before), {**inputs, **plain, "head": _restored(source.tensors["embedding.weight"], scheme).double()})  # fmt: skip  # noqa: E501
    (found,) = interpret(after, {**inputs, **load_parameters(after, source, {"M": 64})})
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (native,) = interpret(before, {**inputs, **load_parameters(before, source, {"M": 64})})
    assert (found - native).abs().max() > 1e-3  # it was quantised at all


def _restored(tensor: torch.Tensor, scheme: str) -> torch.Tensor:
    return dequantise(*quantise(tensor, scheme), bits=SCHEMES[scheme].bits, dtype=torch.float64)


def _with_own_head(graph: Graph) -> Graph:
    """`graph` with another weight for its logits than the table that it looks tokens up in."""
    *nodes, last = graph.nodes
    assert last.inputs[1] is not None
    head = replace(last.inputs[1], name="head")
    parameters = (*graph.parameters, Parameter(head, ("head",)))
    return replace(graph, nodes=(*nodes, replace(last, inputs=(last.inputs[0], head))), parameters=parameters)


def test_a_model_of_which_nothing_can_be_quantised_is_refused_by_name(tiny_model: TinyModel) -> None:
    with pytest.raises(PlanError, match=r"target tiny: weights='int8'.*multiple of 32.*graph tiny has none.*'native'"):
        compile_plan(tiny_model(), options=replace(OPTIONS, weights="int8"))
    narrow = tiny_model("small", vocab=40)
    with pytest.raises(PlanError, match=r"draft small: weights='int4'.*graph small has none"):
        compile_plan(tiny_model(**WIDE), draft=narrow, options=replace(OPTIONS, weights="int4"))


@pytest.mark.parametrize(("scheme", "per_group"), [("int8", 32 + 2), ("int4", 16 + 2), ("int4_zp", 16 + 4)])
def test_memory_is_counted_as_it_is_held(tiny_model: TinyModel, scheme: str, per_group: int) -> None:
    native, plan = plan_of(tiny_model, "native"), plan_of(tiny_model, scheme)
    for before, after in zip(native.roles, plan.roles, strict=True):
        model = before.parameters
        matrices = [p for p in model if len(p.value.spec.shape) == 2 and not p.value.name.startswith("rope")]
        elements = sum(p.value.spec.nbytes() // 4 for p in matrices)
        table = sum(p.value.spec.nbytes() for p in matrices if p.value.name == "embedding")
        rest = before.parameter_bytes - 4 * elements
        assert after.parameter_bytes == elements // 32 * per_group + rest + table
        reads = next(p for p in plan.programs if (p.role, p.kind) == (before.role, "decode")).parameter_bytes
        assert reads == after.parameter_bytes - table
    saved = sum(role.parameter_bytes for role in native.roles) - sum(role.parameter_bytes for role in plan.roles)
    assert plan.total_bytes - plan.arena_bytes == native.total_bytes - native.arena_bytes - saved
    assert 0 < plan.draft_cost_ratio < 1


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_plan_says_how_weights_are_held_and_survives_its_json(tiny_model: TinyModel, scheme: str) -> None:
    plan = plan_of(tiny_model, scheme)
    assert plan.options.weights == scheme
    assert f" in f32, {scheme} weights " in str(plan)
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert hash(read) == hash(plan)
    read.verify()
    entries = json.loads(plan.to_json())["roles"][0]["parameters"]
    assert {entry.get("derive", "") for entry in entries} == {"", *(f"{scheme}.{p}" for p in SCHEMES[scheme].parts)}


def test_plans_that_differ_in_a_derivation_alone_are_not_equal(tiny_model: TinyModel) -> None:
    plan = plan_of(tiny_model, "int8", draft=None)
    (role,) = plan.roles
    other = tuple(replace(p, derive="int4.scale") if p.derive == "int8.scale" else p for p in role.parameters)
    changed = replace(plan, roles=(replace(role, parameters=other),))
    assert changed != plan
    assert "target.parameters: as stored f32 x" in plan.diff(changed)


def test_a_diff_shows_what_quantising_changes(tiny_model: TinyModel) -> None:
    lines = plan_of(tiny_model, "native").diff(plan_of(tiny_model, "int4_zp")).splitlines()
    assert "  weights: native -> int4_zp" in lines
    for role in ("target", "draft"):
        assert any(line.startswith(f"  weights {role}: ") for line in lines)
        (held,) = (line for line in lines if line.startswith(f"  {role}.parameters: "))
        assert "int4_zp.codes u8 x" in held
        assert "int4_zp.offset f16 x" in held
    assert "  target.decode.4: linear_gated: reference:linear_gated.by_row x2 -> absent" in lines
    assert "  target.decode.4: linear_gated_q: absent -> reference:linear_gated_q.by_row x2" in lines
    assert (
        plan_of(tiny_model, "int4").diff(plan_of(tiny_model, "int4_zp")).splitlines()[1] == "  weights: int4 -> int4_zp"
    )


def test_a_parameter_derived_in_an_unknown_way_is_refused(tiny_model: TinyModel) -> None:
    plan = plan_of(tiny_model, "int8", draft=None)

    def renamed(parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
        return tuple(replace(p, derive="int3.codes") if p.derive == "int8.codes" else p for p in parameters)

    roles = tuple(replace(role, parameters=renamed(role.parameters)) for role in plan.roles)
    programs = tuple(replace(p, graph=replace(p.graph, parameters=renamed(p.graph.parameters))) for p in plan.programs)
    with pytest.raises(VerificationError, match=r"weights: .*codes is derived by 'int3\.codes', which is unknown"):
        replace(plan, roles=roles, programs=programs).verify()


def test_a_weight_that_does_not_divide_stays_native_and_the_plan_shows_it(tiny_model: TinyModel) -> None:
    graph = QuantiseWeights("int8").apply(
        tiny_model(hidden=32, inner=40, vocab=40).graph
    )  # rows of 40 in the MLP's end
    native = [node for node in graph.nodes if node.op == "linear"]
    assert {node.inputs[1].spec.shape[1] for node in native if node.inputs[1] is not None} == {40}
    assert {"linear_q", "logits_q"} <= {node.op for node in graph.nodes}
