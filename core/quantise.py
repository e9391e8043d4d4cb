"""Quantised weights: the schemes, the layout of their codes, and how a weight becomes codes, scales and offsets.

Owns `GROUP`, `SCHEMES`, `quantise`, `dequantise`. What always holds: a group is 32 consecutive elements of one row;
codes are computed against the scale and offset as they are stored, rounded to float16; a weight is worked on some rows
at a time, so the memory that it takes beside the result is bounded; a weight that cannot be held is an error that
names it, never infinity or NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slotwise.core.errors import CheckpointError, OptionError, nearest
from slotwise.core.specs import DType, TensorSpec

GROUP = 32
"""Elements along K that share a scale (and an offset)."""

Quantised = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Codes, scale and offset; None where the scheme has no offset."""

_CHUNK = 1 << 22
"""Elements worked on at once: 16 MiB as float32."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantise: the bits of a code, and the tensors (`parts`) that make a weight, in the ops' order."""

    name: str
    bits: int
    parts: tuple[str, ...]

    def specs(self, rows: int, columns: int) -> Mapping[str, TensorSpec]:
        """Part -> spec, for a weight [rows, columns]; `columns` is a multiple of `GROUP`."""
        codes = TensorSpec(DType.I8, (rows, columns)) if self.bits == 8 else TensorSpec(DType.U8, (rows, columns // 2))
        per_group = TensorSpec(DType.F16, (rows, columns // GROUP))
        return {part: codes if part == "codes" else per_group for part in self.parts}


SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8", 8, ("codes", "scale")),
        Scheme("int4", 4, ("codes", "scale")),
        Scheme("int4_zp", 4, ("codes", "scale", "offset")),
    )
}


PARTS = ("codes", "scale", "offset")
"""What a quantised weight is made of, in the order of `Quantised` and of the ops' inputs."""

DERIVATIONS = frozenset(f"{scheme.name}.{part}" for scheme in SCHEMES.values() for part in scheme.parts)
"""Every way in which a graph's parameter can be derived from its sources, as in `int8.codes`."""


def quantise(weight: torch.Tensor, scheme: str, *, name: str = "the weight") -> Quantised:
    """`weight` [N, K] of any float dtype as codes, scale and offset, laid out as `core/ops/linear_q.py` says.

    `int8`: scale = max |w| / 127, codes -127 .. 127. `int4`: codes 0 .. 15 for (code - 8) * scale, the scale of either
    sign chosen for the least squared error among a few; the element furthest from 0 gets the code below 8, of which
    there is one more. `int4_zp`: codes 0 .. 15 over the span from the least to the greatest element. Under `int8` and
    `int4_zp` no element is off by more than half a scale. `name` is what errors call the weight.

    Raises OptionError for an unknown scheme, CheckpointError for a K that is no multiple of `GROUP`, for NaN or
    infinity, and for a scale or offset beyond float16.
    """
    found = scheme_of(scheme)
    rows, columns = weight.shape
    if columns % GROUP:
        raise CheckpointError(
            f"{name} is [{rows}, {columns}]: {scheme} quantises groups of {GROUP} along its rows, and {columns} is no "
            f"multiple of {GROUP}; keep it as it is with weights='native'"
        )
    specs = found.specs(rows, columns)
    made = {part: torch.empty(spec.sizes(), dtype=spec.dtype.torch) for part, spec in specs.items()}
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        groups = weight[start : start + step].to(torch.float32).reshape(-1, GROUP)
        codes, scale, offset = _solve(groups, scheme, name)
        for part, values in (("scale", scale), ("offset", offset)):
            if values is None:
                continue
            if not bool(values.isfinite().all()):
                raise CheckpointError(
                    f"{name} is too large for {scheme}: rows {start} to {min(start + step, rows) - 1} hold values up "
                    f"to {float(groups.abs().max()):.3g}, whose {part} is beyond float16 (65504); use weights='native'"
                )
            made[part][start : start + step] = values.view(-1, columns // GROUP)
        codes = codes.view(-1, columns)
        made["codes"][start : start + step] = codes if found.bits == 8 else pack(codes)
    return made["codes"], made["scale"], made.get("offset")


def working_bytes(elements: int) -> int:
    """Bytes that `quantise` takes at most, beside its result, for a weight of so many elements.

    A float32 copy, codes before they are packed, spans and scales, of one chunk: 8.4 bytes an element were measured.
    """
    return 10 * min(elements, _CHUNK)


def dequantise(
    codes: torch.Tensor,
    scale: torch.Tensor,
    offset: torch.Tensor | None,
    *,
    bits: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The weight [N, K] that `codes`, `scale` and `offset` stand for, computed in `dtype`."""
    values = codes if bits == 8 else unpack(codes)
    groups = values.view(len(values), -1, GROUP).to(dtype)
    if bits == 4 and offset is None:
        groups -= 8
    groups *= scale.to(dtype)[..., None]
    if offset is not None:
        groups += offset.to(dtype)[..., None]
    return groups.view(values.shape)


def derive(weight: torch.Tensor, how: str, *, name: str = "the weight") -> torch.Tensor:
    """The part of the quantised `weight` that `how`, one of `DERIVATIONS`, names; raises as `quantise` does."""
    scheme, _, part = how.partition(".")
    made = quantise(weight, scheme, name=name)[PARTS.index(part)] if how in DERIVATIONS else None
    if made is None:
        raise OptionError(f"{how!r} is no way to derive a weight; there are {', '.join(sorted(DERIVATIONS))}")
    return made


def scheme_of(name: str) -> Scheme:
    """The scheme called `name`; raises OptionError when there is none."""
    if name not in SCHEMES:
        raise OptionError(f"scheme {name!r} is not known{nearest(str(name), SCHEMES)}; there are {', '.join(SCHEMES)}")
    return SCHEMES[name]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes [N, K] (0 .. 15, any integer dtype) as bytes [N, K / 2].

    Byte j of a group's 16 holds the code of element j in its low half and of element j + 16 in its high half.
    """
    halves = codes.to(torch.uint8).view(len(codes), -1, 2, GROUP // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).view(len(codes), -1)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """What `pack` packed: uint8 [N, K]."""
    bytes_of = packed.view(len(packed), -1, 1, GROUP // 2)
    return torch.cat((bytes_of & 15, bytes_of >> 4), dim=2).view(len(packed), -1)


def _solve(groups: torch.Tensor, scheme: str, name: str) -> Quantised:
    """Codes int8 [G, 32], scale and offset f16 [G] of finite groups float32 [G, 32]."""
    from slotwise.core import scales  # Numba takes a moment to import

    low, high, is_finite = scales.spans(groups)
    if not is_finite:
        raise CheckpointError(f"{name} holds a value that is not a finite float32, so it has no {scheme} form")
    if scheme == "int8":
        scale = _up(torch.maximum(high, -low) / 127)
        return scales.encode(groups, scale, None, -127, 127), scale, None
    if scheme == "int4":
        exact = scales.least_squares_scales(groups)
        near = exact.to(torch.float16)
        # A scale too small for float16's full precision is rounded away from 0: no code then clips for want of a bit.
        scale = torch.where(near.abs() < 2.0**-14, _up(exact.abs()).copysign(exact), near)
        return scales.encode(groups, scale, None, -8, 7) + 8, scale, None
    offset = _down(low)
    scale = _up((high - offset.float()) / 15)
    return scales.encode(groups, scale, offset, 0, 15), scale, offset


def _up(values: torch.Tensor) -> torch.Tensor:
    """The least float16 that is no less than each value (0 or more)."""
    near = values.to(torch.float16)
    return torch.where(near.float() < values, torch.nextafter(near, torch.full_like(near, torch.inf)), near)


def _down(values: torch.Tensor) -> torch.Tensor:
    """The greatest float16 that is no greater than each value."""
    near = values.to(torch.float16)
    return torch.where(near.float() > values, torch.nextafter(near, torch.full_like(near, -torch.inf)), near)
