"""Choosing configurations by measuring them on the GPU at hand.

Owns `tune`, `candidates` and `write_table`. What always holds: an entry replaces the project's only where it was faster
by more than the noise (`MARGIN`) and gave the same result; candidates keep the entry's limits and differ in block
sizes, warps and stages alone. Measuring needs a GPU; making candidates, choosing and writing do not.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

from slotwise.backends.cuda_triton import linear as kernels_of_linear
from slotwise.backends.cuda_triton import linear_q
from slotwise.backends.cuda_triton.configurations import Configuration, entries, generation_of
from slotwise.core.backend import Kernel
from slotwise.core.errors import BackendError, nearest
from slotwise.core.graph import Attr
from slotwise.core.ops.linear_q import FLOAT_OPS
from slotwise.core.quantise import GROUP, dequantise, quantise

# The tuner forces a configuration where this module would choose one, for products of either kind of weight.
linear: Any = kernels_of_linear

MARGIN = 0.03
"""A candidate must be faster by this share: less is noise."""

TUNED: Mapping[str, tuple[str, str]] = {
    "linear_rows": ("linear", "rows"),
    "linear_tiles": ("linear", "tiles"),
    "gated_rows": ("linear_gated", "rows"),
    "gated_tiles": ("linear_gated", "tiles"),
    "linear_q_rows": ("linear_q", "rows"),
    "linear_q_tiles": ("linear_q", "tiles"),
    "gated_q_rows": ("linear_gated_q", "rows"),
    "gated_q_tiles": ("linear_gated_q", "tiles"),
}
"""Tables that are tuned -> the op and kind measured for them."""

INNER, OUTPUTS = 4096, 4096
_ROWS_OF_TILES = 256
_DECODE_BLOCK_M = (16, 32)
_BITS = 8  # of the quantised weights that are measured, where an entry serves both kinds
Measure = Callable[[str, Configuration], float]
"""(table, configuration) -> seconds, infinite when it does not run."""


def candidates(table: str, entry: Configuration) -> Iterator[Configuration]:
    """Variations of an entry: blocks halved and doubled, other warps and stages; decode tiles keep their rows."""
    names = list(entry.constants)
    sizes = [_around(table, name, entry.constants[name]) for name in names]
    for blocks in itertools.product(*sizes):
        for warps, stages in itertools.product((2, 4, 8), (2, 3, 4, 5)):
            found = replace(entry, num_warps=warps, num_stages=stages, constants=dict(zip(names, blocks, strict=True)))
            if found != entry:
                yield found


def _around(table: str, name: str, size: int) -> tuple[int, ...]:
    if name == "BLOCK_M" and table.endswith("_rows"):
        return (size,) if size in _DECODE_BLOCK_M else _DECODE_BLOCK_M
    low = GROUP if name == "BLOCK" else 16  # of codes, a block holds whole groups
    return tuple(found for found in (size // 2, size, size * 2) if low <= found <= 512)


def best_of(table: str, entry: Configuration, measure: Measure, tell: Callable[[str], None]) -> Configuration | None:
    """The fastest candidate, or None when none beats the entry by the margin."""
    before = measure(table, entry)
    times = {index: measure(table, found) for index, found in enumerate(candidates(table, entry))}
    index = min(times, key=lambda i: times[i])
    found = list(candidates(table, entry))[index]
    if times[index] >= before * (1 - MARGIN):
        tell(f"{entry}: {before * 1e6:.1f} us, nothing is faster by {MARGIN:.0%}")
        return None
    tell(f"{entry}: {before * 1e6:.1f} us -> {found}: {times[index] * 1e6:.1f} us")
    return found


def tune(tables: Sequence[str], tell: Callable[[str], None]) -> Mapping[str, Mapping[str, Sequence[Configuration]]]:
    """Tune `tables` (all when empty) on the current GPU; raises BackendError for a table that is not tuned."""
    generation = generation_of(torch.device("cuda", torch.cuda.current_device()))
    found: dict[str, Mapping[str, Sequence[Configuration]]] = {}
    for table in tables or TUNED:
        if table not in TUNED:
            raise BackendError(f"table {table!r} is not tuned{nearest(table, TUNED)}; tuned are {', '.join(TUNED)}")
        measure = functools.partial(_seconds, generation)
        better = [best_of(table, entry, measure, tell) for entry in entries(table, generation)]
        chosen = [new or old for new, old in zip(better, entries(table, generation), strict=True)]
        if any(better):
            found[table] = {generation: chosen}
    return found


def _seconds(generation: str, table: str, configuration: Configuration) -> float:
    """Median time of one launch with that configuration forced; infinite when it fails or computes something else."""
    op, kind = TUNED[table]
    limits = configuration.limits
    bits = limits.get("bits", _BITS)
    kernel, inputs, expected = _problem(op, kind, limits.get("rows"), limits.get("itemsize", 4), bits)
    out = torch.empty_like(expected)
    attrs: dict[str, Attr] = {"activation": "silu"} if op.startswith("linear_gated") else {}
    attrs |= {"bits": bits} if op in FLOAT_OPS else {}
    choose = linear.configure
    linear.configure = lambda name, *_, **facts: configuration if name == table else choose(name, generation, **facts)
    try:
        scratch = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        launch = kernel.bind(inputs, (out,), attrs, scratch)
        launch()
        if not torch.allclose(out, expected, rtol=2e-2, atol=2e-2):
            return float("inf")
        return float(do_bench(launch, return_mode="median")) / 1e3
    except Exception:  # too much shared memory or registers, or a shape that Triton cannot compile: not a candidate
        return float("inf")
    finally:
        linear.configure = choose


@functools.cache
def _problem(
    op: str, kind: str, rows: int | None, itemsize: int, bits: int
) -> tuple[Kernel, tuple[torch.Tensor | None, ...], torch.Tensor]:
    """The kernel, a call of the size that the entry is for, and the right result."""
    kernel = next(k for k in (*linear.KERNELS, *linear_q.KERNELS) if k.name == f"{op}.{kind}")
    count = rows or (_ROWS_OF_TILES if kind == "tiles" else 64)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    rng = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(count, INNER, generator=rng, device="cuda", dtype=dtype)
    kinds = 2 if op.startswith("linear_gated") else 1
    weight = torch.randn(kinds * OUTPUTS, INNER, generator=rng, device="cuda", dtype=dtype) / INNER**0.5
    operands: tuple[torch.Tensor | None, ...] = (weight,)
    if op in FLOAT_OPS:
        codes, scale, _ = quantise(weight.cpu(), f"int{bits}")
        operands = codes.cuda(), scale.cuda(), None
        weight = dequantise(codes, scale, None, bits=bits).cuda()
    product = torch.nn.functional.linear(x.float(), weight.float())
    if kinds == 2:
        gate, up = product.chunk(2, dim=-1)
        return kernel, (x, *operands), (torch.nn.functional.silu(gate) * up).to(dtype)
    return kernel, (x, *operands, None), product.to(dtype)


def write_table(path: Path, table: Mapping[str, Mapping[str, Sequence[Configuration]]]) -> None:
    """Write a table in the form that `configurations.read_table` reads, whole or not at all."""
    lines = ["# Written by `slotwise tune`; delete this file to go back to the project's own table."]
    for kernel, generations in table.items():
        lines.append(f"\n[{kernel}]")
        for generation, listed in generations.items():
            lines.append(f"{generation} = [")
            lines += [f"    {{ {_text(entry)} }}," for entry in listed]
            lines.append("]")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".toml", delete=False, encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    os.replace(file.name, path)


def _text(entry: Configuration) -> str:
    limits = [f"max_{name} = {value}" for name, value in entry.limits.items()]
    blocks = [f"{name.lower()} = {value}" for name, value in entry.constants.items()]
    return ", ".join([*limits, *blocks, f"warps = {entry.num_warps}", f"stages = {entry.num_stages}"])
