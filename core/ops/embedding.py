"""Embedding and row selection: ops that copy rows.

Owns `embedding` and `take_rows`. What always holds: ids are checked where they enter (prompts, drafts, what a
sampler returns), so neither op needs a sentinel; one that is out of range, negative ones too, raises.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from slotwise.core.contract import Argument, Case, Cost, OpContract
from slotwise.core.layouts import LAYOUTS, ROWS, WEIGHT_WORD, in_rows, laid_out
from slotwise.core.ops.tolerances import BIT_EQUAL, POINTWISE
from slotwise.core.specs import DType


def embedding(token_ids: torch.Tensor, table: torch.Tensor, *, scale: float, layout: str = ROWS) -> torch.Tensor:
    """Rows of `table` [V, H] for `token_ids` [T], times `scale` rounded to the table's dtype (as Gemma defines it)."""
    rows = in_rows(table, WEIGHT_WORD, layout).index_select(0, token_ids.long())
    return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=table.dtype)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows of `x` [T, H] that `rows` [R] names."""
    return x.index_select(0, rows.long())


def _embedding_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, v, h, scale in (("one row", 1, 101, 24, 1.0), ("scaled", 7, 40, 30, 6.25), ("wide", 3, 64, 192, 1.0)):
        ids = torch.randint(0, v, (t,), generator=rng, dtype=torch.int32)
        ids[-1] = v - 1
        table = torch.randn(v, h, generator=rng, dtype=torch.float64)
        for layout in LAYOUTS if v % 8 == 0 else (ROWS,):
            yield Case(
                f"{name}, {layout}", (ids, laid_out(table, WEIGHT_WORD, layout)), {"scale": scale, "layout": layout}
            )


def _take_rows_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, rows in (("last of one", 1, [0]), ("last", 6, [5]), ("some, repeated", 5, [4, 0, 0, 2])):
        x = torch.randn(t, 24, generator=rng, dtype=torch.float64)
        yield Case(name, (x, torch.tensor(rows, dtype=torch.int32)))


CONTRACTS = (
    OpContract(
        name="embedding",
        function=embedding,
        inputs=(Argument("token_ids", ("T",), DType.I32), Argument("table", ("V", "H"), word=WEIGHT_WORD)),
        outputs=(Argument("x", ("T", "H")),),
        cost=lambda d, item, _: Cost(bytes=d["T"] * (4 + 2 * d["H"] * item), flops=d["T"] * d["H"]),
        cases=_embedding_cases,
        tolerance=POINTWISE,
        defaults={"scale": 1.0, "layout": ROWS},
    ),
    OpContract(
        name="take_rows",
        function=take_rows,
        inputs=(Argument("x", ("T", "H")), Argument("rows", ("R",), DType.I32)),
        outputs=(Argument("taken", ("R", "H")),),
        cost=lambda d, item, _: Cost(bytes=d["R"] * (4 + 2 * d["H"] * item), flops=0),
        cases=_take_rows_cases,
        tolerance=BIT_EQUAL,
        rows="R",
    ),
)
