"""Op contracts: the declaration around the plain function that defines an op.

Owns `Argument`, `OpContract`, `Case`, `Cost` and `Tolerance`. What always holds: the function is the op's meaning, it
is what the reference backend runs, and run in float64 it is the oracle; shapes and dtypes are inferred by matching
named dimensions, so a contract and its function cannot disagree unnoticed (the cases run both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from slotwise.core.errors import ContractError, GraphError, nearest
from slotwise.core.graph import Attr, Effect
from slotwise.core.layouts import LAYOUTS, OCTET, ROWS, fits
from slotwise.core.specs import Dim, DType, TensorSpec, dim_size

CacheEffect = Literal["pure", "reads", "writes"]


@dataclass(frozen=True, slots=True)
class Argument:
    """An input or output: its name, named dimensions, and dtype.

    `dtype` is a `DType`, several of which one is meant, or the name of a dtype variable: all arguments that say
    `"float"` share one floating-point type. `dims` are names to be matched (`"T"`), sizes, or a name plus a constant
    (`"B+1"`). `cache` marks a K/V cache: `reads`, or `writes` when the op changes it in place. `word` marks a matrix of
    which the attribute `layout` speaks (`core/layouts.py`), `joined` how many matrices of equal size it is. Numbers
    of an output that names a dimension in `below` are from 0 to below its size, in every row.
    """

    name: str
    dims: tuple[Dim, ...]
    dtype: DType | tuple[DType, ...] | str = "float"
    optional: bool = False
    cache: CacheEffect = "pure"
    word: int = 0
    joined: int = 1
    below: str = ""

    def stands_in_octets(self, spec: TensorSpec) -> bool:
        """Whether this matrix, of `spec`, can stand in octets, each of its joined parts in octets of its own."""
        rows, columns = spec.sizes()
        return rows % self.joined == 0 and fits(rows // self.joined, columns, self.word)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call must at least do: bytes moved between memory and the chip, and floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Tolerance:
    """`|got - oracle| <= absolute + relative * |oracle|`; both zero means bit-equal to the rounded oracle."""

    absolute: float
    relative: float

    def around(self, oracle: torch.Tensor) -> torch.Tensor:
        """How far from each element of `oracle`, float64, a kernel may be; what is not finite has no size to go by."""
        size = oracle.abs()
        return self.absolute + self.relative * torch.where(size.isfinite(), size, 0.0)


# Attributes by what they hold: whole numbers with their least value, one of a few numbers, and finite numbers from 0;
# all others are names.
COUNTS = {
    "layer": 0,
    "window": 0,
    "stream": 0,
    "page_size": 1,
    "heads": 1,
    "q_heads": 1,
    "kv_heads": 1,
    "head_dim": 1,
}
CHOICES: Mapping[str, tuple[Attr, ...]] = {"bits": (4, 8), "layout": LAYOUTS}
NUMBERS = frozenset({"eps", "scale", "softcap", "weight_offset"})

EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Case:
    """One input for validation: tensors in argument order (None for an optional one left out) and attributes.

    Floating-point tensors come in float64; a test rounds them to the dtype under test first, so that the oracle sees
    the very numbers that the kernel sees.
    """

    name: str
    inputs: tuple[torch.Tensor | None, ...]
    attrs: Mapping[str, Attr] = field(default_factory=dict)


Inputs = tuple[torch.Tensor | None, ...]
RowPicker = Callable[[Inputs, Sequence[int]], Inputs]
CaseMaker = Callable[[torch.Generator], Iterable[Case]]
CostRule = Callable[[Mapping[str, int], int, Mapping[str, Attr]], Cost]


@dataclass(frozen=True, slots=True)
class OpContract:
    """The declaration of an op. `required` attributes must be given; `defaults` may be left out.

    `function(*inputs, **attrs)` returns a tensor or a tuple in the order of `outputs` (None when there are none); an
    argument with `cache="writes"` is changed in place. `rows` names the dimension over which rows are independent (row
    invariance speaks of it); None when the op has no such dimension. `state` is the kind of state that it touches,
    `span` the part of it in words. `logical` ops give meaning to a model graph and are lowered before kernels are
    chosen.

    `output_dims` gives the dimensions that only outputs have; `fits(specs, attrs)` raises GraphError where inputs that
    match one by one do not belong together.

    `pick_rows(inputs, rows)` gives the inputs of a call on some rows alone, in that order, repeats allowed. It is
    needed only where indexing every argument that starts with the row dimension does not do it (ragged batches, edits).
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    cost: CostRule
    cases: CaseMaker
    tolerance: Mapping[DType, Tolerance]
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Attr] = field(default_factory=dict)
    rows: str | None = "T"
    output_dims: Callable[[Mapping[str, Attr], Mapping[str, Dim]], Mapping[str, Dim]] | None = None
    state: str = ""
    span: str = ""
    logical: bool = False
    pick_rows: RowPicker | None = None
    fits: Callable[[Sequence[TensorSpec | None], Mapping[str, Attr]], None] | None = None

    def inputs_of_rows(self, inputs: Inputs, rows: Sequence[int]) -> Inputs:
        """The inputs of a call on `rows` alone, in that order; raises ContractError when no dimension is the rows'."""
        if self.rows is None:
            raise ContractError(f"op {self.name} has no row dimension, so there is no call on some of its rows")
        if self.pick_rows is not None:
            return self.pick_rows(inputs, rows)
        return tuple(
            value[list(rows)] if value is not None and argument.dims[:1] == (self.rows,) else value
            for argument, value in zip(self.inputs, inputs, strict=True)
        )

    def complete_attrs(self, attrs: Mapping[str, Attr]) -> dict[str, Attr]:
        """`attrs` with defaults filled in; raises GraphError for a missing or unknown attribute."""
        known = (*self.required, *self.defaults)
        for name in attrs:
            if name not in known:
                raise GraphError(f"op {self.name} has no attribute {name!r}{nearest(name, known)}; it takes {known}")
        missing = [name for name in self.required if name not in attrs]
        if missing:
            raise GraphError(f"op {self.name} needs the attributes {missing}; given were {sorted(attrs)}")
        for name, value in attrs.items():
            _check_attribute(self.name, name, value)
        return {**self.defaults, **attrs}

    def match(
        self, specs: Sequence[TensorSpec | None], attrs: Mapping[str, Attr]
    ) -> tuple[dict[str, Dim], dict[str, DType]]:
        """Match input specs against the declared dimensions and dtypes; returns what each name stands for.

        Raises GraphError naming the argument, what was expected and what was found.
        """
        if len(specs) != len(self.inputs):
            names = ", ".join(a.name for a in self.inputs)
            raise GraphError(f"op {self.name} takes {len(self.inputs)} inputs ({names}); {len(specs)} were given")
        dims: dict[str, Dim] = {}
        dtypes: dict[str, DType] = {}
        for argument, spec in zip(self.inputs, specs, strict=True):
            if spec is None:
                if not argument.optional:
                    raise GraphError(f"op {self.name}: input {argument.name!r} is missing and is not optional")
                continue
            self._match_dtype(argument, spec, dtypes)
            self._match_dims(argument, spec, dims)
            if argument.word and attrs.get("layout", ROWS) != ROWS and not argument.stands_in_octets(spec):
                raise GraphError(
                    f"op {self.name}: in octets, {argument.name} must have rows in a multiple of "
                    f"{OCTET * argument.joined} and columns in a multiple of {argument.word}, is {spec}"
                )
        if self.fits is not None:
            self.fits(specs, attrs)
        if self.output_dims is not None:
            dims.update(self.output_dims(attrs, dims))
        return dims, dtypes

    def infer(self, specs: Sequence[TensorSpec | None], attrs: Mapping[str, Attr]) -> tuple[TensorSpec, ...]:
        """Output specs for these input specs; raises GraphError when they do not fit the contract."""
        dims, dtypes = self.match(specs, attrs)
        return tuple(
            TensorSpec(self._output_dtype(a, dtypes), tuple(_substitute(d, dims) for d in a.dims)) for a in self.outputs
        )

    def effects_of(self, attrs: Mapping[str, Attr]) -> tuple[Effect, ...]:
        """The effects on states of a node with these attributes (`layer` says whose)."""
        kinds = {a.cache for a in self.inputs if a.cache != "pure"}
        if self.logical and self.span:
            kinds = {"reads", "writes"}
        if not kinds:
            return ()
        state = f"{self.state}{attrs['layer']}"
        found: list[Effect] = []
        if "writes" in kinds:
            found.append(Effect("writes", state, self.span))
        if "reads" in kinds:
            found.append(Effect("reads", state, self.span))
        return tuple(found)

    def call_cost(self, specs: Sequence[TensorSpec | None], attrs: Mapping[str, Attr]) -> Cost:
        """The cost of a call with bound specs (every dimension an integer)."""
        dims, dtypes = self.match(specs, attrs)
        sizes = {name: dim_size(dim, {}) for name, dim in dims.items()}
        return self.cost(sizes, dtypes.get("float", DType.F32).itemsize, attrs)

    def _output_dtype(self, argument: Argument, dtypes: Mapping[str, DType]) -> DType:
        if isinstance(argument.dtype, tuple):
            raise ContractError(f"op {self.name}: output {argument.name!r} must have one dtype, not a choice")
        return dtypes[argument.dtype] if isinstance(argument.dtype, str) else argument.dtype

    def _match_dtype(self, argument: Argument, spec: TensorSpec, dtypes: dict[str, DType]) -> None:
        if not isinstance(argument.dtype, str):
            choice = argument.dtype if isinstance(argument.dtype, tuple) else (argument.dtype,)
            if spec.dtype not in choice:
                expected = " or ".join(dtype.value for dtype in choice)
                raise GraphError(f"op {self.name}: input {argument.name!r} must be {expected}, is {spec}")
            return
        known = dtypes.setdefault(argument.dtype, spec.dtype)
        if not spec.dtype.is_float or known is not spec.dtype:
            raise GraphError(
                f"op {self.name}: input {argument.name!r} must be a floating-point tensor of dtype {known.value} like "
                f"the others, is {spec}"
            )

    def _match_dims(self, argument: Argument, spec: TensorSpec, dims: dict[str, Dim]) -> None:
        if len(spec.shape) != len(argument.dims):
            raise GraphError(
                f"op {self.name}: input {argument.name!r} must have the dimensions {argument.dims}, is {spec}"
            )
        for declared, actual in zip(argument.dims, spec.shape, strict=True):
            if isinstance(declared, int):
                expected: Dim = declared
            else:
                name, _, constant = declared.partition("+")
                if name not in dims:
                    dims[name] = _minus(actual, int(constant or 0))
                expected = _substitute(declared, dims)
            if expected != actual:
                raise GraphError(
                    f"op {self.name}: input {argument.name!r} is {spec}, but dimension {declared} must be {expected} "
                    f"(from {dims})"
                )


def _check_attribute(op: str, name: str, value: Attr) -> None:
    """An attribute means the same in every op, so its range is known by its name."""
    if name in COUNTS:
        low = COUNTS[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise GraphError(f"op {op}: attribute {name} must be an integer of {low} or more, is {value!r}")
    elif name in CHOICES:
        if isinstance(value, bool) or value not in CHOICES[name]:
            expected = " or ".join(map(str, CHOICES[name]))
            raise GraphError(f"op {op}: attribute {name} must be {expected}, is {value!r}")
    elif name in NUMBERS:
        if isinstance(value, (str, bool)) or not math.isfinite(value) or value < 0:
            raise GraphError(f"op {op}: attribute {name} must be a finite number of 0 or more, is {value!r}")
    elif not isinstance(value, str):
        raise GraphError(f"op {op}: attribute {name} must be a name, is {value!r}")


def _substitute(dim: Dim, dims: Mapping[str, Dim]) -> Dim:
    """`dim` with its name replaced by what it was matched to."""
    if isinstance(dim, int):
        return dim
    name, _, constant = dim.partition("+")
    if name not in dims:
        raise ContractError(f"dimension {dim!r} is used but no input gives it; known are {dict(dims)}")
    base = dims[name]
    if not constant:
        return base
    if isinstance(base, int):
        return base + int(constant)
    stem, _, added = base.partition("+")
    return f"{stem}+{int(added or 0) + int(constant)}"


def _minus(dim: Dim, constant: int) -> Dim:
    if constant == 0:
        return dim
    if isinstance(dim, int):
        return dim - constant
    stem, _, added = dim.partition("+")
    left = int(added or 0) - constant
    if left < 0:
        raise GraphError(f"dimension {dim!r} is too small: {constant} cannot be taken from it")
    return f"{stem}+{left}" if left else stem
