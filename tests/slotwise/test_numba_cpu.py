"""The bundled pair on `numba_cpu`: the reference's tokens, whatever drafts, shares the batch, or is mixed in."""

from __future__ import annotations

from pathlib import Path

import pytest

import slotwise
from slotwise.core.backend import load_backend
from slotwise.core.printer import format_graph

if load_backend("numba_cpu").unavailable() is not None:
    pytest.skip(str(load_backend("numba_cpu").unavailable()), allow_module_level=True)

PROMPTS = ["Once upon a time", "The dog", "Lily and her mother went to the park. They saw a big"]
SAMPLINGS = [
    slotwise.Sampling(max_new_tokens=40),
    slotwise.Sampling(max_new_tokens=40, temperature=0.8, seed=7),
    slotwise.Sampling(max_new_tokens=40, temperature=1.1, top_k=40, top_p=0.9, min_p=0.01, seed=3),
]


@pytest.fixture(scope="module")
def expected(stories: Path) -> list[list[tuple[int, ...]]]:
    """The reference's tokens in float32, where no near-tie is decided by rounding: one list a sampling."""
    llm = slotwise.LLM(stories, backend="reference", dtype="float32", capacity=128)
    return [[llm.generate(prompt, sampling).token_ids for prompt in PROMPTS] for sampling in SAMPLINGS]


@pytest.mark.parametrize("draft", [None, "model", "ngram"])
@pytest.mark.parametrize("backend", ["numba_cpu", {"*": "numba_cpu", "attention": "reference", "greedy": "reference"}])
def test_tokens_are_the_references_alone_and_in_a_ragged_batch(
    stories: Path, stories_draft: Path, expected: list[list[tuple[int, ...]]], draft: str | None, backend: object
) -> None:
    drafter = stories_draft if draft == "model" else draft
    llm = slotwise.LLM(stories, draft=drafter, backend=backend, dtype="float32", capacity=128)  # type: ignore[arg-type]
    for sampling, tokens in zip(SAMPLINGS, expected, strict=True):
        assert llm.generate(PROMPTS[0], sampling).token_ids == tokens[0]
        assert [out.token_ids for out in llm.generate(PROMPTS, sampling)] == tokens


def test_the_number_of_threads_changes_no_token(stories: Path, stories_draft: Path) -> None:
    found = []
    for threads in (1, 2, 3):
        llm = slotwise.LLM(stories, draft=stories_draft, backend="numba_cpu", capacity=128, threads=threads)
        found.append([out.token_ids for out in llm.generate(PROMPTS, SAMPLINGS[1])])
    slotwise.LLM(stories, backend="numba_cpu", capacity=128, threads=1)  # one thread again for the tests after this
    assert found[0] == found[1] == found[2]


def test_a_plan_names_the_default_backend_for_every_call(stories: Path) -> None:
    plan = slotwise.LLM(stories, capacity=64).plan()
    assert plan.backends == ("numba_cpu",)
    assert plan.prefill_is_invariant
    assert all(p.layout == "octets" for p in plan.target.parameters if len(p.value.spec.shape) == 2 and p.word)
    assert "octets" in format_graph(plan.programs[0].graph)
