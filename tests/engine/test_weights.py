"""Loading: what is shared, what is read once, what is refused; and generating with quantised weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, PlanError
from slotwise.core.graph import Parameter, Value
from slotwise.core.quantise import SCHEMES, dequantise, quantise
from slotwise.core.specs import DType, TensorSpec
from slotwise.engine.weights import ALIGNED, load_weights

from .tiny import DraftChoice, TinyModel, TinyWeights, alone, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(3, layers=2, vocab=40, hidden=32, inner=64)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}


class Counting:
    """Two matrices, and how often each was asked for."""

    def __init__(self, **changed: torch.Tensor) -> None:
        rng = torch.Generator().manual_seed(6)
        self.tensors = {name: torch.randn(rows, 64, generator=rng) for name, rows in (("a", 3), ("b", 4))} | changed
        self.asked: Counter[str] = Counter()

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """See `WeightSource.tensor`."""
        self.asked[name] += 1
        return self.tensors[name]


def derived(scheme: str, sources: tuple[str, ...], rows: int, prefix: str = "w") -> tuple[Parameter, ...]:
    return tuple(
        Parameter(Value(f"{prefix}.{part}", spec, "parameter"), sources, f"{scheme}.{part}")
        for part, spec in SCHEMES[scheme].specs(rows, 64).items()
    )


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_the_parts_are_those_of_the_joined_sources_each_read_once(scheme: str) -> None:
    source = Counting()
    found = load_weights(derived(scheme, ("a", "b"), 7), source, "target", None)
    joined = quantise(torch.cat([source.tensors["a"], source.tensors["b"]]), scheme)
    for name, wanted in zip(("w.codes", "w.scale", "w.offset"), joined, strict=True):
        assert (wanted is None) == (name not in found)
        assert wanted is None or torch.equal(found[name], wanted)
    assert source.asked == {"a": 1, "b": 1}


def test_parameters_of_one_derivation_share_their_tensors_and_others_do_not() -> None:
    plain = Parameter(Value("p", TensorSpec(DType.F32, (3, 64)), "parameter"), ("a",))
    twice = (*derived("int8", ("a",), 3), plain, *derived("int8", ("a",), 3, "v"), *derived("int4", ("a",), 3, "u"))
    source = Counting()
    found = load_weights(twice, source, "target", None)
    assert found["w.codes"] is found["v.codes"]
    assert found["w.scale"] is found["v.scale"]
    assert found["u.codes"].dtype == torch.uint8
    assert not torch.equal(found["u.scale"], found["w.scale"])
    assert found["p"] is source.tensors["a"]
    assert source.asked == {"a": 3}  # as it is, for int8, for int4


def test_progress_counts_every_parameter() -> None:
    seen: list[tuple[str, int, int]] = []
    load_weights(derived("int4_zp", ("a",), 3), Counting(), "draft", lambda *report: seen.append(report))
    assert seen == [("loading draft", n, 3) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"a": torch.zeros(9, 64)}, r"w\.codes must be i8\[7, 64\].*gives \[13, 64\].*from a, b"),
        ({"a": torch.zeros(3, 32)}, r"w\.codes must be i8\[7, 64\].*\[3, 32\] and \[4, 64\]"),
        ({"a": torch.zeros(3, 33), "b": torch.zeros(4, 33)}, r"w\.codes must be i8\[7, 64\].*\[7, 33\]"),
        ({"a": torch.zeros(3), "b": torch.zeros(4)}, r"w\.codes must be i8\[7, 64\].*\[3\] and \[4\]"),
    ],
)
def test_sources_of_another_shape_are_refused_by_name(changed: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(PlanError, match=f"target: weight {message}.*another checkpoint"):
        load_weights(derived("int8", ("a", "b"), 7), Counting(**changed), "target", None)


def test_a_weight_that_cannot_be_quantised_is_named_with_its_role() -> None:
    source = Counting()
    source.tensors["b"][2, 5] = float("nan")
    with pytest.raises(CheckpointError, match="draft: b holds a value that is not a finite"):
        load_weights(derived("int4", ("a", "b"), 7), source, "draft", None)


@given(st.integers(0, 40))
def test_a_weight_is_used_where_it_lies_if_that_is_on_a_cache_line_and_copied_to_one_if_not(place: int) -> None:
    source, memory = Counting(), torch.empty(3 * 64 + 64)
    start = (-memory.data_ptr() % ALIGNED) // 4 + place
    source.tensors["a"] = memory[start : start + 3 * 64].view(3, 64).copy_(source.tensors["a"])
    plain = Parameter(Value("p", TensorSpec(DType.F32, (3, 64)), "parameter"), ("a",))
    found = load_weights((plain,), source, "target", None)["p"]
    assert torch.equal(found, source.tensors["a"])
    assert found.data_ptr() % ALIGNED == 0
    assert (found.data_ptr() == source.tensors["a"].data_ptr()) == (place % 16 == 0)


@dataclass(frozen=True)
class Restored(TinyWeights):
    """The same weights, its matrices quantised and restored: what a quantised model computes with."""

    scheme: str = ""

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """See `WeightSource.tensor`; the table of embeddings is looked up in and stays as it is."""
        tensor = super().tensor(name, spec)
        if name.startswith(("rope", "embedding")) or tensor.dim() == 1:
            return tensor
        return dequantise(*quantise(tensor, self.scheme), bits=SCHEMES[self.scheme].bits)


@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_a_quantised_model_gives_the_bits_of_its_restored_weights(scheme: str) -> None:
    weights = MODEL.weights
    restored = TinyModel(MODEL.spec, Restored(weights.shapes, weights.seed, weights.noise, scheme=scheme))
    wanted = [request(prompt_of(4 + 5 * n, n), 10, temperature=0.7 * n, seed=n) for n in range(3)]
    found = [outcome(c) for c in run(tiny_engine(MODEL, weights=scheme), wanted)]
    assert found == [outcome(c) for c in run(tiny_engine(restored), wanted)]
    assert found != [outcome(c) for c in run(tiny_engine(MODEL), wanted)]


@pytest.mark.parametrize("draft", ["ngram", "model"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_with_quantised_weights_too_neither_drafts_nor_company_change_what_is_generated(
    scheme: str, draft: str
) -> None:
    wanted = [request(prompt_of(6 + n, n) * 2, 30, temperature=0.5 * n, seed=n) for n in range(4)]
    engine = tiny_engine(MODEL, DRAFTS[draft], weights=scheme)
    completions = run(engine, wanted)
    assert [outcome(c) for c in completions] == [outcome(alone(MODEL, one, weights=scheme)) for one in wanted]
    assert sum(c.stats.drafted for c in completions) > 0


def test_the_draft_model_is_quantised_too() -> None:
    engine = tiny_engine(MODEL, DRAFTS["model"], weights="int8")
    for role in ("target", "draft"):
        codes = [t for name, t in engine.executor.weights[role].items() if ".codes" in name]
        assert len(codes) >= 5
        assert all(t.dtype == torch.int8 for t in codes)


def test_a_saved_plan_with_other_parts_than_its_scheme_has_is_refused() -> None:
    (codes, scale) = derived("int8", ("a",), 3)
    swapped = replace(scale, derive="int8.offset")
    with pytest.raises(PlanError, match=r"w\.scale must be f16\[3, 2\].*int8 offset is none"):
        load_weights((codes, swapped), Counting(), "target", None)
