"""`rejection` keeps the target's distribution: what comes out is counted and held against exact probabilities.

Seeds are fixed, so a statistic is the same number on every run; its bound is what a right rule exceeds once in 10^5.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from slotwise.engine.request import Completion, Request
from slotwise.proving.interpret import interpret

from .tiny import DraftChoice, TinyModel, alone, outcome, prompt_of, request, run, tiny_engine, tiny_model

VOCAB = 7
NEW = 4  # the first comes from the prompt; then at most two drafts and the target's own
RUNS = 300
MODEL = tiny_model(7, vocab=VOCAB)
PROMPT = (1, 0, 1, 2, 1, 3, 1, 4, 1, 5, 1, 6, 1, 1)  # whatever comes next has followed a 1 before: n-grams are found
PAIRS = (slice(0, 2), slice(1, 3), slice(2, 4))
DRAFTS: dict[str, DraftChoice] = {
    "ngram": "ngram",
    "near model": MODEL.draft(0.3),
    "far model": MODEL.draft(2.0),
}


def next_token_probabilities(model: TinyModel, tokens: tuple[int, ...], sampling: dict[str, Any]) -> Any:
    """Softmax after temperature and top-k, by the model's graph in float64 arithmetic of its logits."""
    graph, rows = model.spec.graph, torch.arange(len(tokens), dtype=torch.int32)
    weights = {
        p.value.name: model.weights.tensor(p.value.name, p.value.spec.sized({"M": model.spec.max_positions}))
        for p in graph.parameters
    }
    inputs = {"token_ids": torch.tensor(tokens).int(), "positions": rows, "logit_rows": rows[-1:]}
    z = interpret(graph, {**weights, **inputs})[0][0].double().numpy() / sampling["temperature"]
    if sampling.get("top_k"):
        z[z < np.sort(z)[-sampling["top_k"]]] = -np.inf
    p = np.exp(z - z.max())
    return p / p.sum()


def exact_distribution(sampling: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """The probability of every outcome of NEW tokens after the prompt."""
    found = {(): 1.0}
    for _ in range(NEW):
        longer: dict[tuple[int, ...], float] = {}
        for outcome_so_far, mass in found.items():
            p = next_token_probabilities(MODEL, PROMPT + outcome_so_far, sampling)
            for token in np.flatnonzero(p):
                longer[(*outcome_so_far, int(token))] = mass * float(p[token])
        found = longer
    return found


def chi_square(outcomes: list[tuple[int, ...]], exact: dict[tuple[int, ...], float], at: slice) -> tuple[float, int]:
    """Pearson's statistic of the tokens `at` and its degrees of freedom; outcomes expected under 8 times are pooled."""
    counts, expected = Counter(tokens[at] for tokens in outcomes), Counter[tuple[int, ...]]()
    for tokens, p in exact.items():
        expected[tokens[at]] += p  # type: ignore[assignment]
    total = len(outcomes)
    assert set(counts) <= set(expected), "an outcome that cannot be"
    rare = [key for key, p in expected.items() if p * total < 8]
    cells = [(counts[key], p * total) for key, p in expected.items() if p * total >= 8]
    if rare:
        cells.append((sum(counts[key] for key in rare), sum(expected[key] for key in rare) * total))
    return sum((seen - mean) ** 2 / mean for seen, mean in cells if mean > 0), len(cells) - 1


def upper_bound(freedom: int) -> float:
    """What chi-square with that many degrees of freedom exceeds about once in 10^5 (Wilson and Hilferty, 1931)."""
    z = 4.27
    return float(freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3)


def draws(draft: DraftChoice, sampling: dict[str, Any], runs: int = RUNS) -> list[Completion]:
    """`runs` completions with seeds 0, 1, 2, ..., as a batch that never stops."""
    engine = tiny_engine(
        MODEL, draft, acceptance="rejection", adaptive=False, speculate=2, max_sequences=16, decode_rows=48, page_size=7
    )
    wanted = [request(PROMPT, NEW, seed=seed, logprobs=None, **sampling) for seed in range(runs)]
    return run(engine, wanted)


SAMPLINGS = [{"temperature": 1.0}, {"temperature": 1.2, "top_k": 5}]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
def test_rejection_keeps_the_distribution(draft: str, sampling: dict[str, Any]) -> None:
    assert_kept(draft, sampling, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("draft", DRAFTS)
def test_rejection_keeps_the_distribution_over_many_draws(draft: str, sampling: dict[str, Any]) -> None:
    assert_kept(draft, sampling, 10 * RUNS)


def assert_kept(draft: str, sampling: dict[str, Any], runs: int) -> None:
    completions = draws(DRAFTS[draft], sampling, runs)
    accepted, drafted = (sum(getattr(c.stats, name) for c in completions) for name in ("accepted", "drafted"))
    assert 0 < accepted < drafted
    for at in PAIRS:
        statistic, freedom = chi_square([c.token_ids for c in completions], exact_distribution(sampling), at)
        assert freedom >= 5
        assert statistic < upper_bound(freedom)


def test_the_statistic_sees_another_temperature() -> None:
    # The bound is worth something only if a wrong distribution exceeds it.
    expected = exact_distribution({"temperature": 1.0})
    outcomes = [c.token_ids for c in draws(DRAFTS["near model"], {"temperature": 1.5})]
    found = [chi_square(outcomes, expected, at) for at in PAIRS]
    assert any(statistic > upper_bound(freedom) for statistic, freedom in found)


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_rejection_gives_the_greedy_tokens(draft: str) -> None:
    for seed in range(4):
        one = request(prompt_of(9, seed, VOCAB), 30)
        (completion,) = run(tiny_engine(MODEL, DRAFTS[draft], acceptance="rejection", adaptive=False), [one])
        assert completion.token_ids == alone(MODEL, one).token_ids


def test_a_draft_model_that_is_the_target_is_always_accepted_by_both_rules() -> None:
    for acceptance in ("coupled", "rejection"):
        engine = tiny_engine(MODEL, MODEL, acceptance=acceptance, adaptive=False, speculate=3, invariant_prefill=True)
        for completion in run(engine, [request(PROMPT[:4], 21, temperature=1.0, seed=seed) for seed in range(3)]):
            assert completion.stats.accepted == completion.stats.drafted
            # One token from the prompt, then five runs of four.
            assert completion.stats.verifications == 5


def test_rejection_repeats_itself_for_a_seed_and_differs_between_seeds() -> None:
    wanted: list[Request] = [request(PROMPT, 20, temperature=1.0, seed=seed) for seed in (1, 2)]
    first, second = (
        run(tiny_engine(MODEL, DRAFTS["near model"], acceptance="rejection", adaptive=False), wanted) for _ in range(2)
    )
    assert [outcome(c) for c in first] == [outcome(c) for c in second]
    assert first[0].token_ids != first[1].token_ids


def test_rejection_gives_each_sequence_of_a_batch_what_it_gives_it_alone() -> None:
    # Same drafter, same widths: then the rule depends on its own sequence only.
    wanted = [request(prompt_of(5 + n, n, VOCAB), 15, temperature=1.0, seed=n) for n in range(4)]
    together = run(tiny_engine(MODEL, DRAFTS["near model"], acceptance="rejection", adaptive=False), wanted)
    for one, completion in zip(wanted, together, strict=True):
        (single,) = run(tiny_engine(MODEL, DRAFTS["near model"], acceptance="rejection", adaptive=False), [one])
        assert outcome(single) == outcome(completion)


def test_every_outcome_of_the_small_vocabulary_has_its_probability() -> None:
    # The yardstick itself: probabilities over all outcomes add up to one.
    expected = exact_distribution({"temperature": 1.0})
    assert len(expected) == len(list(itertools.product(range(VOCAB), repeat=NEW)))
    total: npt.NDArray[np.float64] = np.array(list(expected.values()))
    assert abs(float(total.sum()) - 1) < 1e-12
