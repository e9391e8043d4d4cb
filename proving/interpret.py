"""Runs a model graph on one whole sequence by its contracts' functions, with no plan, no cache and no backend.

Owns `load_parameters` and `interpret`. What always holds: each node is its op's definition, so the outcome is the
graph's meaning; it is the oracle for passes and plans, not a way to generate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from slotwise.core.errors import GraphError
from slotwise.core.graph import Graph
from slotwise.core.layouts import laid_out
from slotwise.core.model import WeightSource
from slotwise.core.ops import contract_of
from slotwise.core.quantise import derive


def load_parameters(graph: Graph, weights: WeightSource, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Each parameter of `graph` by name: sources joined along dimension 0, or what is derived from them, in the
    parameter's dtype and shape.

    `sizes` gives the symbolic dimensions (`M`, the rows of rotary tables). Raises GraphError for a shape that differs.
    """
    values: dict[str, torch.Tensor] = {}
    for parameter in graph.parameters:
        spec = parameter.value.spec.sized(sizes)
        joined = torch.cat([weights.tensor(name, spec) for name in parameter.sources])
        if parameter.derive:
            joined = derive(joined, parameter.derive, name=parameter.value.name)
        joined = laid_out(joined.to(spec.dtype.torch), parameter.word, parameter.layout)
        if tuple(joined.shape) != spec.shape:
            raise GraphError(f"parameter {parameter.value.name} is {spec}, its sources make {tuple(joined.shape)}")
        values[parameter.value.name] = joined
    return values


def interpret(graph: Graph, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of `graph`, whose inputs and parameters are in `values` by name.

    The rows are one sequence from its first token on. Raises GraphError for a missing value or a graph that was lowered
    to cache slots.
    """
    known = dict(values)
    for node in graph.nodes:
        for value in node.inputs:
            if value is not None and value.name not in known:
                raise GraphError(
                    f"graph {graph.name}: {value.name} ({value.kind}) of {node.op} has no value; give every input and "
                    "parameter, and a graph that was not lowered"
                )
        operands = [None if value is None else known[value.name] for value in node.inputs]
        results = contract_of(node.op).function(*operands, **node.attr_dict)
        made = results if isinstance(results, tuple) else (results,)
        known.update(zip((out.name for out in node.outputs), made, strict=True))
    return tuple(known[value.name] for value in graph.outputs)
