"""On a GPU: the engine through CUDA graphs gives the reference backend's tokens, and memory is planned before load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[triton]'")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU and a PyTorch with CUDA", allow_module_level=True)

from slotwise import LLM, Sampling
from slotwise.core.backend import load_backend
from slotwise.core.errors import PlanError

PROMPTS = ["Once upon a time", "The", "One day, a little girl named Lily found a needle in her"]


BACKENDS = ["cuda_triton", "numba_cuda", {"*": "cuda_triton", "attention": "numba_cuda"}]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=["cuda_triton", "numba_cuda", "mixed"])
def test_tokens_are_those_of_the_reference(
    stories: Path, stories_draft: Path, drafts: bool, temperature: float, backend: str | dict[str, str]
) -> None:
    sampling = Sampling(max_new_tokens=40, temperature=temperature, top_p=0.95, seed=7)
    draft = stories_draft if drafts else None
    expected, found = (
        LLM(stories, draft=draft, backend=name, dtype="f32", capacity=128, max_sequences=3).generate(PROMPTS, sampling)
        for name in ("reference", backend)
    )
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]


@pytest.mark.parametrize("draft", ["ngram", "model"])
@pytest.mark.parametrize("backend", BACKENDS, ids=["cuda_triton", "numba_cuda", "mixed"])
def test_drafts_never_change_bf16_tokens(
    stories: Path, stories_draft: Path, draft: str, backend: str | dict[str, str]
) -> None:
    sampling = Sampling(max_new_tokens=80, temperature=0.8, seed=3)
    drafter = stories_draft if draft == "model" else draft
    alone = LLM(stories, backend=backend, capacity=128).generate(PROMPTS, sampling)
    drafted = LLM(stories, draft=drafter, backend=backend, capacity=128).generate(PROMPTS, sampling)
    assert [out.token_ids for out in drafted] == [out.token_ids for out in alone]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("backend", BACKENDS, ids=["cuda_triton", "numba_cuda", "mixed"])
def test_steps_started_ahead_give_the_tokens_of_steps_waited_for(
    stories: Path, temperature: float, backend: str | dict[str, str]
) -> None:
    # Stops and arrivals at other times for each: budgets differ, and four prompts share three lanes.
    samplings = [Sampling(max_new_tokens=20 + 9 * n, temperature=temperature, seed=n, stop=["."]) for n in range(4)]
    prompts = [*PROMPTS, "A dog"]
    ahead, waited = (
        LLM(stories, backend=backend, capacity=128, max_sequences=3, overlap=overlap) for overlap in (None, False)
    )
    assert ahead.engine.executor.stream is not None
    assert waited.engine.executor.stream is None
    expected = waited.generate(prompts, samplings)
    flights: list[object] = []
    settle = ahead.engine._settle
    ahead.engine._settle = lambda *given, **how: (flights.append(how), settle(*given, **how))[1]  # type: ignore
    for _ in range(3):
        found = ahead.generate(prompts, samplings)
        assert [(out.token_ids, out.finish_reason) for out in found] == [
            (out.token_ids, out.finish_reason) for out in expected
        ]
    assert ahead.engine._overlap.last_error is None
    assert flights.count({"is_committed": True}) > len(flights) / 2


def test_both_backends_share_graphs() -> None:
    assert load_backend("cuda_triton").chain is load_backend("numba_cuda").chain is not None


def test_kernels_replay_from_a_graph() -> None:
    chain = load_backend("cuda_triton").chain
    assert chain is not None
    x = torch.zeros(4, device="cuda")
    launch = chain([lambda: x.add_(1), lambda: x.mul_(2)], None)
    x.fill_(3)
    launch()
    launch()
    assert x.tolist() == [18, 18, 18, 18]


def test_a_plan_beyond_the_gpus_free_memory_is_refused_with_the_pages_that_fit(stories: Path) -> None:
    with pytest.raises(PlanError, match=r"has free .* at most \d+ fit"):
        LLM(stories, backend="cuda_triton", capacity=512, pages=2**26, max_sequences=2**16)
