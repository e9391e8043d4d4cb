"""What a plan takes: the sum of its parts, each told, and refused where there is less."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from slotwise.core.backend import load_backend
from slotwise.core.errors import OptionError, PlanError
from slotwise.core.model import ModelSpec
from slotwise.plans.compile import compile_plan
from slotwise.plans.memory import Budget, device_of, need_of, refuse_beyond
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan

from .conftest import TinyModel


def _planned(model: ModelSpec, draft: ModelSpec | str | None = None, **options: int | str) -> Plan:
    chosen = {"max_sequences": 4, "decode_rows": 8, "page_size": 4, "prefill_chunk": 8, "capacity": 32, **options}
    return compile_plan(model, draft=draft, options=PlanOptions(**chosen))  # type: ignore[arg-type]


def test_what_a_plan_holds_is_what_it_says_and_the_tables_beside_it(tiny_model: TinyModel) -> None:
    plan = _planned(tiny_model(), tiny_model("draft", layers=1))
    need = need_of(plan)
    assert need.of("weights") == sum(role.parameter_bytes for role in plan.roles)
    assert need.of("states") == sum(role.cache_bytes for role in plan.roles)
    assert need.of("arena") == plan.arena_bytes
    assert plan.buffer_bytes <= need.of("arrays") <= plan.buffer_bytes + 256 * (len(plan.buffers) + 1)
    assert need.held == sum(need.of(kind) for kind in ("weights", "states", "arena", "arrays", "tables"))
    assert need.held >= plan.total_bytes
    assert {"target states, 2 layers of k, v", "draft states, 1 layer of k, v"} <= {part.name for part in need.parts}


def test_loading_takes_more_only_where_states_are_smaller_than_what_makes_a_weight(tiny_model: TinyModel) -> None:
    model = tiny_model(hidden=64, inner=64)
    small, large = (_planned(model, weights="int8", pages=n, capacity=4) for n in (1, 400))
    assert need_of(large).loading == 0 or need_of(large).of("states") < need_of(small).loading
    assert need_of(small).loading > 0
    assert need_of(small).peak == need_of(small).held + need_of(small).loading


def test_steps_started_ahead_take_a_second_copy_of_the_arrays(tiny_model: TinyModel) -> None:
    plan = _planned(tiny_model())
    plain, ahead = need_of(plan), need_of(plan, overlap=True)
    assert ahead.of("arrays") > 2 * plain.of("arrays")
    assert ahead.held - plain.held == ahead.of("arrays") - plain.of("arrays")
    drafting = _planned(tiny_model(), "ngram")
    assert need_of(drafting, overlap=True) == need_of(drafting), "such a plan starts nothing ahead"


def test_exactly_enough_is_accepted_and_a_byte_less_refused_with_every_number(tiny_model: TinyModel) -> None:
    plan = _planned(tiny_model())
    need = need_of(plan)
    refuse_beyond(plan, Budget(need.peak, "memory is"))
    refuse_beyond(plan, None)
    with pytest.raises(PlanError) as caught:
        refuse_beyond(plan, Budget(need.peak - 1, "memory is"))
    said = str(caught.value)
    for told in (
        f"({need.peak} bytes)",
        f"({need.peak - 1} bytes)",
        "weights ",
        "states ",
        "arena ",
        "arrays ",
        "tables ",
    ):
        assert told in said
    assert "capacity 32 for each of 4 sequences in 32 pages" in said
    with pytest.raises(PlanError, match=r"what fits: capacity=9; or pages=3$"):
        refuse_beyond(plan, Budget(1, "memory is"), alternatives=lambda: ("capacity=9", "pages=3"))
    with pytest.raises(PlanError, match="a smaller model"):
        refuse_beyond(plan, Budget(1, "memory is"), alternatives=lambda: ())


def test_a_plan_whose_kernels_need_two_memories_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = _planned(tiny_model())
    assert device_of(plan) == "cpu"
    (first, *rest) = plan.programs
    (node, *nodes) = first.graph.nodes
    assert node.selection is not None
    moved = dataclasses.replace(node, selection=dataclasses.replace(node.selection, kernel="elsewhere:any"))
    graph = dataclasses.replace(first.graph, nodes=(moved, *nodes))
    mixed = dataclasses.replace(plan, programs=(dataclasses.replace(first, graph=graph), *rest))
    far = dataclasses.replace(load_backend("reference"), name="elsewhere", device="cuda")
    monkeypatch.setattr(
        "slotwise.plans.memory.load_backend", lambda name: far if name == "elsewhere" else load_backend(name)
    )
    with pytest.raises(PlanError, match="elsewhere on cuda, reference on cpu"):
        device_of(mixed)


def test_a_gpus_memory_is_what_is_free_there_and_the_hosts_tables_are_not_in_it(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert str(Budget.here("cuda")) == "a GPU has free 1000 B"
    plan = _planned(tiny_model())
    far = dataclasses.replace(load_backend("reference"), device="cuda")
    monkeypatch.setattr("slotwise.plans.memory.load_backend", lambda name: far)
    need = need_of(plan)
    assert need.of("tables") == need.loading == 0
    with pytest.raises(PlanError, match="a GPU has free 1000 B"):
        refuse_beyond(plan, Budget.here("cuda"))


def test_a_budget_is_what_is_given_or_what_the_machine_has() -> None:
    assert Budget.given("2GiB").nbytes == 2**31
    with pytest.raises(OptionError, match="memory '2Gib': there is no unit"):
        Budget.given("2Gib")
    here = Budget.here("cpu")
    assert here is not None
    assert 2**28 < here.nbytes < 2**50
