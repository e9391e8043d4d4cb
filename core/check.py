"""The graph checker.

Owns `check_graph`. What always holds after it: SSA (each value is defined once, before its uses), every node's specs
and effects are what its contract infers, states are declared, and no state is read before the node that writes it. It
runs after every pass, so a pass that breaks the IR is named at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from slotwise.core.errors import GraphError
from slotwise.core.graph import Graph, Node, Value
from slotwise.core.ops import contract_of
from slotwise.core.printer import format_around
from slotwise.core.specs import TensorSpec
from slotwise.core.state import StateSpec

Inferences = dict[tuple[object, ...], tuple[TensorSpec, ...]]
"""What contracts inferred so far in one check: (op, input specs, attributes but the layer) -> output specs."""


def check_graph(graph: Graph) -> None:
    """Raise GraphError, with the lines around the fault, when `graph` breaks a rule of the IR."""
    defined: dict[str, Value] = {}
    states = {state.name: state for state in graph.states}
    if len(states) != len(graph.states):
        raise GraphError(f"graph {graph.name}: a layer's state is declared twice")
    for value in (*graph.inputs, *(parameter.value for parameter in graph.parameters)):
        _define(graph, value, defined, None)
    cache_values: dict[str, tuple[Value, int]] = {}
    written: set[str] = set()
    inferred: Inferences = {}
    for index, node in enumerate(graph.nodes):
        for operand in node.inputs:
            if operand is None:
                continue
            if operand.kind == "cache":
                layer = int(node.attr_dict.get("layer", -1))
                known, owner = cache_values.setdefault(operand.name, (operand, layer))
                if owner != layer:
                    message = f"{operand.name} is the cache of layer {layer} here, but was that of layer {owner}"
                    raise _fault(graph, index, message)
            elif operand.name not in defined:
                raise _fault(graph, index, f"{operand.name} is used before it is defined")
            else:
                known = defined[operand.name]
            if known != operand:
                message = f"{operand.name} is {operand.spec} ({operand.kind}) here, but was defined as {known.spec}"
                raise _fault(graph, index, f"{message} ({known.kind})")
        _check_contract(graph, index, node, inferred)
        for effect in node.effects:
            if effect.state not in states:
                declared = ", ".join(states) or "none"
                raise _fault(graph, index, f"{effect} names a state that the graph does not declare; it has {declared}")
            if effect.kind == "writes":
                written.add(effect.state)
            elif effect.state not in written:
                raise _fault(graph, index, f"{effect} before any node has written this step's tokens to it")
        _check_state_values(graph, index, node, states)
        for value in node.outputs:
            _define(graph, value, defined, index)
    for value in graph.outputs:
        if defined.get(value.name) != value:
            raise GraphError(f"graph {graph.name}: output {value.name}: {value.spec} is not defined by any node")


def _check_contract(graph: Graph, index: int, node: Node, inferred: Inferences) -> None:
    given = tuple(None if v is None else v.spec for v in node.inputs)
    # Layers repeat: what a contract infers from the same specs and attributes is asked once.
    key = (node.op, given, tuple(item for item in node.attrs if item[0] != "layer"))
    try:
        contract = contract_of(node.op)
        attrs = contract.complete_attrs(node.attr_dict)
        if key not in inferred:
            inferred[key] = contract.infer(given, attrs)
        specs = inferred[key]
    except GraphError as error:
        raise _fault(graph, index, str(error)) from error
    if specs != tuple(value.spec for value in node.outputs):
        expected = ", ".join(map(str, specs))
        raise _fault(graph, index, f"outputs do not follow from the inputs; the contract infers {expected}")
    if node.effects != contract.effects_of(attrs):
        expected = "; ".join(map(str, contract.effects_of(attrs))) or "none"
        raise _fault(graph, index, f"effects do not follow from the contract, which says: {expected}")
    for argument, operand in zip(contract.inputs, node.inputs, strict=True):
        if operand is not None and (operand.kind == "cache") != (argument.cache != "pure"):
            expected = "a cache" if argument.cache != "pure" else "no cache"
            message = f"{operand.name} is of kind {operand.kind}, but {argument.name!r} of {node.op} must be {expected}"
            raise _fault(graph, index, message)


def _check_state_values(graph: Graph, index: int, node: Node, states: Mapping[str, StateSpec]) -> None:
    """Arrays of states are parts of those that the node's effects name, in their shapes."""
    touched = [states[name] for name in dict.fromkeys(effect.state for effect in node.effects)]
    parts = {state.value_name(part.name): part for state in touched for part in state.parts}
    for operand in node.inputs:
        if operand is not None and operand.kind == "cache":
            part = parts.get(operand.name)
            if part is None or operand.spec.shape[1:] != part.shape or operand.spec.dtype is not part.dtype:
                declared = "; ".join(map(str, touched)) or "it touches no state"
                raise _fault(graph, index, f"{operand.name} is {operand.spec}, but {declared}")


def _define(graph: Graph, value: Value, defined: dict[str, Value], index: int | None) -> None:
    if value.name in defined:
        message = f"{value.name} is defined twice; in SSA each value has one definition"
        raise _fault(graph, index, message) if index is not None else GraphError(f"graph {graph.name}: {message}")
    defined[value.name] = value


def _fault(graph: Graph, index: int, message: str) -> GraphError:
    return GraphError(f"graph {graph.name}, node {index}: {message}\n{format_around(graph, index)}")
