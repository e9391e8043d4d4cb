"""What a plan takes of memory, part by part, and whether that fits.

Owns `Need`, `Budget` and `refuse_beyond`, the one place that says whether a plan fits. What always holds: what is
counted is what the executor and the engine allocate, the room that loading needs for a while included; a plan that
takes more is refused with every number, before anything is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from slotwise.core.backend import load_backend
from slotwise.core.errors import PlanError
from slotwise.core.graph import Parameter
from slotwise.core.layouts import ROWS
from slotwise.core.quantise import SCHEMES, working_bytes
from slotwise.core.sizes import parse_size, size
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import StateGroup
from slotwise.plans.checks.overlap import why_no_overlap
from slotwise.plans.program import RolePlan
from slotwise.plans.record import PlanRecord
from slotwise.slots.ledger import RoleLedger

FOLLOWS = "follows"
"""The array that says, for each row of a step, which row of the step before sampled its token."""

_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Part:
    """`nbytes` of memory under the name that tables and errors give it; `kind` groups those of one sort."""

    kind: str
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Need:
    """What a plan takes where its kernels run. `loading` is what comes on top of `parts` for a while at load."""

    parts: tuple[Part, ...]
    loading: int

    @property
    def held(self) -> int:
        """Bytes that are taken as long as the model is loaded."""
        return sum(part.nbytes for part in self.parts)

    @property
    def peak(self) -> int:
        """The most that is taken at any time: what has to fit."""
        return self.held + self.loading

    def of(self, kind: str) -> int:
        """Bytes of all parts of one kind."""
        return sum(part.nbytes for part in self.parts if part.kind == kind)

    def __str__(self) -> str:
        kinds = {part.kind: self.of(part.kind) for part in self.parts} | {"while loading": self.loading}
        return ", ".join(f"{kind} {size(nbytes)}" for kind, nbytes in kinds.items() if nbytes)


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that there are, and how a sentence says whose: `this machine has`."""

    nbytes: int
    said: str

    def __str__(self) -> str:
        return f"{self.said} {size(self.nbytes)}"

    @classmethod
    def given(cls, memory: int | str) -> Budget:
        """What a user gives, `24GiB`, say; raises OptionError for what is no size."""
        return cls(parse_size(memory), "memory is")

    @classmethod
    def here(cls, device: str) -> Budget | None:
        """All of this machine's memory, or what is free of the GPU's; None where the system does not say."""
        if device.startswith("cuda"):
            return cls(torch.cuda.mem_get_info(device)[0], f"{torch.cuda.get_device_name(device)} has free")
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            return cls(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine has")
        return None


def device_of(plan: PlanRecord) -> str:
    """Where the plan's kernels need their tensors; raises PlanError when they do not agree."""
    found = {name: load_backend(name).device for name in plan.backends}
    if len(set(found.values())) > 1:
        places = ", ".join(f"{name} on {device}" for name, device in found.items())
        raise PlanError(
            f"kernels of one plan must share a memory, but this plan mixes {places}; choose backends of one"
        )
    return next(iter(found.values()), "cpu")


def need_of(plan: PlanRecord, *, overlap: bool = False) -> Need:
    """What `plan` takes; with `overlap`, of a CPU where steps are started ahead.

    On a GPU that is the GPU's memory: the host's tables and copies of arrays are the host's, and so is all that loading
    needs. On a CPU weights are made before any state is written, so what making them takes counts only where the
    states are smaller.
    """
    on_host = device_of(plan) == "cpu"
    parts = [Part("weights", f"{role.role} weights", role.parameter_bytes) for role in plan.roles]
    for role in plan.roles:
        parts += [Part("states", f"{role.role} {_entries(group)}", role.group_bytes(group)) for group in role.groups]
    arrays = sum(_laid_out(spec) for _, spec in arrays_of(plan))
    parts += [Part("arena", "arena", plan.arena_bytes), Part("arrays", "arrays", arrays)]
    if not on_host:
        return Need(tuple(parts), 0)
    if overlap and why_no_overlap(plan) is None:
        # The host's own copy of every array; and two steps' short arrays and page tables, packed.
        packed = sum(_laid_out(spec) for name, spec in arrays_of(plan) if _is_packed(name, spec))
        parts.append(Part("arrays", "arrays' copies for steps started ahead", arrays + 2 * packed))
    parts.append(Part("tables", "token and page tables", sum(_tables(plan))))
    making = max(map(_making, plan.roles))
    return Need(tuple(parts), max(0, making - sum(role.cache_bytes for role in plan.roles)))


def arrays_of(plan: PlanRecord) -> tuple[tuple[str, TensorSpec], ...]:
    """The arrays that the executor makes: the plan's, and the one that feeds steps started ahead."""
    return (*plan.buffers, (FOLLOWS, TensorSpec(DType.I32, (plan.options.decode_rows,))))


def refuse_beyond(
    plan: PlanRecord,
    budget: Budget | None,
    *,
    overlap: bool = False,
    alternatives: Callable[[], Sequence[str]] | None = None,
) -> None:
    """Raise PlanError when the plan takes more than `budget` has (None: nobody knows, and nothing is refused).

    `alternatives` is asked for what would fit, only then.
    """
    need = need_of(plan, overlap=overlap)
    if budget is None or need.peak <= budget.nbytes:
        return
    options = plan.options
    found = list(alternatives()) if alternatives is not None else []
    if alternatives is None:
        advice = "lower pages, capacity or max_sequences, or quantise weights; `slotwise plan fit` finds what fits"
    elif found:
        advice = f"what fits: {'; or '.join(found)}"
    else:
        advice = (
            "no capacity, number of sequences or form of weights fits; a smaller model, or a smaller dtype, "
            "prefill_chunk or decode_rows may"
        )
    raise PlanError(
        f"the plan needs {size(need.peak)} ({need.peak} bytes), {budget} ({budget.nbytes} bytes): {need}, with "
        f"capacity {options.capacity} for each of {options.max_sequences} sequences in {plan.target.pages} pages, "
        f"weights {options.weights}; {advice}"
    )


def _entries(group: StateGroup) -> str:
    """`states, 4 layers of k, v`."""
    count, names = len(group.states), dict.fromkeys(part.name for state in group.states for part in state.parts)
    reach = f", {group.window} tokens back" if group.window else ""
    return f"states, {count} layer{'s' * (count > 1)} of {', '.join(names)}{reach}"


def _laid_out(spec: TensorSpec) -> int:
    """Bytes of an array; those that hold a number a row lie in blocks, each at a multiple of 256 bytes."""
    return -(-spec.nbytes() // _ALIGNMENT) * _ALIGNMENT if len(spec.shape) == 1 else spec.nbytes()


def _is_packed(name: str, spec: TensorSpec) -> bool:
    return len(spec.shape) == 1 or name.endswith("page_table")


def _tables(plan: PlanRecord) -> Iterable[int]:
    """Bytes of the known tokens of every lane, then of each role's ledger."""
    lanes = plan.options.max_sequences
    yield lanes * (4 * (plan.target.capacity + 1) + 57 + 8 * len(plan.roles))
    for role in plan.roles:
        yield RoleLedger.table_bytes(lanes, role.capacity, role.page_size, role.pages)


def _making(role: RolePlan) -> int:
    """Bytes that making one weight takes at most beside the weight itself, before it is put where it stays.

    A weight is joined or converted, then laid out; the parts of a quantised one are made together, from some rows of
    its sources at a time.
    """
    most = 0
    together: dict[tuple[tuple[str, ...], str], list[Parameter]] = {}
    for parameter in role.parameters:
        together.setdefault((parameter.sources, parameter.derive.partition(".")[0]), []).append(parameter)
    for (sources, scheme), parameters in together.items():
        copies = 1 + (parameters[0].layout != ROWS) + (bool(scheme) and len(sources) > 1)
        each = [parameter.value.spec.nbytes() for parameter in parameters]
        working = working_bytes(max(each) * 8 // SCHEMES[scheme].bits) if scheme else 0
        most = max(most, copies * (sum(each) if scheme else max(each)) + working)
    return most
