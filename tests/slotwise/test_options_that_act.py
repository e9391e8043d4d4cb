"""What is accepted acts: an option that only a drafter reads is refused without one, an unknown keyword always."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, OptionError, PlanError, Sampling, crossvalidate
from slotwise.planning import DRAFTING, plan_model
from slotwise.plans.presets import preset_names

from .commands import Run

SMALL: dict[str, Any] = {"capacity": 48, "max_sequences": 1, "prefill_chunk": 16}
IDLE = [
    ({"speculate": 5}, "speculate 5", "leave speculate out"),
    ({"acceptance": "coupled"}, "acceptance coupled", "leave acceptance out"),
    ({"adaptive": False}, "adaptive False", "leave adaptive out"),
    ({"adaptive": True}, "adaptive True", "leave adaptive out"),
    ({"speculate": 0, "acceptance": "rejection"}, "acceptance rejection", "leave acceptance out"),
    ({"speculate": 2, "adaptive": True}, "speculate 2", "leave speculate and adaptive out"),
]


@pytest.mark.parametrize(("given", "named", "advice"), IDLE, ids=[str(given) for given, _, _ in IDLE])
def test_what_only_a_drafter_reads_is_refused_without_one(
    stories: Path, given: dict[str, Any], named: str, advice: str
) -> None:
    for plan in (lambda: LLM(stories, threads=1, **SMALL, **given), lambda: plan_model(stories, **SMALL, **given)):
        with pytest.raises(OptionError) as caught:
            plan()
        assert str(caught.value).startswith(
            f"{named} says how drafts are made or judged, and nothing drafts: give draft"
        )
        assert str(caught.value).endswith(advice)
    assert plan_model(stories, draft="ngram", **SMALL, **given).options.speculate == given.get("speculate", 5)


def test_no_speculation_may_be_asked_for_without_a_drafter(stories: Path) -> None:
    assert plan_model(stories, speculate=0, **SMALL).draft == "none"


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_that_speaks_of_drafts_serves_without_a_drafter(stories: Path, preset: str) -> None:
    assert plan_model(stories, preset=preset, **SMALL).draft == "none"


def test_a_plan_without_its_drafter_leaves_out_what_was_said_of_it(stories: Path, tmp_path: Path) -> None:
    model = LLM(stories, draft="ngram", speculate=3, adaptive=False, threads=1, **SMALL)
    assert model.plan(draft=None).draft == "none"
    with pytest.raises(OptionError, match="speculate 4 says how drafts"):
        model.plan(draft=None, speculate=4)
    path = tmp_path / "plan.json"
    model.plan(draft=None).save(path)
    saved = LLM(stories, plan=path, threads=1)
    assert saved.plan(prefill_chunk=8).options.prefill_chunk == 8
    assert saved.plan(draft="ngram", speculate=2).options.speculate == 2


def test_the_options_of_drafting_are_options(stories: Path) -> None:
    assert set(DRAFTING) <= set(vars(plan_model(stories, **SMALL).options))


def test_the_command_line_refuses_them_too(run: Run, stories: Path) -> None:
    for words in (("--speculate", 4), ("--acceptance", "rejection"), ("--no-adaptive",)):
        done = run("generate", stories, "--prompt", "Once", *words)
        assert (done.code, done.out) == (2, "")
        assert "nothing drafts: give draft" in done.err


SHORT = (
    "--max-new-tokens",
    6,
    "--capacity",
    48,
    "--max-sequences",
    1,
    "--prefill-chunk",
    16,
    "--threads",
    1,
    "--stats",
)


def test_stats_speak_of_drafts_where_there_were_any(run: Run, stories: Path, stories_draft: Path) -> None:
    plain = run("generate", stories, "--prompt", "Once", *SHORT)
    assert re.search(r"5 verifications; most slots: target \d+; seed", plain.err)
    assert "draft" not in plain.err
    drafted = run("generate", stories, "--draft", stories_draft, "--prompt", "Once", *SHORT)
    assert re.search(r"verifications, \d+ of [1-9]\d* drafts accepted \(\d+%\); most slots", drafted.err)


# Keywords

UNKNOWN: list[tuple[Callable[[Any], object], str]] = [
    (
        lambda llm: LLM("m", capcity=64),
        "LLM has no keyword 'capcity' (did you mean 'capacity'?); there are model, draft",
    ),  # type: ignore[call-arg]
    (lambda llm: LLM("m", speculative=4), "LLM has no keyword 'speculative' (did you mean 'speculate'?)"),  # type: ignore[call-arg]
    (lambda llm: llm.generate("a", samplng=1), "LLM.generate has no keyword 'samplng' (did you mean 'sampling'?)"),
    (
        lambda llm: llm.generate("a", temperature=1),
        "no keyword 'temperature': what is sampled goes into sampling=slotwise.Sampling(temperature=...)",
    ),
    (lambda llm: llm.stream("a", max_tokens=3), "into sampling=slotwise.Sampling(max_new_tokens=...)"),
    (lambda llm: llm.stream("a", promt=3), "LLM.stream has no keyword 'promt' (did you mean 'prompt'?)"),
    (lambda llm: llm.logits(tokens=[3]), "LLM.logits has no keyword 'tokens' (did you mean 'token_ids'?)"),
    (lambda llm: llm.ledger(stesp=3), "LLM.ledger has no keyword 'stesp' (did you mean 'steps'?); there are steps"),
    (lambda llm: llm.record("f", tensor=True), "LLM.record has no keyword 'tensor' (did you mean 'tensors'?)"),
    (lambda llm: crossvalidate(dtype="f32"), "crossvalidate has no keyword 'dtype' (did you mean 'dtypes'?)"),  # type: ignore[call-arg]
    (lambda llm: llm.plan(capcity=3), "option 'capcity' is not known (did you mean 'capacity'?)"),
]


@pytest.mark.parametrize(("ask", "said"), UNKNOWN, ids=[said[:50] for _, said in UNKNOWN])
def test_an_unknown_keyword_is_refused_with_the_nearest(llm: LLM, ask: Callable[[LLM], object], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        ask(llm)
    assert said in str(caught.value)


def test_functions_that_know_their_keywords_show_their_signatures() -> None:
    assert "capacity" in inspect.signature(LLM).parameters
    assert list(inspect.signature(LLM.stream).parameters) == ["self", "prompt", "sampling"]
    assert (LLM.generate.__doc__ or "").startswith("Complete one prompt")


def test_too_many_arguments_are_still_pythons_error(llm: LLM) -> None:
    with pytest.raises(TypeError):
        llm.ledger(1, 2)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        llm.generate()  # type: ignore[call-overload]
    assert llm.generate(prompts="Once", sampling=Sampling(max_new_tokens=1)).finish_reason == "length"


# What is left out


def with_config(stories: Path, folder: Path, **fields: object) -> Path:
    """A copy of a checkpoint whose config.json has other values."""
    copy = shutil.copytree(stories, folder / "copy")
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return copy


@pytest.mark.parametrize(("positions", "capacity"), [(300, 300), (4096, 4096), (5000, 4096)])
def test_capacity_left_out_is_the_models_maximum_and_at_most_4096(
    stories: Path, tmp_path: Path, positions: int, capacity: int
) -> None:
    model = with_config(stories, tmp_path, max_position_embeddings=positions)
    assert plan_model(model, max_sequences=1).target.capacity == capacity
    assert plan_model(model, max_sequences=1, capacity=positions).target.capacity == positions
    with pytest.raises(PlanError, match=f"choose capacity={positions} or less"):
        plan_model(model, capacity=positions + 1)


@pytest.mark.parametrize("window", [None, 64])
def test_a_sliding_window_bounds_no_sequence(stories: Path, tmp_path: Path, window: int | None) -> None:
    model = with_config(
        stories, tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=window
    )
    plan = plan_model(model, max_sequences=1)
    assert (plan.target.capacity, plan.target.pages) == (512, 512 // plan.options.page_size)
    read = {node.attr_dict["window"] for node in plan.programs[0].graph.nodes if node.op == "attention"}
    assert read == {window or 0}
