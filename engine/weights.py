"""A role's parameters as tensors.

Owns `load_weights`. What always holds: parameters with the same sources, derivation, layout and spec share one tensor;
every tensor begins on a cache line, so that no kernel rounds by where a file happens to hold it; a source that is
quantised is read once for all its parts; a tensor of the wrong shape is a PlanError that names it, before anything is
made of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from slotwise.core.errors import PlanError
from slotwise.core.graph import Parameter
from slotwise.core.layouts import laid_out
from slotwise.core.model import WeightSource
from slotwise.core.quantise import GROUP, PARTS, SCHEMES, quantise
from slotwise.engine.memory import Shelf

ALIGNED = 64
"""Bytes. PyTorch's float32 products on a CPU take other paths, with other bits, for a weight that is not aligned."""

Progress = Callable[[str, int, int], None]
"""Called as (what, done, total) during long work."""


def load_weights(
    parameters: tuple[Parameter, ...], source: WeightSource, role: str, progress: Progress | None
) -> dict[str, torch.Tensor]:
    """Parameters by name: a mapped view where dtype, shape and place in memory fit already, one copy that joins,
    converts or aligns, or what is derived from the sources. What is not mapped stands together in one memory.
    """
    shared: dict[tuple[object, ...], torch.Tensor] = {}
    found = {}
    sizes = {_key(parameter): Shelf.room(parameter.value.spec.nbytes()) for parameter in parameters}
    shelf = Shelf(sum(sizes.values()))
    for done, parameter in enumerate(parameters):
        key = _key(parameter)
        if key not in shared and parameter.derive:
            scheme = parameter.derive.partition(".")[0]
            siblings = [p for p in parameters if p.sources == parameter.sources and _scheme(p) == scheme]
            made = _quantised(siblings, scheme, source, role)
            shared.update({each: shelf.keep(tensor) for each, tensor in made.items()})
        elif key not in shared:
            parts = [source.tensor(name, parameter.value.spec) for name in parameter.sources]
            weight = laid_out(_join(parts, parameter, role), parameter.word, parameter.layout)
            fits = weight is parts[0] and weight.data_ptr() % ALIGNED == 0
            shared[key] = weight if fits else shelf.keep(weight)
        found[parameter.value.name] = shared[key]
        if progress is not None:
            progress(f"loading {role}", done + 1, len(parameters))
    return found


def _key(parameter: Parameter) -> tuple[object, ...]:
    return parameter.sources, parameter.derive, parameter.layout, parameter.value.spec


def _scheme(parameter: Parameter) -> str:
    return parameter.derive.partition(".")[0]


def _quantised(
    parameters: list[Parameter], scheme: str, source: WeightSource, role: str
) -> dict[tuple[object, ...], torch.Tensor]:
    """The parts of one quantised weight, `parameters`, by key; each source is read once."""
    first = parameters[0]
    tensors = [source.tensor(name, first.value.spec) for name in first.sources]
    rows, columns = _joined_shape(tensors, first, role, dimensions=2)
    specs = SCHEMES[scheme].specs(rows, columns) if columns % GROUP == 0 else {}
    for parameter in parameters:
        part = parameter.derive.partition(".")[2]
        if specs.get(part) != parameter.value.spec:
            raise _misfit(parameter, role, f"[{rows}, {columns}], whose {scheme} {part} is {specs.get(part, 'none')},")
    made = [quantise(t, scheme, name=f"{role}: {n}") for t, n in zip(tensors, first.sources, strict=True)]
    found: dict[tuple[object, ...], torch.Tensor] = {}
    for parameter in parameters:
        place = PARTS.index(parameter.derive.partition(".")[2])
        parts = [each for one in made if (each := one[place]) is not None]
        key = _key(parameter)
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[key] = laid_out(joined, parameter.word, parameter.layout)
    return found


def _join(parts: list[torch.Tensor], parameter: Parameter, role: str) -> torch.Tensor:
    spec = parameter.value.spec
    shape = _joined_shape(parts, parameter, role)
    if shape != spec.sizes():
        raise _misfit(parameter, role, str(list(shape)))
    if len(parts) == 1 and parts[0].dtype == spec.dtype.torch and parts[0].is_contiguous():
        return parts[0]
    joined = torch.empty(shape, dtype=spec.dtype.torch)
    start = 0
    for part in parts:
        joined[start : start + part.shape[0]].copy_(part)
        start += part.shape[0]
    return joined


def _joined_shape(
    parts: list[torch.Tensor], parameter: Parameter, role: str, dimensions: int | None = None
) -> tuple[int, ...]:
    """The shape of `parts` joined along dimension 0."""
    rest = parts[0].shape[1:]
    if any(part.shape[1:] != rest for part in parts) or dimensions not in (None, 1 + len(rest)):
        raise _misfit(parameter, role, " and ".join(str(list(part.shape)) for part in parts))
    return (sum(part.shape[0] for part in parts), *rest)


def _misfit(parameter: Parameter, role: str, found: str) -> PlanError:
    return PlanError(
        f"{role}: weight {parameter.value.name} must be {parameter.value.spec}, the checkpoint gives {found} from "
        f"{', '.join(parameter.sources)}; was the plan made for another checkpoint?"
    )
