"""Dtypes and tensor specs with named dimensions.

Owns `DType`, `Dim` and `TensorSpec`. What always holds: a dimension is a size (0 or more) or a name such as `T` (token
rows), `B` (sequences), `R` (logit rows), `P` (page-table columns), `S` (cache slots), `M` (rotary positions),
optionally with an integer added (`B+1`); a spec becomes sizes only through `sized`, with every name given.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slotwise.core.errors import GraphError, OptionError, nearest

Dim = int | str
"""A size, or the name of one (`"T"`), or a name plus a constant (`"B+1"`)."""


class DType(enum.Enum):
    """Element types that values, weights and caches can have; the value is the printed name."""

    F64 = "f64"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @property
    def torch(self) -> torch.dtype:
        """The PyTorch dtype."""
        return _TORCH[self]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _TORCH[self].itemsize

    @property
    def is_float(self) -> bool:
        """Whether this is a floating-point type."""
        return _TORCH[self].is_floating_point

    @classmethod
    def parse(cls, name: str | DType) -> DType:
        """Read `bf16`, `bfloat16`, `float32`, `f32`, ...; raises OptionError for anything else."""
        if isinstance(name, DType):
            return name
        try:
            return _NAMES[name.lower()]
        except (KeyError, AttributeError):
            known = ", ".join(sorted(_NAMES))
            hint = nearest(str(name), _NAMES)
            raise OptionError(f"dtype {name!r} is not known{hint}; expected one of {known}") from None

    @classmethod
    def of(cls, tensor: Tensor) -> DType:
        """The dtype of a tensor; raises OptionError for one that has no place here."""
        if tensor.dtype not in _FROM_TORCH:
            known = ", ".join(dtype.value for dtype in cls)
            raise OptionError(f"tensors of {tensor.dtype} are not supported; convert to one of {known}")
        return _FROM_TORCH[tensor.dtype]


_TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.I8: torch.int8,
    DType.U8: torch.uint8,
    DType.BOOL: torch.bool,
}
_DIM = re.compile(r"[0-9]+|[A-Za-z_]\w*(\+[0-9]+)?")
_FROM_TORCH = {value: key for key, value in _TORCH.items()}
COMPUTING = (DType.F32, DType.F16, DType.BF16)
"""What a model can be computed in."""
_NAMES = {d.value: d for d in DType} | {str(t).removeprefix("torch."): d for d, t in _TORCH.items()}


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The integer that `dim` stands for under `sizes`; raises GraphError when its name is not given."""
    if isinstance(dim, int):
        return dim
    name, _, constant = dim.partition("+")
    if name not in sizes:
        raise GraphError(f"dimension {dim!r} has no size; known are {dict(sizes)}")
    return sizes[name] + int(constant or 0)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A dtype and a shape of sizes and names, row-major and dense."""

    dtype: DType
    shape: tuple[Dim, ...]

    def sized(self, sizes: Mapping[str, int]) -> TensorSpec:
        """The same spec with every name replaced by its size."""
        return TensorSpec(self.dtype, tuple(dim_size(d, sizes) for d in self.shape))

    def sizes(self, sizes: Mapping[str, int] | None = None) -> tuple[int, ...]:
        """The shape as integers; names are looked up in `sizes`."""
        return tuple(dim_size(d, sizes or {}) for d in self.shape)

    def nbytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes of the dense tensor."""
        total = self.dtype.itemsize
        for size in self.sizes(sizes):
            total *= size
        return total

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(map(str, self.shape))}]"


def parse_spec(text: str) -> TensorSpec:
    """Read what `str(TensorSpec)` printed; raises GraphError when it is no spec."""
    head, bracket, rest = text.partition("[")
    if not bracket or not rest.endswith("]"):
        raise GraphError(f"{text!r} is no tensor spec; expected something like 'f32[T, 64]'")
    parts = [part.strip() for part in rest[:-1].split(",")] if rest != "]" else []
    for part in parts:
        if not _DIM.fullmatch(part):
            raise GraphError(f"{text!r} is no tensor spec: {part!r} is neither a size nor a name like 'T' or 'B+1'")
    try:
        dtype = DType.parse(head)
    except OptionError as error:
        raise GraphError(f"{text!r} is no tensor spec: {error}") from None
    return TensorSpec(dtype, tuple(int(part) if part.isdecimal() else part for part in parts))
