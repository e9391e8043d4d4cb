"""The bundled pair with vocabularies padded differently, as Qwen2.5's are: both ways, tokens are the target's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotwise import LLM, Sampling
from slotwise.core.errors import CheckpointError
from slotwise.plans.plan import Plan

TABLE = "model.embed_tokens.weight"
REAL = 2048
PROMPTS = ["Once upon a time there was a little dog.", "Lily had a red ball. She", "The sun was"]
SETTINGS: dict[str, Any] = {"capacity": 96, "max_sequences": 3, "threads": 1, "progress": False}


def padded(source: Path, folder: Path, rows: int) -> Path:
    """A copy whose vocabulary is padded to `rows` ids: their embeddings are zero, and so are their logits."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    table = torch.zeros(rows, weights[TABLE].shape[1], dtype=weights[TABLE].dtype)
    table[:REAL] = weights[TABLE]
    save_file({**weights, TABLE: table}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return folder


@pytest.fixture(scope="module")
def wide(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padded(stories, tmp_path_factory.mktemp("padded") / "stories", REAL + 77)


@pytest.fixture(scope="module")
def wide_draft(stories_draft: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return padded(stories_draft, tmp_path_factory.mktemp("padded") / "stories-draft", REAL + 128)


Pair = Callable[[pytest.FixtureRequest], tuple[Path, Path]]
PAIRS: dict[str, tuple[str, str]] = {
    "the target is padded further": ("wide", "stories_draft"),
    "the draft model is padded further": ("stories", "wide_draft"),
    "both are padded": ("wide", "wide_draft"),
}


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("pair", PAIRS)
def test_tokens_are_those_without_a_draft_model(pair: str, acceptance: str, request: pytest.FixtureRequest) -> None:
    target, draft = (request.getfixturevalue(name) for name in PAIRS[pair])
    plain = LLM(target, **SETTINGS)
    drafting = LLM(target, draft=draft, acceptance=acceptance, **SETTINGS)
    temperatures = [0.0, 0.8] if acceptance == "coupled" else [0.0]
    for temperature in temperatures:
        sampling = Sampling(max_new_tokens=40, temperature=temperature, seed=5, ignore_eos=True)
        for mine, own in zip(drafting.generate(PROMPTS, sampling), plain.generate(PROMPTS, sampling), strict=True):
            assert mine.token_ids == own.token_ids
            assert mine.stats.drafted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("pair", PAIRS)
def test_drafts_are_accepted_as_often_as_without_padding(
    pair: str, temperature: float, drafting: LLM, request: pytest.FixtureRequest
) -> None:
    target, draft = (request.getfixturevalue(name) for name in PAIRS[pair])
    sampling = Sampling(max_new_tokens=60, temperature=temperature, seed=5, ignore_eos=True, banned_tokens=())
    usual = drafting.generate(PROMPTS, sampling)
    grown = LLM(target, draft=draft, **SETTINGS).generate(PROMPTS, sampling)
    rates = [sum(c.stats.accepted for c in group) / sum(c.stats.drafted for c in group) for group in (grown, usual)]
    assert rates[0] > 0.8 * rates[1] > 0.2


def test_ids_that_are_padding_are_served_without_drafts(wide: Path, stories_draft: Path) -> None:
    drafting, plain = LLM(wide, draft=stories_draft, **SETTINGS), LLM(wide, **SETTINGS)
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    prompts = [[5, REAL + 3, 9], [5, 6, 9]]
    found = drafting.generate(prompts, sampling)
    assert [c.token_ids for c in found] == [c.token_ids for c in plain.generate(prompts, sampling)]
    assert found[0].stats.drafted == 0
    assert found[1].stats.drafted > 0


def test_a_plan_of_a_padded_pair_is_saved_and_run_again(stories: Path, wide_draft: Path, tmp_path: Path) -> None:
    first = LLM(stories, draft=wide_draft, **SETTINGS)
    assert first.plan().role("draft").vocab_size == REAL, "the draft model's last ids are left out"
    first.plan().save(tmp_path / "plan.json")
    again = LLM(stories, draft=wide_draft, plan=tmp_path / "plan.json", threads=1, progress=False)
    assert again.plan() == first.plan() == Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_pairs_are_padded_alike(weights: str, wide: Path, stories_draft: Path, wide_draft: Path) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=0.7, seed=2, ignore_eos=True)
    plain = LLM(wide, weights=weights, **SETTINGS).generate(PROMPTS[0], sampling)
    for draft in (stories_draft, wide_draft):
        drafted = LLM(wide, draft=draft, weights=weights, **SETTINGS).generate(PROMPTS[0], sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.drafted > 0


def test_another_token_map_is_refused_with_the_first_ids_that_differ(
    wide: Path, stories_draft: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories_draft, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    swaps = {300: 301, 301: 300, 900: 901, 901: 900}
    tokenizer["model"]["vocab"] = {t: swaps.get(i, i) for t, i in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(CheckpointError, match=r"token id 300 is .*; 301, 900, 901 differ too"):
        LLM(wide, draft=other, **SETTINGS)


def test_a_token_that_only_the_wider_model_can_have_may_be_named_by_its_tokenizer_alone(
    wide: Path, stories_draft: Path, tmp_path: Path
) -> None:
    named = tmp_path / "named"
    shutil.copytree(wide, named)
    tokenizer = json.loads((named / "tokenizer.json").read_text("utf-8"))
    extra = {**tokenizer["added_tokens"][0], "id": REAL, "content": "<|turn|>", "special": True}
    tokenizer["added_tokens"].append(extra)
    (named / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    drafting = LLM(named, draft=stories_draft, **SETTINGS)
    sampling = Sampling(max_new_tokens=12, ignore_eos=True)
    assert drafting.generate("The sun<|turn|>was", sampling).stats.drafted == 0
    assert drafting.generate("The sun was", sampling).stats.drafted > 0
