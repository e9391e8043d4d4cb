"""What a user decides about a plan.

Owns `PlanOptions` and the backend preference. What always holds: every field is validated when the record is made, with
an OptionError that names it; a preference is an ordered list of backends per op, `*` for all ops without their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from slotwise.core.errors import OptionError, nearest
from slotwise.core.ops import contracts
from slotwise.core.quantise import SCHEMES
from slotwise.core.specs import DType

Preference = tuple[tuple[str, tuple[str, ...]], ...]
BackendChoice = str | Sequence[str] | Mapping[str, str | Sequence[str]]

ANY_OP = "*"
MAX_SPECULATE = 63
ACCEPTANCE_RULES = ("coupled", "rejection")
NATIVE = "native"
WEIGHTS = (NATIVE, *SCHEMES)


def parse_preference(choice: BackendChoice | Preference) -> Preference:
    """`"reference"`, `["a", "b"]`, `{"*": "a", "attention": ["b", "a"]}` or a preference, as a preference.

    Raises OptionError for an unknown op or an empty list; whether a backend exists is seen when it is loaded.
    """
    if isinstance(choice, str):
        items: list[tuple[str, Any]] = [(ANY_OP, choice)]
    elif isinstance(choice, Mapping):
        items = list(choice.items())
    elif not isinstance(choice, Sequence):
        raise OptionError(f"backend must be a name, a list of names, or either of them per op; is {choice!r}")
    elif choice and all(isinstance(entry, tuple) and len(entry) == 2 for entry in choice):
        items = [(str(entry[0]), entry[1]) for entry in choice]
    else:
        items = [(ANY_OP, choice)]
    found: dict[str, tuple[str, ...]] = {}
    for op, names in items:
        if op != ANY_OP and op not in contracts():
            raise OptionError(f"backend preference for op {op!r}: no such op{nearest(op, contracts())}")
        ordered = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Sequence) else ()
        if not ordered or not all(isinstance(name, str) and name for name in ordered):
            raise OptionError(f"backend preference for op {op!r} must be one or more backend names, is {names!r}")
        found[op] = ordered
    if ANY_OP not in found:
        raise OptionError("a backend preference per op also needs '*', the backends of all other ops")
    return tuple(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of a plan; the defaults suit a laptop.

    `capacity` is the most tokens of one sequence, prompt included (0: the model's own maximum, at most 4096); `pages`
    is the number of pages of each role's pool (0: enough for `max_sequences` full sequences); `speculate` is the
    greatest draft width; `prefill_chunk` is the most prompt rows of one prefill call; `decode_rows` the most rows of
    one decode-side call. `dtype` None computes in the checkpoint's dtype. `weights` says how the matrices of
    both models are held: `native`, in the computing dtype, or quantised at load by a scheme of `core/quantise.py`.
    """

    backend: Preference = ((ANY_OP, ("reference",)),)
    capacity: int = 0
    page_size: int = 16
    pages: int = 0
    max_sequences: int = 8
    speculate: int = 5
    acceptance: str = "coupled"
    adaptive: bool = True
    prefill_chunk: int = 256
    decode_rows: int = 64
    share_prefixes: bool = True
    dtype: DType | None = None
    weights: str = NATIVE

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", parse_preference(self.backend))
        if self.dtype is not None:
            object.__setattr__(self, "dtype", DType.parse(self.dtype))
            if not DType.parse(self.dtype).is_float:
                raise OptionError(f"dtype must be a floating-point type to compute in, is {self.dtype.value}")
        for name, low, high in (
            ("capacity", 0, 2**30),
            ("page_size", 1, 2**16),
            ("pages", 0, 2**31 - 2),
            ("max_sequences", 1, 2**16),
            ("speculate", 0, MAX_SPECULATE),
            ("prefill_chunk", 1, 2**16),
            ("decode_rows", 1, 2**12),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise OptionError(f"{name} must be an integer from {low} to {high}, is {value!r}")
        for name in ("adaptive", "share_prefixes"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be true or false, is {getattr(self, name)!r}")
        for name, choices in (("acceptance", ACCEPTANCE_RULES), ("weights", WEIGHTS)):
            value = getattr(self, name)
            if value not in choices:
                hint = nearest(str(value), choices)
                raise OptionError(f"{name} must be one of {', '.join(choices)}, is {value!r}{hint}")
        if self.speculate >= self.decode_rows:
            raise OptionError(
                f"speculate {self.speculate} does not fit decode_rows {self.decode_rows}: verifying k drafts takes "
                "k + 1 rows in one call; lower speculate or raise decode_rows"
            )

    def with_changes(self, **changes: Any) -> PlanOptions:
        """The same options with some changed; raises OptionError, with the nearest name, for an unknown one."""
        known = option_names()
        for name in changes:
            if name not in known:
                raise OptionError(f"option {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
        return replace(self, **changes)

    def backends_for(self, op: str) -> tuple[str, ...]:
        """The backends to ask for `op`, in order."""
        table = dict(self.backend)
        return table.get(op, table[ANY_OP])

    @property
    def backend_names(self) -> tuple[str, ...]:
        """Every backend named, in order of first mention, `*` first."""
        ordered = sorted(self.backend, key=lambda item: item[0] != ANY_OP)
        return tuple(dict.fromkeys(name for _, names in ordered for name in names))


def option_names() -> tuple[str, ...]:
    """The names of all options, in order."""
    return tuple(field.name for field in fields(PlanOptions))
