"""Quantised weights through the API and the command line: the bundled target, in each scheme."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from slotwise import LLM, Plan, Sampling
from slotwise.core.errors import OptionError
from slotwise.core.quantise import SCHEMES

from .commands import Run

STORIES = Path(__file__).resolve().parents[2] / "examples" / "models" / "stories"
PROMPT = "Once upon a time there was a little dog. The little dog"


@functools.cache
def quantised(weights: str, draft: str | None = None) -> LLM:
    return LLM(STORIES, draft=draft, weights=weights, capacity=96, max_sequences=2, decode_rows=8, threads=1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_speculation_changes_nothing_in_any_scheme(scheme: str, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=70, temperature=temperature, seed=3, ignore_eos=True)
    plain = quantised(scheme).generate(PROMPT, sampling)
    drafted = quantised(scheme, "ngram").generate(PROMPT, sampling)
    assert drafted.token_ids == plain.token_ids
    assert drafted.stats.drafted > 0
    assert len(plain.token_ids) == 70


def test_eight_bits_are_nearer_to_the_native_logits_than_four(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    native = llm.logits(ids).log_softmax(-1)
    lost = {
        scheme: float(torch.nn.functional.kl_div(found, native, reduction="batchmean", log_target=True))
        for scheme in SCHEMES
        if (found := quantised(scheme).logits(ids).log_softmax(-1)) is not None
    }
    assert 0 < lost["int8"] < 1e-3
    assert lost["int8"] * 10 < lost["int4"] < 0.3
    assert lost["int8"] * 10 < lost["int4_zp"] < 0.3


def test_a_plan_of_quantised_weights_is_saved_and_run_again(tmp_path: Path) -> None:
    quantised("int4").plan().save(tmp_path / "plan.json")
    again = LLM(STORIES, plan=tmp_path / "plan.json", threads=1)
    assert again.plan() == quantised("int4").plan() == Plan.load(tmp_path / "plan.json")
    sampling = Sampling(max_new_tokens=12)
    assert again.generate(PROMPT, sampling).token_ids == quantised("int4").generate(PROMPT, sampling).token_ids


def test_what_the_plan_would_be_with_other_weights_can_be_asked() -> None:
    plan = quantised("int8").plan()
    native = quantised("int8").plan(weights="native")
    assert (plan.options.weights, native.options.weights) == ("int8", "native")
    assert "weights: int8 -> native" in plan.diff(native)
    assert plan.target.parameter_bytes < native.target.parameter_bytes


def test_what_divides_of_a_draft_model_is_quantised_and_no_draft_changes_a_token(stories_draft: Path) -> None:
    # The bundled draft's inner width is 176: five and a half groups, so the MLP's end stays as it is.
    llm = LLM(STORIES, draft=stories_draft, weights="int8", capacity=96)
    held = {p.value.spec.shape: p.derive for p in llm.plan().role("draft").parameters}
    assert held[64, 176] == ""
    assert "int8.codes" in held.values()
    sampling = Sampling(max_new_tokens=24)
    assert llm.generate(PROMPT, sampling).token_ids == quantised("int8").generate(PROMPT, sampling).token_ids


@pytest.mark.parametrize("value", ["int5", "INT8", "", 8])
def test_a_bad_value_is_refused_with_the_choices(value: object) -> None:
    with pytest.raises(OptionError, match="weights must be one of native, int8, int4, int4_zp, is"):
        LLM(STORIES, weights=value)  # type: ignore[arg-type]


def test_the_commands_take_it(run: Run, tmp_path: Path) -> None:
    shown = run("plan", "show", STORIES, "--weights", "int4_zp", "--save", tmp_path / "plan.json")
    assert shown.code == 0
    assert "int4_zp weights " in shown.out
    assert "numba_cpu:linear_qkv_q x6" in shown.out
    assert run("plan", "verify", tmp_path / "plan.json").code == 0
    diff = run("plan", "diff", STORIES, "--against", "--weights", "int8")
    assert "  weights: native -> int8" in diff.out.splitlines()
    words = ("--prompt", PROMPT, "--max-new-tokens", 8, "--json", "--threads", 1, "--capacity", 64)
    made = run("generate", STORIES, "--weights", "int8", *words)
    assert made.code == 0, made.err
    expected = quantised("int8").generate(PROMPT, Sampling(max_new_tokens=8))
    assert json.loads(made.out.splitlines()[-1])["token_ids"] == list(expected.token_ids)
    wrong = run("generate", STORIES, "--weights", "int5", *words)
    assert wrong.code == 2
    assert "weights must be one of native, int8, int4, int4_zp, is 'int5'" in wrong.err


def test_a_preset_can_ask_for_it(run: Run, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text('weights = "int4"\ncapacity = 64\n')
    shown = run("plan", "show", STORIES, "--preset", tmp_path / "small.toml")
    assert "int4 weights" in shown.out
