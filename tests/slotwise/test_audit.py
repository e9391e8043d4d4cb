"""The audit reads machine code, holds it to a budget, and says so with its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[triton]'")

from slotwise.audit.budget import Rule, broken_rules, load_budget
from slotwise.audit.calls import calls_of
from slotwise.audit.cubin import CHIPS, AuditError, KernelFacts, facts_of
from slotwise.audit.report import DTYPES, Audit
from slotwise.backends.cuda_triton.ahead import GENERATIONS, compile_call
from slotwise.backends.numba_cuda import ahead as numba_cuda
from slotwise.core.backend import Kernel, load_backend
from slotwise.core.specs import DType

from .commands import Run

KERNELS = tuple(kernel.name for kernel in load_backend("cuda_triton").kernels)
NUMBA_KERNELS = load_backend("numba_cuda").kernels


def _facts(kernel: str, op: str, dtype: DType, generation: str) -> KernelFacts:
    call = next(iter(calls_of(op, dtype)))
    return facts_of(next(iter(compile_call(kernel, call, generation))))


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_keeps_the_budget(kernel: str, generation: str) -> None:
    findings = list(Audit("cuda_triton", [generation], load_budget(), [kernel]).run())
    assert findings
    for finding in findings:
        assert not finding.broken, (str(finding.facts.code.configuration), finding.broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kernel"), list(enumerate(NUMBA_KERNELS)), ids=[kernel.name for kernel in NUMBA_KERNELS]
)
def test_a_kernel_of_numba_cuda_keeps_the_budget(place: int, kernel: Kernel) -> None:
    """Its first call, on one generation; `slotwise audit --backend numba_cuda` compiles them all."""
    generation = numba_cuda.GENERATIONS[place % len(numba_cuda.GENERATIONS)]
    call = next(c for dtype in DTYPES for c in calls_of(kernel.op, dtype) if c.dtype is dtype and not kernel.refuses(c))
    audited = list(numba_cuda.compile_call(kernel.name, call, generation))
    assert audited
    for code in audited:
        assert not broken_rules("numba_cuda", facts_of(code), load_budget()), code.function


@pytest.mark.slow
@pytest.mark.parametrize(("op", "generation"), [("linear_qkv", "sm_120"), ("logits", "sm_90")])
def test_a_long_epilogue_leaves_the_sums_of_a_prefill_product_in_registers(op: str, generation: str) -> None:
    call = next(call for call in calls_of(op, DType.BF16) if op != "logits" or call.attrs["softcap"])
    (code,) = numba_cuda.compile_call(f"{op}.tiles", call, generation)
    assert facts_of(code).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["sm_80", "sm_120"])
def test_capped_scores_leave_the_sums_of_prefill_attention_in_registers(generation: str) -> None:
    calls = calls_of("attention", DType.BF16)
    call = next(call for call in calls if call.attrs["softcap"] and not call.attrs["window"])
    (code,) = numba_cuda.compile_call("attention.tiles", call, generation)
    assert facts_of(code).spills == 0


def test_numba_cuda_is_audited_as_triton_is() -> None:
    findings = list(Audit("numba_cuda", ["sm_90"], load_budget(), ["add.flat"]).run())
    assert {finding.facts.code.dtype for finding in findings} == {"bf16", "f16", "f32"}
    for finding in findings:
        assert not finding.broken
        assert finding.facts.widest_load == finding.facts.widest_store == 16
        assert 8 <= finding.facts.registers <= 64
    demanding = (Rule("w", max_registers=1),)
    assert broken_rules("numba_cuda", findings[0].facts, demanding)


def test_numba_cuda_compiles_tensor_core_instructions() -> None:
    call = next(iter(calls_of("linear", DType.BF16)))
    (code,) = numba_cuda.compile_call("linear.rows", call, "sm_80")
    assert {name.split(".")[0] for name in facts_of(code).tensor} == {"HMMA"}


def test_registers_widths_and_instructions_are_read_off_the_cubin() -> None:
    facts = _facts("add.flat", "add", DType.BF16, "sm_80")
    assert 8 <= facts.registers <= 64
    assert facts.widest_load == facts.widest_store == 16
    assert facts.spills == facts.stack_bytes == 0
    assert not facts.tensor
    assert 20 < facts.instructions < 1000
    assert facts.occupancy == 1.0


def test_tensor_core_instructions_are_named() -> None:
    facts = _facts("linear.rows", "linear", DType.BF16, "sm_80")
    assert {name.split(".")[0] for name in facts.tensor} == {"HMMA"}
    assert facts.shared_bytes > 0
    assert facts.widest_load == 16


def test_occupancy_is_what_registers_shared_memory_and_threads_leave() -> None:
    facts = _facts("linear.rows", "linear", DType.BF16, "sm_80")
    blocks = CHIPS["sm_80"].shared_bytes // (facts.shared_bytes + 1024)
    assert facts.occupancy <= blocks * facts.code.threads / 32 / 64
    assert facts.occupancy > 0


def test_each_limit_of_a_rule_can_be_broken() -> None:
    facts = _facts("add.flat", "add", DType.BF16, "sm_80")
    for rule, words in (
        (Rule("w", max_registers=1), "registers, at most 1"),
        (Rule("w", max_instructions=1), "instructions, at most 1"),
        (Rule("w", max_spills=-1), "0 spills"),
        (Rule("w", min_occupancy=1.5), "occupancy"),
        (Rule("w", min_load_bytes=32), "16 bytes in the widest load"),
        (Rule("w", min_store_bytes=32), "16 bytes in the widest store"),
        (Rule("w", tensor_any=("HMMA",)), "no tensor-core instruction of HMMA"),
    ):
        (found,) = broken_rules("cuda_triton", facts, (rule,))
        assert words in found
        assert not broken_rules("cuda_triton", facts, (Rule("w", kernels=("other.*",), max_registers=1),))
    tensor = _facts("linear.rows", "linear", DType.BF16, "sm_80")
    (found,) = broken_rules("cuda_triton", tensor, (Rule("w", tensor_only=("HGMMA",)),))
    assert "HMMA where only HGMMA" in found


def test_a_budget_with_a_mistake_is_refused(tmp_path: Path) -> None:
    for text, words in (
        ("[[rule]\n", "cannot be read"),
        ("[limits]\n", "must hold"),
        ("[[rule]]\nmax_spills = 0\n", "no `why`"),
        ('[[rule]]\nwhy = "w"\nmax_spils = 0\n', "max_spils unknown"),
        ('[[rule]]\nwhy = "w"\nkernels = "x"\n', "not of the right kind"),
    ):
        (tmp_path / "budget.toml").write_text(text)
        with pytest.raises(AuditError, match=words):
            load_budget(tmp_path / "budget.toml")


def test_the_command_ends_with_0_inside_the_budget_and_1_outside(run: Run, tmp_path: Path) -> None:
    arguments = ("audit", "--gpu", "sm_90", "--kernel", "add.flat")
    inside = run(*arguments)
    assert inside.code == 0, inside.err
    assert "add_elements" in inside.out
    (tmp_path / "strict.toml").write_text('[[rule]]\nwhy = "a test"\nmax_registers = 1\n')
    outside = run(*arguments, "--budget", tmp_path / "strict.toml", "--json")
    assert outside.code == 1
    assert "registers, at most 1 allowed (a test)" in outside.err
    assert all(json.loads(line)["broken"] for line in outside.out.splitlines())


def test_unknown_names_are_refused_with_the_known_ones(run: Run) -> None:
    assert "there are sm_80" in run("audit", "--gpu", "sm_70").err
    assert "did you mean" in run("audit", "--kernel", "add.flt").err
    assert "no machine code" in run("audit", "--backend", "reference").err
