"""A plan reads the same on every run, and as people expect.

The golden file is a whole small plan; `pytest --update-golden` writes it anew.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from slotwise.core.model import ModelSpec
from slotwise.core.sizes import size
from slotwise.models.load import load_model
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan
from slotwise.plans.show import show_plan, show_program
from slotwise.slots.binding import bind_decode, bind_prefill
from slotwise.slots.show import show_binding
from slotwise.slots.step import VARIABLES, decode_step, prefill_step

PRINT_PLAN = """
import sys
from slotwise.models.load import load_model
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
plan = compile_plan(load_model(sys.argv[1]).spec, draft="ngram", options=PlanOptions(capacity=40, decode_rows=8))
print(plan, plan.to_json())
"""


def test_a_small_plan_reads_as_its_golden_file(tiny_plan: Plan, golden: Callable[[str, str], None]) -> None:
    programs = {program.name: program for program in tiny_plan.programs}
    shown = [programs[name] for name in ("target.decode.3", "draft.prefill.16", "sampler.sample.1", "sampler.accept.3")]
    golden("tiny_plan.txt", "\n\n".join([str(tiny_plan), *map(show_program, shown)]) + "\n")


def test_two_compilations_print_the_same(tiny_model: Callable[..., ModelSpec]) -> None:
    one, other = (compile_plan(tiny_model(), draft="ngram", options=PlanOptions(capacity=40)) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert show_plan(one, programs=True) == show_plan(other, programs=True)
    assert one.to_json() == other.to_json()


def test_two_processes_print_the_same(stories: Path) -> None:
    options = PlanOptions(capacity=40, decode_rows=8)
    plan = compile_plan(load_model(stories).spec, draft="ngram", options=options)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRINT_PLAN, str(stories)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{plan} {plan.to_json()}\n"


def test_rejected_kernels_are_shown_on_demand(tiny_plan: Plan) -> None:
    program = tiny_plan.programs[0]
    assert "choice 1 for *" in show_program(program, rejections=True)
    assert "choice 1" not in show_program(program)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 20, "5.0 MiB"), (3 << 30, "3.00 GiB")]
)
def test_sizes_are_printed_as_people_write_them(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize("draft", ["none", "ngram", "model"])
def test_every_variable_of_a_step_is_explained(draft: str) -> None:
    for step in (decode_step(draft, "coupled"), prefill_step("target")):
        spans = [edge for op in step.ops for span in op.spans for edge in (span.begin, span.end)]
        ends = [end for op in step.ops for end in op.ends]
        names = {name for e in (*spans, *ends, *(limit.bound for limit in step.limits)) for name, _ in e.terms}
        assert names <= VARIABLES.keys()


def test_a_bound_step_reads_as_a_story() -> None:
    lanes, length = np.array([2, 0]), np.array([4092, 7])
    known = {
        "len": length,
        "speculate": np.array([5, 0]),
        "budget": np.array([10, 90]),
        "room": 2**40,
        "capacity": 4096,
        "rotary": 4096,
        "draft_capacity": 4096,
    }
    filled = np.array([4091, 6])
    binding = bind_decode(decode_step("model", "coupled"), 3, (11, 12), lanes, length, np.array([3, 0]), filled, known)
    assert show_binding(binding, {2: 3}) == "\n".join(
        [
            "step 3 decode  seq=11 lane=2 len=4092",
            "  %0 = reserve target[4091..4095) draft[4091..4094)  "
            "# k = min(speculate 5, target room 3, rotary table 4, budget 9, draft room 5) = 3",
            "  %1 = draft   draft[4091..4094) -> 3 tokens",
            "  %2 = verify  target[4091..4095) rows=4",
            "  %3 = accept  coupled -> 3 tokens kept, of 3 drafts and the target's own",
            "  %4 = commit  target..4094 draft..4094 ; release target 1 draft 0",
            "step 3 decode  seq=12 lane=0 len=7",
            "  %0 = reserve target[6..7)  "
            "# k = min(speculate 0, target room 4088, rotary table 4089, budget 89, draft room 4090) = 0",
            "  %1 = verify  target[6..7) rows=1",
        ]
    )
    chunk = bind_prefill(prefill_step("target"), 4, 11, "target", 1, known=20, begin=5, chunk=8)
    assert show_binding(chunk) == "\n".join(
        [
            "step 4 prefill target  seq=11 lane=1 len=20",
            "  %0 = reserve target[5..13)",
            "  %1 = prefill target[5..13)",
            "  %2 = commit  target[5..13)",
        ]
    )


def test_a_binding_cannot_be_changed() -> None:
    length = np.array([7])
    step = decode_step("none", "coupled")
    binding = bind_decode(step, 1, (1,), np.array([0]), length, np.array([0]), None)
    length[0] = 9
    span = binding.span("target")
    assert span is not None
    assert (binding.length.tolist(), span.begin.tolist(), span.end.tolist(), span.rows) == ([7], [6], [7], 1)
    assert binding.span("draft") is None
    for array in (binding.lanes, binding.length, binding.width, span.lanes, span.begin, span.end):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
