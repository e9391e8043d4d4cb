"""Which calls of two plans mean the same, and whether their weights do.

Owns `match_calls`, `compare_weights`, `layer_of` and their records. What always holds: two calls are a pair only if the
same inputs must give both the same results: op, attributes, shapes, dtypes, and the checkpoint's tensors that their
weights come from; the layout in which a weight stands is no part of that, and neither is its name. A call without a
partner has a reason.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slotwise.core.graph import Node, Parameter, Value
from slotwise.core.layouts import in_rows
from slotwise.core.ops import contract_of
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.engine.executor import Executor
from slotwise.plans.program import Program

LAYOUT = "layout"
SAME_KERNEL = "both sides run the very same kernel on weights in the same layout"
_LAYER = re.compile(r"\blayers\.(\d+)\.")

Meaning = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Matching:
    """For each call of the leader's program the index of the follower's partner, or None.

    `reasons` say why a call, by its index, is not worth comparing: it has no partner, or one that is the same kernel.
    """

    partners: tuple[int | None, ...]
    reasons: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class WeightsCompared:
    """How many weights of two plans were compared element by element, and one line for each that differs."""

    same: int
    apart: tuple[str, ...]


def match_calls(leader: Program, follower: Program | None) -> Matching:
    """Pair the calls of two programs by what they mean; the n-th of several alike goes with the n-th."""
    nodes = leader.graph.nodes
    if follower is None:
        return Matching((None,) * len(nodes), dict.fromkeys(range(len(nodes)), f"it has no program {leader.name}"))
    theirs = follower.graph.nodes
    waiting: dict[Meaning, list[int]] = defaultdict(list)
    parameters = _parameters(follower)
    for index in reversed(range(len(theirs))):
        waiting[_meaning(theirs[index], parameters)].append(index)
    parameters = _parameters(leader)
    partners: list[int | None] = []
    reasons: dict[int, str] = {}
    for index, node in enumerate(nodes):
        alike = waiting[_meaning(node, parameters)]
        partner = alike.pop() if alike else None
        if partner is None:
            reasons[index] = _why_alone(node, theirs)
        elif _kernel_and_layout(node) == _kernel_and_layout(theirs[partner]):
            reasons[index] = SAME_KERNEL
        partners.append(partner)
    return Matching(tuple(partners), reasons)


def layer_of(node: Node) -> int | None:
    """The layer that a call belongs to: its attribute, else that of a weight it reads; None outside all layers."""
    layer = node.attr_dict.get("layer")
    if layer is not None:
        return int(layer)
    names = [value.name for value in node.inputs if value is not None and value.kind == "parameter"]
    found = next((match for name in names if (match := _LAYER.search(name))), None)
    return None if found is None else int(found[1])


def compare_weights(leader: Executor, follower: Executor) -> WeightsCompared:
    """Compare the loaded weights of two plans that come from the same tensors, each read through its layout."""
    same, apart = 0, []
    for role in leader.plan.roles:
        if all(other.role != role.role for other in follower.plan.roles):
            continue
        theirs = {_source(each): each for each in follower.plan.role(role.role).parameters}
        for mine in role.parameters:
            its = theirs.get(_source(mine))
            if its is None:
                continue
            one = _bytes_in_rows(leader.weights[role.role][mine.value.name], mine)
            other = _bytes_in_rows(follower.weights[role.role][its.value.name], its)
            if torch.equal(one, other):
                same += 1
                continue
            places = int((one != other).view(-1, mine.value.spec.dtype.itemsize).any(dim=1).sum())
            total = one.numel() // mine.value.spec.dtype.itemsize
            apart.append(
                f"{role.role} {mine.value.name} ({mine.layout}) and {its.value.name} ({its.layout}) differ in {places} "
                f"of {total} elements"
            )
    return WeightsCompared(same, tuple(apart))


def _parameters(program: Program) -> dict[str, Parameter]:
    return {parameter.value.name: parameter for parameter in program.graph.parameters}


def _source(parameter: Parameter) -> Meaning:
    return parameter.sources, parameter.derive, parameter.value.spec


def _bytes_in_rows(tensor: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    return in_rows(tensor.cpu(), parameter.word, parameter.layout).contiguous().view(-1).view(torch.uint8)


def _meaning(node: Node, parameters: Mapping[str, Parameter]) -> Meaning:
    attributes = tuple(pair for pair in node.attrs if pair[0] != LAYOUT)
    inputs = tuple(_meaning_of(value, parameters) for value in node.inputs)
    return node.op, attributes, inputs, tuple(value.spec for value in node.outputs)


def _meaning_of(value: Value | None, parameters: Mapping[str, Parameter]) -> Meaning:
    if value is None:
        return ()
    if value.kind == "parameter":
        return _source(parameters[value.name])
    return (value.spec, value.name) if value.kind == "cache" else (value.spec,)


def _kernel_and_layout(node: Node) -> tuple[str, object]:
    return "" if node.selection is None else node.selection.kernel, node.attr_dict.get(LAYOUT)


def _why_alone(node: Node, theirs: tuple[Node, ...]) -> str:
    """What keeps a call from having a partner, by the follower's calls of the same layer."""
    beside = [other for other in theirs if layer_of(other) == layer_of(node)]
    for other in beside:
        if other.op == node.op:
            return _difference(node, other)
    for other in beside:
        if FLOAT_OPS.get(other.op) is contract_of(node.op):
            return f"it runs {other.op}: a quantised weight is another function than a native one"
        if FLOAT_OPS.get(node.op) is contract_of(other.op):
            return f"it runs {other.op}: a native weight is another function than a quantised one"
    return f"its program has no call of {node.op} there: other passes made it"


def _difference(node: Node, other: Node) -> str:
    """The first thing in which two calls of one op differ."""
    names = sorted({*node.attr_dict, *other.attr_dict} - {LAYOUT})
    for name in names:
        mine, its = node.attr_dict.get(name), other.attr_dict.get(name)
        if mine != its:
            return f"{name} is {mine} here and {its} there"
    contract = contract_of(node.op)
    values = [*zip(contract.inputs, node.inputs, other.inputs, strict=True)]
    for argument, one, two in (*values, *zip(contract.outputs, node.outputs, other.outputs, strict=True)):
        mine, its = (None if value is None else str(value.spec) for value in (one, two))
        if mine != its:
            return f"{argument.name} is {mine or 'absent'} here and {its or 'absent'} there"
    return "its weights come from other tensors, or are quantised another way"
