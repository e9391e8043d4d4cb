#!/usr/bin/env bash
# Triton: in the interpreter a cast to float8 makes 256 of 1000 and of infinity, and a number of NaN; a cast to
# bfloat16 cuts digits off instead of rounding.
#
# float8 e4m3 ends at 448 and has a code for NaN. PyTorch makes 448 of what is too large, and keeps NaN. The interpreter
# does neither: 1000 and infinity become 256, a number below 448, and NaN becomes 384. So a larger input gives a smaller
# output. A tie is rounded away from zero: 17 becomes 18, though it lies as near to 16, the even code, which IEEE's rule
# and PyTorch take. And float32 to bfloat16 truncates: 1.999 becomes 1.9921875, not 2.
#
# The interpreter is what one runs to see whether a quantising kernel is right, without a GPU. Here it hides a missing
# clamp, and it disagrees with a correct reference in the last place of half of all bfloat16 numbers.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.7.1 torch==2.13.0 numpy==2.4.6

# Triton reads the source of a kernel from its file, so this can't come from standard input.
cat > "$folder/casts.py" <<'PYTHON'
import math
from importlib.metadata import version

import torch
import triton
import triton.language as tl

for package in ("triton", "torch", "numpy"):
    print(package, version(package))


@triton.jit
def cast(source, target, n: tl.constexpr, dtype: tl.constexpr):
    at = tl.arange(0, n)
    tl.store(target + at, tl.load(source + at).to(dtype).to(tl.float32))


def compare(numbers, triton_dtype, torch_dtype):
    source, target = torch.tensor(numbers), torch.zeros(len(numbers))
    cast[(1,)](source, target, len(numbers), triton_dtype)
    reference = source.to(torch_dtype).float()
    print(f"\n{torch_dtype}: number, PyTorch, Triton's interpreter")
    for row in zip(numbers, reference.tolist(), target.tolist()):
        print("  {:<12g} {:<12.8g} {:.8g}".format(*row))
    return reference.tolist(), target.tolist()


_, fp8 = compare([448.0, 1000.0, math.inf, math.nan, 16.0, 17.0, 18.0, -1000.0], tl.float8e4nv, torch.float8_e4m3fn)
assert fp8 == [448.0, 256.0, 256.0, 384.0, 16.0, 18.0, 18.0, -256.0]
rounded, cut = compare([1.0, 1.999, -1.999, 3.14159265], tl.bfloat16, torch.bfloat16)
assert rounded == [1.0, 2.0, -2.0, 3.140625]
assert cut == [1.0, 1.9921875, -1.9921875, 3.140625]
torch.manual_seed(0)
source, target = torch.rand(4096) + 1, torch.zeros(4096)
cast[(1,)](source, target, 4096, tl.bfloat16)
share = (target != source.bfloat16().float()).float().mean().item()
print(f"\nof 4096 random numbers from 1 to 2, {share:.0%} differ from PyTorch's bfloat16; none is above its input")
assert 0.4 < share < 0.6 and (target <= source).all()
print("confirmed")
PYTHON
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/casts.py"
