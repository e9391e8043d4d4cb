"""Attention over paged caches, and the cache write.

Owns the kernels of `attention` and `write_slots`. What always holds: `attention.by_row` gives the function one query
row at a time, as a sequence that ends at that row's position, so a row's bits depend on its query and its sequence's
keys and values up to it alone: not on other rows, other sequences or which pages hold the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from slotwise.backends.reference.binding import whole
from slotwise.core.backend import CallSpec, Kernel, Launch, Tensors
from slotwise.core.errors import BackendError
from slotwise.core.graph import Attr
from slotwise.core.ops import contract_of


def _refuses(call: CallSpec) -> str | None:
    dims = call.contract.match(call.inputs, call.attrs)[0]
    q_heads, kv_heads = dims["Hq"], dims["Hkv"]
    if isinstance(q_heads, int) and isinstance(kv_heads, int) and q_heads % kv_heads:
        return f"{q_heads} query heads cannot share {kv_heads} key and value heads evenly"
    return None


def _bind_by_row(
    inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Mapping[str, Attr], _: torch.Tensor | None
) -> Launch:
    q, k_cache, v_cache, row_start, kv_len, page_table = inputs
    (out,) = outputs
    if q is None or row_start is None or kv_len is None or page_table is None:
        raise BackendError("attention.by_row: an input is missing; all six of the contract are needed")
    function = functools.partial(contract_of("attention").function, **attrs)
    queries = [q[row : row + 1] for row in range(len(q))]
    results = [out[row : row + 1] for row in range(len(q))]
    tables = [page_table[b : b + 1] for b in range(len(page_table))]
    query = torch.empty_like(q[:1])  # fresh memory, so that no row's alignment differs
    one_row = torch.tensor([0, 1], dtype=torch.int32, device=q.device)
    length = torch.zeros(1, dtype=torch.int32, device=q.device)

    def launch() -> None:
        starts, lengths = row_start.tolist(), kv_len.tolist()
        for b, table in enumerate(tables):
            last = starts[b + 1]
            for row in range(starts[b], last):
                query.copy_(queries[row])
                length.fill_(lengths[b] - last + row + 1)
                results[row].copy_(function(query, k_cache, v_cache, one_row, length, table))
        if starts[-1] < len(queries):
            out[starts[-1] :].zero_()

    return launch


KERNELS = (
    whole("write_slots"),
    Kernel("attention", "attention.by_row", _bind_by_row, _refuses),
    whole("attention", invariant_rows=0, refuses=_refuses),
)
