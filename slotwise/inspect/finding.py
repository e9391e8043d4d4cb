"""What lockstep finds: the first op at which two backends part, with all that is known of it.

Owns `Finding` and `judge`. What always holds: the oracle is the op's own function in float64 on the inputs that the
leader's call had; `at_fault` names the kernels that are out of the contract's tolerance from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slotwise.core.backend import Tensors
from slotwise.core.contract import EXACT, OpContract
from slotwise.core.graph import Node
from slotwise.core.ops import contract_of
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.core.printer import format_around
from slotwise.core.quantise import GROUP
from slotwise.core.specs import DType
from slotwise.inspect.matching import layer_of
from slotwise.plans.program import Program
from slotwise.proving.validate import oracle

SHOWN = 16
"""Integers of an input that are shown as they are; of longer inputs, the range."""

REACH = 2
"""Elements of the last dimension that are shown on either side of the worst one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The first op at which two backends part on the same inputs.

    `leader` and `follower` are their values of output `output` at `index`, `want` the float64 oracle's; `at_fault`
    names the kernels that are out of the contract's tolerance from the oracle. `layer` is None outside all layers.
    """

    step: int
    program: str
    call: int
    op: str
    layer: int | None
    kernels: tuple[str, str]
    output: str
    index: tuple[int, ...]
    leader: float
    follower: float
    want: float
    allowed: float
    at_fault: tuple[str, ...]
    about: tuple[str, ...]
    neighbourhood: str
    around: str

    def __str__(self) -> str:
        one, other = self.kernels
        names = ", ".join(self.at_fault) or "neither alone; together they are further apart than both may be"
        where = "" if self.layer is None else f" of layer {self.layer}"
        return "\n".join(
            [
                f"step {self.step}, program {self.program}, call {self.call}: op {self.op}{where} is out of tolerance",
                f"  kernels {one} and {other}; at fault: {names}",
                *(f"  {line}" for line in self.about),
                f"  worst element {self.output}{list(self.index)}: {self.leader:.9g} and {self.follower:.9g}",
                f"  the oracle has {self.want:.9g} there; {self.allowed:.3g} is allowed",
                *(f"  {line}" for line in self.neighbourhood.splitlines()),
                self.around,
            ]
        )


def judge(
    step: int,
    program: Program,
    index: int,
    other: Node,
    inputs: Tensors,
    name: str,
    values: tuple[torch.Tensor, torch.Tensor],
) -> Finding | None:
    """Ask the oracle about output, or written cache, `name` of call `index` of the leader's `program`.

    The call had `inputs`; `values` are the leader's and the follower's, whose node is `other`. None where each is
    within one tolerance of what it may be.
    """
    node = program.graph.nodes[index]
    contract = contract_of(node.op)
    truths = [oracle(contract, each, node.attr_dict)[name].cpu() for each in _readings(node, inputs)]
    allowances = [_allowed(contract, node, truth) for truth in truths]
    excess = torch.stack([_excess(value, truths, allowances) for value in values])
    if not excess.numel() or float(excess.max()) <= 1:
        return None
    place = tuple(int(i) for i in torch.unravel_index(excess.amax(dim=0).argmax(), values[0].shape))
    kernels = (_kernel(node), _kernel(other))
    return Finding(
        step=step,
        program=program.name,
        call=index,
        op=node.op,
        layer=layer_of(node),
        kernels=kernels,
        output=name,
        index=place,
        leader=float(values[0][place]),
        follower=float(values[1][place]),
        want=float(truths[0][place]),
        allowed=float(allowances[0][place]),
        at_fault=tuple(kernel for kernel, over in zip(kernels, excess, strict=True) if float(over[place]) > 1),
        about=_about_call(contract, node, inputs),
        neighbourhood=_neighbourhood(name, place, *values, truths[0]),
        around=format_around(program.graph, index),
    )


def _readings(node: Node, inputs: Tensors) -> list[Tensors]:
    """The inputs as the op means them, and as a kernel may read them: with activations in int8 by group.

    How far that takes a product depends on the activations' size, which a tolerance for cases of unit variance
    cannot know; so what it may come to is computed.
    """
    x = inputs[0]
    if node.op not in FLOAT_OPS or x is None:
        return [inputs]
    groups = x.double().reshape(-1, GROUP)
    scale = (groups.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-300)
    return [inputs, ((torch.round(groups / scale) * scale).reshape(x.shape), *inputs[1:])]


def _allowed(contract: OpContract, node: Node, truth: torch.Tensor) -> torch.Tensor:
    """How far from each element of `truth` a kernel may be."""
    tolerance = contract.tolerance[dtype_of(node)]
    if tolerance == EXACT or not truth.is_floating_point():
        return torch.zeros(truth.shape, dtype=torch.float64)
    return tolerance.around(truth)


def _excess(value: torch.Tensor, truths: list[torch.Tensor], allowances: list[torch.Tensor]) -> torch.Tensor:
    """How far each element is from the nearest of what it may be, as a multiple of what is allowed."""
    found = []
    for truth, allowed in zip(truths, allowances, strict=True):
        exact = truth.to(value.dtype) if not bool(allowed.any()) else truth
        same = (value == exact) | (value.isnan() & exact.isnan())
        apart = torch.where(same, 0.0, (value.double() - exact.double()).abs())
        apart = apart.nan_to_num(nan=torch.inf, posinf=torch.inf)
        found.append(torch.where(apart == 0, 0.0, apart / allowed.clamp(min=1e-300)).clamp(max=1e6))
    return torch.stack(found).amin(dim=0)


def dtype_of(node: Node) -> DType:
    """The dtype that a call computes in, which chooses its tolerance."""
    contract = contract_of(node.op)
    for argument, value in zip(contract.inputs, node.inputs, strict=True):
        if value is not None and isinstance(argument.dtype, str) and value.spec.dtype.is_float:
            return value.spec.dtype
    return DType.F32


def _kernel(node: Node) -> str:
    return node.op if node.selection is None else node.selection.kernel


def _about_call(contract: OpContract, node: Node, inputs: Tensors) -> tuple[str, ...]:
    """A line for each input, with what is in it; then outputs and attributes."""
    lines = [
        f"input {argument.name} = {value.name}: {value.spec}  {_summary(tensor)}"
        for argument, value, tensor in zip(contract.inputs, node.inputs, inputs, strict=True)
        if value is not None and tensor is not None
    ]
    lines += [f"output {a.name} = {v.name}: {v.spec}" for a, v in zip(contract.outputs, node.outputs, strict=True)]
    if node.attrs:
        lines.append(f"attributes {', '.join(f'{name}={value}' for name, value in node.attrs)}")
    return tuple(lines)


def _summary(tensor: torch.Tensor) -> str:
    """Few integers as they are; else the range of what is finite, and how much is not."""
    if not tensor.is_floating_point() and tensor.numel() <= SHOWN:
        return str(tensor.tolist())
    finite = tensor[tensor.isfinite()]
    if not finite.numel():
        return "nothing finite"
    rest = tensor.numel() - finite.numel()
    return f"{float(finite.min()):.4g} .. {float(finite.max()):.4g}" + (f", {rest} not finite" if rest else "")


def _neighbourhood(
    name: str, place: tuple[int, ...], leader: torch.Tensor, follower: torch.Tensor, truth: torch.Tensor
) -> str:
    """The elements beside the worst one, along the last dimension: leader, follower, oracle."""
    *head, last = place
    low, high = max(0, last - REACH), min(leader.shape[-1], last + REACH + 1)
    lines = [f"{name}{[*head, f'{low}..{high - 1}']}:".replace("'", "")]
    for word, values in (("leader", leader), ("follower", follower), ("oracle", truth)):
        row = values[tuple(head)][low:high]
        lines.append(f"  {word:<9}" + " ".join(f"{float(v):>14.7g}" for v in row))
    return "\n".join(lines)
