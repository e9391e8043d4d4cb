"""A compiled program, run by its kernels in its planned arena, computes what the model's graph means.

The runner here is plain on purpose: it reads programs, placements and rows, and knows nothing of the engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from slotwise.core.backend import load_backend
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.plan_buffers import call_spec
from slotwise.plans.plan import Plan
from slotwise.plans.program import Program
from slotwise.proving.interpret import interpret
from slotwise.slots.binding import BoundSpan
from slotwise.slots.ledger import RoleLedger
from slotwise.slots.rows import RowInputs, fill_rows
from slotwise.slots.verify_binding import verify_rows

Sources = dict[str, torch.Tensor]


def _sources(model: ModelSpec, rows: int) -> Sources:
    """Random weights, and true rotary tables, by source name."""
    rng = torch.Generator().manual_seed(5)
    found: Sources = {}
    for parameter in model.graph.parameters:
        shape = parameter.value.spec.sizes({"M": rows})
        if parameter.sources[0].startswith("rope."):
            angle = torch.outer(torch.arange(rows), 100.0 ** -torch.arange(0, 1, 1 / shape[1]))
            found[parameter.sources[0]] = angle.cos() if parameter.sources[0].endswith("cos") else angle.sin()
        else:
            scale = 1 / math.sqrt(shape[-1]) if len(shape) > 1 else 1.0
            found[parameter.sources[0]] = torch.randn(*shape, generator=rng, dtype=torch.float64) * scale
    return found


class Runner:
    """One role of a plan with its caches and an arena full of rubbish."""

    def __init__(self, plan: Plan, sources: Sources, lanes: int) -> None:
        self.plan, role = plan, plan.target
        self.sources = sources
        self.ledger = RoleLedger(
            "target", lanes=lanes, capacity=role.capacity, page_size=role.page_size, pages=role.pages
        )
        self.caches = {
            state.value_name(part.name): torch.full((role.slots, *part.shape), float("nan"), dtype=part.dtype.torch)
            for state in role.states
            for part in state.parts
        }
        self.arena = torch.full((plan.arena_bytes,), 255, dtype=torch.uint8)
        self.tokens = np.zeros((lanes, role.capacity), np.int32)

    def call(self, program: Program, lanes: Sequence[int], begin: Sequence[int], end: Sequence[int]) -> torch.Tensor:
        """Logits of every row (of the last, for a prefill program)."""
        tensors: Sources = {
            p.value.name: torch.cat([self.sources[s] for s in p.sources]).to(p.value.spec.dtype.torch)
            for p in program.graph.parameters
        }
        inputs = {v.name: torch.full(v.spec.sizes(), 7, dtype=torch.int32) for v in program.graph.inputs}
        views = {name: tensor.numpy() for name, tensor in inputs.items() if name != "logit_rows"}
        rows = RowInputs(rows=program.rows, **views)
        spans = [np.array(x, np.int64) for x in (lanes, begin, end)]
        filled = fill_rows(rows, self.ledger, self.tokens, BoundSpan("target", *spans))
        verify_rows(rows, filled, self.ledger)
        if "logit_rows" in inputs:
            inputs["logit_rows"][0] = filled.rows - 1
        tensors |= {**inputs, **self.caches}
        for place in program.placements:
            spec = next((v.spec for n in program.graph.nodes for v in n.outputs if v.name == place.value), None)
            raw = self.arena[place.offset : place.offset + place.nbytes]
            tensors[place.value] = raw.view(spec.dtype.torch).view(spec.sizes()) if spec is not None else raw
        for value in program.graph.outputs:
            tensors[value.name] = torch.full(value.spec.sizes(), float("nan"), dtype=value.spec.dtype.torch)
        for index, node in enumerate(program.graph.nodes):
            assert node.selection is not None
            kernel = load_backend(node.selection.backend).kernel(node.selection.kernel.partition(":")[2])
            assert kernel.refuses(call_spec(node)) is None
            kernel.bind(
                tuple(None if v is None else tensors[v.name] for v in node.inputs),
                tuple(tensors[v.name] for v in node.outputs),
                node.attr_dict,
                tensors.get(f"ws{index}"),
            )()
        return tensors[program.graph.outputs[0].name]

    def advance(self, kind: str, lanes: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
        begin = self.ledger.committed[list(lanes)].tolist()
        wanted = np.array(lanes, np.int64), np.array(ends, np.int64)
        self.ledger.reserve(*wanted)
        total = sum(ends) - sum(begin)
        program = next(p for p in self.plan.programs if (p.role, p.kind) == ("target", kind) and p.rows >= total)
        logits = self.call(program, lanes, begin, ends)
        self.ledger.commit(*wanted)
        return logits[:total] if kind == "decode" else logits


@pytest.fixture(scope="module", params=[1, 3, 16], ids="pages of {}".format)
def compiled(request: pytest.FixtureRequest, tiny_model: Callable[..., ModelSpec]) -> tuple[Plan, Sources, ModelSpec]:
    model = tiny_model(dtype=DType.F64, bias=True)
    options = PlanOptions(capacity=40, page_size=request.param, max_sequences=3, speculate=4, prefill_chunk=20)
    return compile_plan(model, draft="ngram", options=options), _sources(model, 64), model


def _oracle(model: ModelSpec, sources: Sources, tokens: Sequence[int]) -> torch.Tensor:
    n = len(tokens)
    values = {p.value.name: sources[p.sources[0]] for p in model.graph.parameters}
    rows = torch.arange(n, dtype=torch.int32)
    values |= {"token_ids": torch.tensor(tokens, dtype=torch.int32), "positions": rows, "logit_rows": rows}
    return interpret(model.graph, values)[0]


def test_prefill_decode_and_verification_compute_what_the_graph_means(
    compiled: tuple[Plan, Sources, ModelSpec],
) -> None:
    plan, sources, model = compiled
    runner = Runner(plan, sources, lanes=3)
    prompts = [[(7 * i + lane) % model.vocab_size for i in range(34)] for lane in range(3)]
    expected = [_oracle(model, sources, prompt).float() for prompt in prompts]
    for lane, prompt in enumerate(prompts):
        runner.ledger.open(lane)
        runner.tokens[lane, : len(prompt)] = prompt
    for chunk in (11, 31):  # two chunks, of 11 and of 20 rows
        last = runner.advance("prefill", [1], [chunk])
        torch.testing.assert_close(last[0], expected[1][chunk - 1])
    ends = [0, 31, 0]
    for widths in ((1, 1, 1), (5, 1, 3), (2, 1, 5), (4, 0, 4)):  # ragged rows of three sequences in one call
        lanes = [lane for lane in range(3) if widths[lane]]
        before, ends = ends, [end + width for end, width in zip(ends, widths, strict=True)]
        logits = runner.advance("decode", lanes, [ends[lane] for lane in lanes])
        wanted = torch.cat([expected[lane][before[lane] : ends[lane]] for lane in lanes])
        torch.testing.assert_close(logits, wanted)


def test_rows_have_the_same_bits_alone_and_together(compiled: tuple[Plan, Sources, ModelSpec]) -> None:
    plan, sources, _ = compiled
    alone, together = Runner(plan, sources, lanes=1), Runner(plan, sources, lanes=1)
    for runner in (alone, together):
        runner.ledger.open(0)
        runner.tokens[0, :12] = range(12)
        runner.advance("decode", [0], [7])
    one_by_one = [alone.advance("decode", [0], [end]) for end in range(8, 13)]
    assert torch.equal(torch.cat(one_by_one), together.advance("decode", [0], [12]))
