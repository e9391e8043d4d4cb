"""The calls of a plan as cases for validation: exactly its ops, shapes, dtypes and attributes, with drawn inputs.

Owns `plan_calls`. What always holds: each distinct call of a plan comes once, with the kernel that the plan chose;
integers mean what the engine would mean by them (slots that are distinct, page tables of live pages, ragged rows), for
an argument's name says what it holds; every tensor is dense and row-major, as the plan's own are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from slotwise.core.contract import Case, OpContract
from slotwise.core.errors import ContractError
from slotwise.core.graph import Node, Value
from slotwise.core.ops import contract_of
from slotwise.core.specs import DType
from slotwise.plans.plan import Plan

RAGGED = (1, 6, 2, 1, 4, 3)
"""Rows of the sequences that share a drawn call, over and over until the rows are used up."""


@dataclass(frozen=True, slots=True)
class PlanCall:
    """One distinct call: where it first stands, the kernel chosen, the case, and the dtype of its free arguments."""

    where: str
    kernel: str
    op: str
    case: Case
    dtype: DType


def plan_calls(plan: Plan, seed: int = 0) -> Iterator[PlanCall]:
    """Every distinct call of `plan`, in its order; the same inputs for the same seed.

    Raises ContractError for an op that has an argument whose name this module does not know.
    """
    seen = set()
    for program in plan.programs:
        for index, node in enumerate(program.graph.nodes):
            if node.selection is None:
                continue
            specs = tuple(None if value is None else value.spec for value in node.inputs)
            key = (node.op, node.selection.kernel, specs, tuple(a for a in node.attrs if a[0] != "layer"))
            if key in seen:
                continue
            seen.add(key)
            rng = torch.Generator().manual_seed(seed)
            contract = contract_of(node.op)
            where = f"{program.name} call {index}"
            given = zip(contract.inputs, specs, strict=True)
            dtype = next((spec.dtype for a, spec in given if spec and isinstance(a.dtype, str)), DType.F32)
            case = Case(where, _inputs(contract, node, rng), node.attr_dict)
            yield PlanCall(where, node.selection.kernel, node.op, case, dtype)


def _inputs(contract: OpContract, node: Node, rng: torch.Generator) -> tuple[torch.Tensor | None, ...]:
    shapes = {
        argument.name: value.spec.sizes()
        for argument, value in zip(contract.inputs, node.inputs, strict=True)
        if value is not None
    }
    draw = _Draw(contract.name, shapes, node, rng)
    return tuple(
        None if value is None else draw.tensor(argument.name, value)
        for argument, value in zip(contract.inputs, node.inputs, strict=True)
    )


class _Draw:
    """Draws the arguments of one call; integers of one call fit each other."""

    def __init__(self, op: str, shapes: Mapping[str, tuple[int, ...]], node: Node, rng: torch.Generator) -> None:
        self._op, self._shapes, self._node, self._rng = op, shapes, node, rng
        first = next(iter(shapes.values()))
        self._rows = first[0]

    def tensor(self, name: str, value: Value) -> torch.Tensor:
        """Contents for one argument: float64 where it is floating point, else in the dtype of its value."""
        if not value.spec.dtype.is_float:
            return self._integers(name, self._shapes[name]).to(value.spec.dtype.torch)
        return self._floats(name, self._shapes[name], value.kind == "parameter")

    def _floats(self, name: str, shape: tuple[int, ...], is_weight: bool) -> torch.Tensor:
        normal = torch.randn(shape, generator=self._rng, dtype=torch.float64)
        if name in ("cos", "sin"):
            steps = 100.0 ** -(torch.arange(shape[1], dtype=torch.float64) / shape[1])
            angles = torch.outer(torch.arange(shape[0], dtype=torch.float64), steps)
            return angles.cos() if name == "cos" else angles.sin()
        if name == "temperature":  # a greedy row now and then
            return torch.where(torch.arange(shape[0]) % 4 == 3, 0.0, 0.8).double()
        if name in ("top_p", "min_p"):
            return torch.full(shape, 0.9 if name == "top_p" else 0.02, dtype=torch.float64)
        if "logits" in name or "scores" in name:
            return normal.float().double() * 3
        if name in ("scale", "offset"):
            # One number a group of 32; codes of 8 bits are some 70 in size, of 4 bits some 5.
            size = math.sqrt(1 / (32 * shape[-1]))
            return normal * size * (0.5 if name == "offset" else 1 / 70 if self._node.attr("bits") == 8 else 1 / 5)
        if not is_weight:
            return normal
        # Products of unit-variance rows with these have unit variance, whatever K is.
        return 1 + 0.1 * normal if len(shape) == 1 else normal * (1.0 if name == "table" else math.sqrt(1 / shape[-1]))

    def _integers(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        def below(limit: int) -> torch.Tensor:
            return torch.randint(0, max(1, limit), shape, generator=self._rng)

        if name == "codes":
            low, high = (-127, 128) if self._node.attr("bits") == 8 else (0, 256)
            return torch.randint(low, high, shape, generator=self._rng)
        if name == "slots":
            slots = self._shapes["k_cache"][0]
            return torch.randperm(slots, generator=self._rng)[: shape[0]]
        if name == "positions":
            return below(self._shapes["cos"][0] if "cos" in self._shapes else 2**20)
        if name in ("token_ids", "sampled"):
            wide = self._shapes.get("table") or self._shapes.get("target_scores", (0, 2))
            # Few different tokens where drafts are to be accepted now and then.
            return below(wide[0] if "table" in self._shapes else wide[1])
        if name == "rows":
            return below(self._shapes["x"][0])
        if name == "row_start":
            return torch.tensor(self._row_starts(shape[0] - 1))
        if name == "kv_len":
            return torch.tensor(self._lengths(shape[0]))
        if name == "page_table":
            pages = self._shapes["k_cache"][0] // int(self._node.attr("page_size"))
            return 1 + torch.randint(0, max(1, pages - 1), shape, generator=self._rng)
        if name == "top_k":
            return below(50)
        if name == "seed":
            return below(2**62)
        raise ContractError(
            f"op {self._op}: no inputs can be drawn for its argument {name!r}; say in slotwise/inspect/calls.py what "
            "it may hold"
        )

    def _row_starts(self, sequences: int) -> list[int]:
        starts, left = [0], self._rows
        for b in range(sequences):
            count = min(RAGGED[b % len(RAGGED)], left)
            left -= count
            starts.append(starts[-1] + count)
        return starts

    def _lengths(self, sequences: int) -> list[int]:
        most = self._shapes["page_table"][1] * int(self._node.attr("page_size"))
        starts = self._row_starts(sequences)
        found = []
        for b in range(sequences):
            rows = starts[b + 1] - starts[b]
            extra = int(torch.randint(0, max(1, most - rows + 1), (1,), generator=self._rng))
            found.append(rows + extra if rows else 0)
        return found
