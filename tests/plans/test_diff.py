"""A diff of plans names what differs, where it is, with both values; and says nothing of equal plans."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from slotwise.core.backend import Backend, Kernel, load_backend
from slotwise.core.model import ModelSpec
from slotwise.plans import compile as compiling
from slotwise.plans.checks import plan as verifying
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan

TinyModel = Callable[..., ModelSpec]


def test_a_plan_does_not_differ_from_itself(tiny_plan: Plan) -> None:
    assert tiny_plan.diff(Plan.from_json(tiny_plan.to_json())) == ""


def test_speculating_is_seen_in_options_steps_programs_and_buffers(tiny_model: TinyModel) -> None:
    options = PlanOptions(capacity=40, page_size=4)
    plain, drafting = (
        compile_plan(tiny_model(), draft=draft, options=options) for draft in (None, tiny_model("tiny-draft", layers=1))
    )
    lines = plain.diff(drafting).splitlines()
    for line in (
        "  speculate: 0 -> 5",
        "  drafter: none -> model",
        "  draft: absent -> tiny-draft",
        "  decode: draft: absent -> draft[filled .. len + k - 1)",
        "  prefill draft: prefill: absent -> draft[begin .. begin + chunk)",
        "  decode: k <= draft_capacity - len + 1: absent -> draft room: its last draft's K and V are not written",
        "  draft.decode rows: absent -> 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 56",
        "  sampler.accept rows: absent -> 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 56",
        "  accepted: absent -> i32[56]",
        "  greedy, up to 5 rounds: absent -> 1 (1, 2), 2 (2, 4), 3 (3, 6), 4 (4, 8), 6 (6, 12), 8 (8, 16)",
    ):
        assert line in lines
    assert [line for line in lines if not line.startswith(" ")] == [
        "options", "memory", "roles", "steps", "programs", "draft loops", "buffers"
    ]  # fmt: skip
    assert "  speculate: 5 -> 0" in drafting.diff(plain)


def test_another_preference_is_seen_in_the_kernels(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_backend("reference")
    copied = tuple(Kernel("linear", f"fast_{k.name}", k.bind) for k in reference.kernels_for("linear"))
    known = {"reference": reference, "second": Backend("second", copied, lambda: None)}
    for module in (compiling, verifying):
        monkeypatch.setattr(module, "load_backend", known.__getitem__)
    one = compile_plan(tiny_model(), options=PlanOptions())
    preference = {"*": "reference", "linear": ["second", "reference"]}
    other = compile_plan(tiny_model(), options=PlanOptions(backend=preference))  # type: ignore[arg-type]
    assert other.backends == ("reference", "second")
    difference = one.diff(other)
    assert "backend: *: reference -> *: reference; linear: second, reference" in difference
    assert "target.decode.4: linear: reference:linear.by_row x4 -> second:fast_linear.by_row x4" in difference, (
        difference
    )
    assert "rotary" not in difference
    assert "buffers" not in difference


def test_a_difference_that_prints_the_same_is_not_hidden(tiny_plan: Plan) -> None:
    first = tiny_plan.programs[0]
    shifted = tuple(dataclasses.replace(p, last=p.last + 1) for p in first.placements)
    other = dataclasses.replace(first, placements=shifted)
    changed = dataclasses.replace(tiny_plan, programs=(other, *tiny_plan.programs[1:]))
    assert tiny_plan.diff(changed) == (
        "programs\n  target.decode.1: same kernels; specs, attributes, parameters or placements differ"
    )
    renamed = dataclasses.replace(tiny_plan, roles=(dataclasses.replace(tiny_plan.roles[0], parameters=()),))
    assert "draft: tiny-draft -> absent" in tiny_plan.diff(renamed)
    bare = dataclasses.replace(
        tiny_plan, roles=(dataclasses.replace(tiny_plan.roles[0], states=()), *tiny_plan.roles[1:])
    )
    assert "target.states: 2 layers of k f32[1, 8], v f32[1, 8]" in tiny_plan.diff(bare)
