"""Each pass reads as its golden file: a small decoder after it, with the passes before it behind it.

Read in the order of `--print-after`, the files tell how a model's graph becomes a program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from slotwise.core.backend import Backend, load_backend
from slotwise.core.errors import SlotwiseError
from slotwise.core.graph import Graph
from slotwise.core.layouts import OCTETS
from slotwise.core.model import ModelSpec
from slotwise.core.printer import format_graph
from slotwise.plans.compile import pass_names, program_passes, symbolic_passes
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes import Pass
from slotwise.plans.passes.lower_cache import LowerCache
from slotwise.plans.passes.quantise_weights import QuantiseWeights
from slotwise.plans.passes.select_kernels import SelectKernels
from slotwise.plans.passes.specialise import Specialise

OPTIONS = PlanOptions(page_size=4, weights="int8", speculate=2, decode_rows=8)
SIZES = {"T": 3, "B": 3, "R": 3, "P": 5, "S": 24, "M": 20}


def _backends() -> dict[str, Backend]:
    """The reference, said to like octets, so that the pass that lays weights out has something to do."""
    reference = load_backend("reference")
    return {"reference": Backend("reference", reference.kernels, reference.unavailable, layout=OCTETS)}


def _passes() -> tuple[Pass, ...]:
    return (*symbolic_passes(OPTIONS, _backends()), *program_passes(OPTIONS, _backends(), SIZES, 8))


def _model(tiny_model: Callable[..., ModelSpec]) -> Graph:
    return tiny_model(layers=1, hidden=32, inner=32, vocab=40).graph


def test_every_pass_is_here_in_its_order() -> None:
    assert tuple(each.name for each in _passes()) == pass_names()


@pytest.mark.parametrize("name", pass_names())
def test_a_pass_reads_as_its_golden_file(
    name: str, tiny_model: Callable[..., ModelSpec], golden: Callable[[str, str], None]
) -> None:
    graph = _model(tiny_model)
    for each in _passes():
        graph = each.apply(graph)
        if each.name == name:
            break
    golden(f"passes/{name}.txt", format_graph(graph) + "\n")


def test_what_passes_refuse_reads_as_its_golden_file(
    tiny_model: Callable[..., ModelSpec], golden: Callable[[str, str], None]
) -> None:
    none = Backend("none", (), lambda: None)
    bound = Specialise(tuple(sorted(SIZES.items())), all_rows=True)
    lowered = LowerCache(page_size=4, speculates=False).apply(_model(tiny_model))
    cases: dict[str, tuple[Any, Graph]] = {
        "lower_cache": (
            LowerCache(page_size=4, speculates=True),
            tiny_model(layers=1, on_rejection="replay").graph,
        ),
        "quantise_weights": (QuantiseWeights("int8"), tiny_model(layers=1, hidden=24, inner=20).graph),
        "select_kernels": (
            SelectKernels(PlanOptions(backend=(("*", ("none",)),)), {"none": none}, 8),
            bound.apply(lowered),
        ),
    }
    lines = []
    for name, (each, graph) in cases.items():
        with pytest.raises(SlotwiseError) as refused:
            each.apply(graph)
        lines.append(f"{name}: {refused.value}")
    golden("passes/refused.txt", "\n".join(lines) + "\n")
