"""Which of the engine's arrays a program reads and writes.

Owns `input_array` and `output_arrays`. What always holds: an array is one name for one shape of row, shared by all
programs that speak of the same thing; page tables, whose width is a role's, are that role's own, and so are rows of
logits and scores over fewer token ids than the target has: the draft model's, where its vocabulary is the smaller one.
"""

from __future__ import annotations

from slotwise.core.graph import Value
from slotwise.plans.program import Program
from slotwise.plans.sampling import output_names
from slotwise.slots.step import DRAFT

OVER_IDS = ("logits", "scores")
"""Arrays with a column for each token id."""


def rows_array(name: str, width: int, vocab_size: int) -> str:
    """The array for rows of `name`, one of `OVER_IDS`, over `width` ids, where the target has `vocab_size`."""
    return name if width >= vocab_size else f"{DRAFT}.{name}"


def input_array(program: Program, value: Value, vocab_size: int) -> str:
    """The array that the program reads as its input `value`; `vocab_size` is the target's."""
    if value.name == "page_table":
        return f"{program.role}.page_table"
    return _array(value.name, value, vocab_size)


def output_arrays(program: Program, acceptance: str, vocab_size: int) -> tuple[str, ...]:
    """The arrays that hold the program's outputs, in the order of its graph's outputs."""
    names = output_names(program.kind, acceptance)
    if len(names) != len(program.graph.outputs):
        return names  # no plan that passes verification has such a program
    return tuple(_array(name, value, vocab_size) for name, value in zip(names, program.graph.outputs, strict=True))


def _array(name: str, value: Value, vocab_size: int) -> str:
    return rows_array(name, int(value.spec.shape[-1]), vocab_size) if name in OVER_IDS else name
