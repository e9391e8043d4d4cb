"""The bundled checkpoint pair through Triton's kernels gives the tokens that the reference backend gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[triton]'")

from slotwise import LLM, Sampling

ONE = ("Once upon a time",)
RAGGED = ("Once upon a time", "The", "One day, a little girl named Lily found a needle in her")
Load = Callable[[str, bool], LLM]


@pytest.fixture(scope="module")
def load(stories: Path, stories_draft: Path) -> Load:
    loaded: dict[tuple[str, bool], LLM] = {}

    def get(backend: str, drafts: bool) -> LLM:
        if (backend, drafts) not in loaded:
            loaded[backend, drafts] = LLM(
                stories,
                draft=stories_draft if drafts else None,
                backend=backend,
                dtype="f32",
                capacity=64,
                speculate=3 if drafts else 0,
                max_sequences=3,
                decode_rows=12,
                prefill_chunk=8,
                threads=1,
            )
        return loaded[backend, drafts]

    return get


@pytest.mark.parametrize(
    "prompts",
    [pytest.param(ONE, id="one sequence"), pytest.param(RAGGED, id="three ragged sequences", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("drafts", [False, True], ids=["without drafts", "with drafts"])
@pytest.mark.parametrize(
    "temperature", [pytest.param(0.0, id="greedy"), pytest.param(0.9, id="sampled", marks=pytest.mark.slow)]
)
def test_the_tokens_are_those_of_the_reference_backend(
    load: Load, prompts: tuple[str, ...], drafts: bool, temperature: float
) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=temperature, top_p=0.95, seed=7)
    expected = load("reference", drafts).generate(list(prompts), sampling)
    found = load("cuda_triton", drafts).generate(list(prompts), sampling)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert all(len(out.token_ids) == 6 for out in found)
    if drafts:
        assert sum(out.stats.accepted for out in found) > 0
