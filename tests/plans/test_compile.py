"""What a plan is made of, and what cannot be compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.backend import Backend
from slotwise.core.errors import BackendError, OptionError, PlanError
from slotwise.core.model import ModelSpec
from slotwise.plans import compile as compiling
from slotwise.plans.compile import Identity, compile_plan, pass_names
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan

TinyModel = Callable[..., ModelSpec]


def test_a_plan_has_its_roles_steps_and_programs(tiny_plan: Plan) -> None:
    assert [role.role for role in tiny_plan.roles] == ["target", "draft"]
    assert [step.name for step in tiny_plan.steps] == ["decode", "prefill target", "prefill draft"]
    assert tiny_plan.has_draft_model
    assert tiny_plan.draft == "model"
    assert tiny_plan.buckets("target", "decode") == (1, 2, 3, 4, 6, 8)
    assert tiny_plan.buckets("target", "prefill") == (16, 20)
    assert tiny_plan.role("draft").capacity == 30, "a draft model serves no more positions than it has"
    assert tiny_plan.backends == ("reference",)
    assert 0 < tiny_plan.draft_cost_ratio < 1
    assert not tiny_plan.prefill_is_invariant


def test_the_memory_of_a_plan_is_the_sum_of_its_parts(tiny_plan: Plan) -> None:
    target = tiny_plan.target
    assert (target.pages, target.slots) == (28, 29 * 3)
    assert target.cache_bytes == 2 * 2 * 8 * 4 * target.slots
    parts = [role.parameter_bytes + role.cache_bytes for role in tiny_plan.roles]
    assert tiny_plan.total_bytes == sum(parts) + tiny_plan.arena_bytes + tiny_plan.buffer_bytes
    assert tiny_plan.arena_bytes == max(program.arena_bytes for program in tiny_plan.programs)


def test_a_plan_without_speculation_has_no_drafter(tiny_model: TinyModel) -> None:
    model = tiny_model()
    plain = compile_plan(model, options=PlanOptions(speculate=5))
    assert (plain.draft, plain.options.speculate) == ("none", 0)
    assert compile_plan(model, draft=model, options=PlanOptions(speculate=0)) == plain
    assert not any(program.kind == "accept" for program in plain.programs)


def test_the_settled_options_are_in_the_plan(tiny_model: TinyModel) -> None:
    plan = compile_plan(tiny_model(), options=PlanOptions(page_size=5, max_sequences=3))
    assert (plan.options.capacity, plan.options.pages) == (64, 39)
    assert plan.options.dtype is plan.target.dtype


def test_identities_name_the_checkpoints(tiny_model: TinyModel) -> None:
    plan = compile_plan(tiny_model(), identities={"target": Identity("my-model", "abc123")})
    assert (plan.target.model, plan.target.fingerprint) == ("my-model", "abc123")
    assert "plan for my-model" in str(plan)


def test_every_pass_is_seen_by_the_observer_in_order(tiny_model: TinyModel) -> None:
    seen: list[tuple[str, str]] = []
    compile_plan(tiny_model(), observe=lambda name, where, graph: seen.append((name, where)))
    assert [name for name, where in seen if where == "target"] == list(pass_names()[:6])
    assert [name for name, where in seen if where == "target.decode.1"] == list(pass_names()[6:])


@settings(max_examples=12)
@given(
    capacity=st.integers(2, 64),
    page_size=st.sampled_from((1, 3, 16)),
    sequences=st.integers(1, 5),
    speculate=st.integers(0, 7),
    rows=st.integers(8, 20),
    chunk=st.integers(1, 40),
    drafter=st.sampled_from((None, "ngram", "model")),
    acceptance=st.sampled_from(("coupled", "rejection")),
)
def test_every_choice_of_options_compiles_to_a_plan_that_verifies(
    tiny_model: TinyModel,
    capacity: int,
    page_size: int,
    sequences: int,
    speculate: int,
    rows: int,
    chunk: int,
    drafter: str | None,
    acceptance: str,
) -> None:
    options = PlanOptions(
        capacity=capacity,
        page_size=page_size,
        max_sequences=sequences,
        speculate=speculate,
        decode_rows=rows,
        prefill_chunk=chunk,
        acceptance=acceptance,
    )
    target = tiny_model(layers=1)
    draft = tiny_model("draft", layers=1, max_positions=20) if drafter == "model" else drafter
    plan = compile_plan(target, draft=draft, options=options)
    decode = plan.buckets("target", "decode")
    assert plan.options.speculate < max(decode) <= rows
    assert max(plan.buckets("target", "prefill")) == chunk
    assert plan.target.pages * page_size >= capacity


REFUSED: dict[str, tuple[Callable[[TinyModel], object], type[Exception], str]] = {
    "drafter": (lambda tiny: compile_plan(tiny(), draft="ngran"), PlanError, "drafter 'ngran' is not known"),
    "drafter, not speculating": (
        lambda tiny: compile_plan(tiny(), draft="ngran", options=PlanOptions(speculate=0)), PlanError, "'ngran'"
    ),
    "vocabulary": (
        lambda tiny: compile_plan(tiny(), draft=tiny("other", vocab=34)),
        PlanError, "the draft model other has 34 token ids, the target tiny has 33; a draft must not have more",
    ),
    "capacity": (
        lambda tiny: compile_plan(tiny(), options=PlanOptions(capacity=65)),
        PlanError, "capacity 65 is more than the 64 positions of tiny; choose capacity=64 or less",
    ),
    "pages": (
        lambda tiny: compile_plan(tiny(), options=PlanOptions(capacity=33, page_size=16, pages=2)),
        PlanError, "a pool of 2 pages of 16 slots cannot hold one sequence of capacity 33, which takes 3 pages",
    ),
    "backend": (
        lambda tiny: compile_plan(tiny(), options=PlanOptions(backend="referense")),  # type: ignore[arg-type]
        BackendError, "backend 'referense' is not known.*did you mean 'reference'",
    ),
    "rows": (lambda tiny: PlanOptions(speculate=5, decode_rows=5), OptionError, "takes k [+] 1 rows in one call"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_says_why(tiny_model: TinyModel, case: str) -> None:
    action, error, text = REFUSED[case]
    with pytest.raises(error, match=text):
        action(tiny_model)


def test_a_backend_that_cannot_run_here_says_why(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Backend("reference", (), lambda: "there is no such machine; buy one")
    monkeypatch.setattr(compiling, "load_backend", lambda name: missing)
    with pytest.raises(PlanError, match="backend 'reference' cannot run here: there is no such machine"):
        compile_plan(tiny_model())
