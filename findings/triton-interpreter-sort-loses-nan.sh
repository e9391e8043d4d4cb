#!/usr/bin/env bash
# Triton: in the interpreter, tl.sort of numbers with a NaN among them gives back a list without the NaN, and with
# another number twice.
#
# NumPy and PyTorch sort NaN to the end, and a sort that compares badly would at worst leave things out of order. This
# one changes what is there: [3, NaN, 1, 2] becomes [1, 2, 3, 3]. It exchanges by taking a pair's smaller and larger
# number, and both of them skip NaN, so the NaN goes and its neighbour stands twice. tl.topk is built on the same step,
# and tl.max skips NaN too.
#
# A sampler's top-k kernel that is tested under TRITON_INTERPRET=1 thus never shows a NaN in the logits: the result is
# finite, sorted and wrong. Look for NaN before the sort, in a step of its own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1 torch==2.13.0 numpy==2.4.6

# Triton reads the source of a kernel from its file, so this can't come from standard input.
cat > "$folder/sort.py" <<'PYTHON'
import math
from importlib.metadata import version

import torch
import triton
import triton.language as tl

for package in ("triton", "torch", "numpy"):
    print(package, version(package))


@triton.jit
def sort(source, target, n: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(target + at, tl.sort(tl.load(source + at)))


@triton.jit
def top2(source, target, n: tl.constexpr):
    tl.store(target + tl.arange(0, 2), tl.topk(tl.load(source + tl.arange(0, n)), 2))


@triton.jit
def largest(source, target, n: tl.constexpr):
    tl.store(target, tl.max(tl.load(source + tl.arange(0, n))))


def run(kernel, numbers, size):
    target = torch.zeros(size)
    kernel[(1,)](torch.tensor(numbers), target, len(numbers))
    return target.tolist()


plain, broken = [3.0, 4.0, 1.0, 2.0], [3.0, math.nan, 1.0, 2.0]
for numbers in (plain, broken):
    print(f"\n{numbers}")
    print("  torch.sort", torch.tensor(numbers).sort().values.tolist())
    print("  tl.sort   ", run(sort, numbers, 4))
    print("  tl.topk 2 ", run(top2, numbers, 2))
    print("  tl.max    ", run(largest, numbers, 1))
assert run(sort, plain, 4) == [1.0, 2.0, 3.0, 4.0] and run(top2, plain, 2) == [4.0, 3.0]
assert run(sort, broken, 4) == [1.0, 2.0, 3.0, 3.0], "the NaN is gone, and 3 is there twice"
assert not any(map(math.isnan, run(top2, broken, 2) + run(largest, broken, 1)))
print("confirmed: sorting has replaced the NaN by a second 3")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/sort.py"
