"""Attention over paged, ragged caches, and the logical op it is lowered from.

Owns `attend` (logical), `attention` and `write_slots`. What always holds: row j of a sequence's n rows stands at
position `kv_len - n + j` and sees positions up to its own, no further back than `window`; slot s of a page table's page
p is `p * page_size + s`; one contract serves prefill chunks, decode and verification.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from slotwise.core.contract import Argument, Case, Cost, Inputs, OpContract
from slotwise.core.graph import Attr
from slotwise.core.ops.tolerances import BIT_EQUAL, REDUCTION
from slotwise.core.specs import Dim, DType


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """The last len(q) rows of one sequence: q [n, Hq, D], k and v [kv_len, Hkv, D] -> [n, Hq D]."""
    n, q_heads, head_dim = q.shape
    kv_len, kv_heads, _ = k.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q_heads // kv_heads
    queries = q.to(wide).view(n, kv_heads, group, head_dim).permute(1, 2, 0, 3)
    keys, values = k.to(wide).permute(1, 2, 0), v.to(wide).transpose(0, 1)
    scores = (queries @ keys.unsqueeze(1)) * scale  # [Hkv, group, n, kv_len]
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    position = torch.arange(kv_len - n, kv_len, device=q.device).unsqueeze(1)
    key = torch.arange(kv_len, device=q.device).unsqueeze(0)
    hidden = key > position
    if window > 0:
        hidden |= key <= position - window
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    out = weights @ values.unsqueeze(1)
    return out.permute(2, 0, 1, 3).reshape(n, q_heads * head_dim).to(q.dtype)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Causal attention of one whole sequence: q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq D].

    `window` w > 0 limits a row to its own and the w - 1 positions before; `softcap` c > 0 bends scores to
    `c tanh(score / c)`. In a plan, K and V go through the cache of `layer`.
    """
    return _attend_rows(q, k, v, scale=scale, window=window, softcap=softcap)


def write_slots(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    layer: int,
) -> None:
    """Put row i of `k` and `v` [T, Hkv, D] into slot `slots[i]` of the caches [S, Hkv, D], in place."""
    index = slots.long()
    k_cache.index_copy_(0, index, k)
    v_cache.index_copy_(0, index, v)


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    row_start: torch.Tensor,
    kv_len: torch.Tensor,
    page_table: torch.Tensor,
    *,
    layer: int,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Ragged paged causal attention: q [T, Hq, D] -> [T, Hq D].

    Sequence b owns the rows `row_start[b] .. row_start[b+1]` (none is allowed) and has `kv_len[b]` tokens, its rows'
    included, in the pages `page_table[b]`, in order. Softmax in float32 or wider.
    """
    out = torch.zeros(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    starts, lengths = row_start.tolist(), kv_len.tolist()
    offsets = torch.arange(page_size, device=q.device)
    for b, length in enumerate(lengths):
        first, last = starts[b], starts[b + 1]
        if first == last:
            continue
        pages = page_table[b, : -(-length // page_size)].long()
        slots = (pages.unsqueeze(1) * page_size + offsets).flatten()[:length]
        out[first:last] = _attend_rows(
            q[first:last],
            k_cache.index_select(0, slots),
            v_cache.index_select(0, slots),
            scale=scale,
            window=window,
            softcap=softcap,
        )
    return out


def _attend_dims(attrs: Mapping[str, Attr], dims: Mapping[str, Dim]) -> Mapping[str, Dim]:
    q_heads, head_dim = dims["Hq"], dims["D"]
    return {"HqD": q_heads * head_dim if isinstance(q_heads, int) and isinstance(head_dim, int) else "HqD"}


def _attend_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, t, hq, hkv, d, window, softcap in (
        ("one row", 1, 2, 1, 24, 0, 0.0),
        ("grouped, windowed", 9, 6, 2, 16, 4, 0.0),
        ("soft cap", 7, 2, 2, 24, 0, 2.0),
    ):
        q = torch.randn(t, hq, d, generator=rng, dtype=torch.float64)
        k, v = (torch.randn(t, hkv, d, generator=rng, dtype=torch.float64) for _ in range(2))
        yield Case(name, (q, k, v), {"layer": 0, "scale": d**-0.5, "window": window, "softcap": softcap})


def _paged(
    rng: torch.Generator, rows: Sequence[int], lengths: Sequence[int], page_size: int, spare: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """(row_start, kv_len, page_table, pages): page 0 is scratch; live pages are shuffled; unused entries are 0."""
    need = [-(-length // page_size) for length in lengths]
    pages = 1 + sum(need) + spare
    order = (torch.randperm(pages - 1, generator=rng) + 1).tolist()
    table = torch.zeros(len(rows), max([*need, 1]), dtype=torch.int32)
    for b, count in enumerate(need):
        for column in range(count):
            table[b, column] = order.pop()
    starts = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
    return starts, torch.tensor(lengths, dtype=torch.int32), table, pages


_RAGGED: tuple[tuple[str, tuple[int, ...], tuple[int, ...], int, int, int, int, int, float], ...] = (
    # name, rows, kv_len, page_size, Hq, Hkv, D, window, softcap
    ("first token", (1,), (1,), 16, 2, 1, 24, 0, 0.0),
    ("decode at a page's last slot", (1,), (32,), 16, 6, 2, 32, 0, 0.0),
    ("verify k+1 rows over a page edge", (6,), (35,), 16, 6, 3, 32, 0, 0.0),
    ("ragged batch with an empty draft", (6, 1, 3), (40, 17, 3), 16, 4, 2, 16, 0, 0.0),
    ("sequence without rows", (2, 0, 1), (5, 0, 9), 4, 2, 2, 16, 0, 0.0),
    ("pages of one slot", (3, 1), (7, 4), 1, 4, 4, 16, 0, 0.0),
    ("pages of three, D 24, 3 query heads per kv head", (2, 5), (11, 30), 3, 6, 2, 24, 0, 0.0),
    ("sliding window", (4, 1), (50, 9), 16, 4, 2, 16, 8, 0.0),
    ("soft cap and window", (3, 2), (40, 33), 16, 4, 1, 64, 16, 2.0),
    ("prefill chunk after a prefix", (70,), (101,), 16, 4, 2, 24, 0, 0.0),
    ("D 256, one kv head", (2,), (70,), 16, 4, 1, 256, 0, 0.0),
)


def _attention_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, rows, lengths, page_size, hq, hkv, d, window, softcap in _RAGGED:
        starts, kv_len, table, pages = _paged(rng, rows, lengths, page_size)
        q = torch.randn(sum(rows), hq, d, generator=rng, dtype=torch.float64)
        k, v = (torch.randn(pages * page_size, hkv, d, generator=rng, dtype=torch.float64) for _ in range(2))
        attrs = {"layer": 0, "page_size": page_size, "scale": d**-0.5, "window": window, "softcap": softcap}
        yield Case(name, (q, k, v, starts, kv_len, table), attrs)


def _one_row_sequences(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Each of `rows` as a sequence of its own that ends at the row's position."""
    q, k_cache, v_cache, row_start, kv_len, page_table = (value for value in inputs if value is not None)
    owner = [int((row_start[1:] <= row).sum()) for row in rows]
    lengths = [int(kv_len[b] - row_start[b + 1]) + row + 1 for b, row in zip(owner, rows, strict=True)]
    starts = torch.arange(len(rows) + 1, dtype=torch.int32)
    return q[list(rows)], k_cache, v_cache, starts, torch.tensor(lengths, dtype=torch.int32), page_table[owner]


def _write_cases(rng: torch.Generator) -> Iterable[Case]:
    for name, slots, total in (("one row", [5], 8), ("a page's last slot", [15, 16, 3], 20), ("last slot", [7, 0], 8)):
        k, v = (torch.randn(len(slots), 2, 24, generator=rng, dtype=torch.float64) for _ in range(2))
        caches = (torch.randn(total, 2, 24, generator=rng, dtype=torch.float64) for _ in range(2))
        yield Case(name, (k, v, *caches, torch.tensor(slots, dtype=torch.int32)), {"layer": 0})


def _attention_cost(d: Mapping[str, int], item: int, _: Mapping[str, Attr]) -> Cost:
    """An upper bound: every sequence has its page table full (`slotwise bench` uses bound lengths instead)."""
    kv = min(d["S"], d["B"] * d["P"] * max(1, d["S"] // max(1, d["P"])))
    return Cost(
        bytes=(2 * d["T"] * d["Hq"] * d["D"] + 2 * kv * d["Hkv"] * d["D"]) * item,
        flops=4 * d["T"] * d["Hq"] * d["D"] * kv,
    )


_CACHE = ("S", "Hkv", "D")

CONTRACTS = (
    OpContract(
        name="attend",
        function=attend,
        inputs=(Argument("q", ("T", "Hq", "D")), Argument("k", ("T", "Hkv", "D")), Argument("v", ("T", "Hkv", "D"))),
        outputs=(Argument("out", ("T", "HqD")),),
        cost=lambda d, item, _: Cost(bytes=0, flops=0),
        cases=_attend_cases,
        tolerance=REDUCTION,
        required=("layer", "scale"),
        defaults={"window": 0, "softcap": 0.0},
        rows=None,
        output_dims=_attend_dims,
        state="kv",
        span="the sequence's tokens",
        logical=True,
    ),
    OpContract(
        name="write_slots",
        function=write_slots,
        inputs=(
            Argument("k", ("T", "Hkv", "D")),
            Argument("v", ("T", "Hkv", "D")),
            Argument("k_cache", _CACHE, cache="writes"),
            Argument("v_cache", _CACHE, cache="writes"),
            Argument("slots", ("T",), DType.I32),
        ),
        outputs=(),
        cost=lambda d, item, _: Cost(bytes=4 * d["T"] * d["Hkv"] * d["D"] * item + 4 * d["T"], flops=0),
        cases=_write_cases,
        tolerance=BIT_EQUAL,
        required=("layer",),
        state="kv",
        span="slots",
    ),
    OpContract(
        name="attention",
        function=attention,
        inputs=(
            Argument("q", ("T", "Hq", "D")),
            Argument("k_cache", _CACHE, cache="reads"),
            Argument("v_cache", _CACHE, cache="reads"),
            Argument("row_start", ("B+1",), DType.I32),
            Argument("kv_len", ("B",), DType.I32),
            Argument("page_table", ("B", "P"), DType.I32),
        ),
        outputs=(Argument("out", ("T", "HqD")),),
        cost=_attention_cost,
        cases=_attention_cases,
        tolerance=REDUCTION,
        required=("layer", "page_size", "scale"),
        defaults={"window": 0, "softcap": 0.0},
        output_dims=_attend_dims,
        state="kv",
        span="page_table up to kv_len",
        pick_rows=_one_row_sequences,
    ),
)
