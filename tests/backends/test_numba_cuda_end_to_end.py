"""The bundled checkpoint pair through Numba-CUDA kernels gives the tokens that the reference backend gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from slotwise import LLM, Sampling

ONE = ("Once upon a time",)
RAGGED = ("Once upon a time", "The", "One day, a little girl named Lily found a needle in her")
Load = Callable[..., LLM]


@pytest.fixture(scope="module")
def load(stories: Path, stories_draft: Path) -> Load:
    loaded: dict[tuple[str, bool, str], LLM] = {}

    def get(backend: str, drafts: bool, weights: str = "native") -> LLM:
        if (backend, drafts, weights) not in loaded:
            loaded[backend, drafts, weights] = LLM(
                stories,
                draft=stories_draft if drafts else None,
                backend=backend,
                dtype="f32",
                weights=weights,
                capacity=64,
                speculate=3 if drafts else 0,
                max_sequences=3,
                decode_rows=12,
                prefill_chunk=16,
                threads=1,
            )
        return loaded[backend, drafts, weights]

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
    found = load("numba_cuda", drafts).generate(list(prompts), sampling)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert all(len(out.token_ids) == 6 for out in found)
    if drafts:
        assert sum(out.stats.accepted for out in found) > 0


@pytest.mark.parametrize(
    "weights", [pytest.param("int8", marks=pytest.mark.slow), "int4", pytest.param("int4_zp", marks=pytest.mark.slow)]
)
def test_a_plan_of_quantised_weights_runs_whole_and_gives_the_reference_backends_tokens(
    load: Load, weights: str
) -> None:
    """The draft's inner width holds no whole groups, so one of its products stays as it is."""
    found = load("numba_cuda", True, weights)
    chosen = {node.selection.kernel for program in found.plan().programs for node in program.graph.nodes}  # type: ignore[union-attr]
    assert {"numba_cuda:linear_qkv_q.rows", "numba_cuda:linear_gated_q.rows", "numba_cuda:logits_q.rows"} <= chosen
    assert all(name.startswith("numba_cuda:") for name in chosen)
    sampling = Sampling(max_new_tokens=5, temperature=0.0)
    (made,) = found.generate(list(ONE), sampling)
    (expected,) = load("reference", True, weights).generate(list(ONE), sampling)
    assert made.token_ids == expected.token_ids
    assert made.stats.accepted > 0


@pytest.mark.slow
def test_drafts_do_not_change_what_tensor_cores_give(stories: Path, stories_draft: Path) -> None:
    sampling = Sampling(max_new_tokens=5, temperature=0.9, seed=5)
    found = [
        LLM(
            stories,
            draft=draft,
            backend="numba_cuda",
            dtype="bf16",
            capacity=32,
            speculate=3 if draft else 0,
            max_sequences=1,
            decode_rows=4,
            prefill_chunk=8,
        ).generate(list(ONE), sampling)
        for draft in (None, stories_draft)
    ]
    assert [out.token_ids for out in found[0]] == [out.token_ids for out in found[1]]
    assert sum(out.stats.accepted for out in found[1]) > 0
