#!/usr/bin/env bash
# gguf: an MXFP4 scale byte of 255, which means NaN, is read as 2 to the power of 128, and the weights stay finite.
#
# An MXFP4 block is 32 four-bit numbers under one byte of scale, E8M0: the byte is an exponent with a bias of 127, and
# 255 is kept for NaN, by which a writer says that the whole block is not a number. gguf's reader has no such case: it
# goes on counting, so a weight of 0.5 under that scale comes out as about 1.7e38, a large but finite float32, and only
# weights of 1 and more become infinite. ml_dtypes, which has E8M0 as a dtype, reads the same byte as NaN.
#
# A loader that trusts the dequantised values and then looks for NaN finds none: a block that was marked as broken goes
# into the model as huge numbers. Look at the scale bytes themselves before decoding them.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 ml_dtypes==0.5.4

"$folder/venv/bin/python" -W ignore::RuntimeWarning - <<'PYTHON'
from importlib.metadata import version

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, dequantize

for package in ("gguf", "numpy", "ml_dtypes"):
    print(package, version(package))

# Codes 0, 1, 2, 3 stand for 0, 0.5, 1, 1.5; the first 16 elements of a block are its low nibbles.
print("\nA block a line: its scale byte, the scale by ml_dtypes, the weights 0, 0.5, 1, 1.5 by gguf")
weights = {}
for scale in (127, 128, 254, 255):
    block = np.zeros((1, 17), dtype=np.uint8)
    block[0, 0] = scale
    block[0, 1:5] = [0, 1, 2, 3]
    weights[scale] = dequantize(block, GGMLQuantizationType.MXFP4)[0, :4]
    e8m0 = np.array([scale], dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[0]
    print(f"  {scale}  {e8m0:<14g}", *(f"{weight:g}" for weight in weights[scale]))
    assert np.isnan(e8m0) == (scale == 255)

assert weights[127].tolist() == [0.0, 0.5, 1.0, 1.5] and weights[128].tolist() == [0.0, 1.0, 2.0, 3.0]
assert not np.isnan(weights[255]).any()
assert weights[255][1] == np.float32(2.0**127) and np.isinf(weights[255][2:]).all()
print("confirmed: no NaN under the scale that means NaN")
PYTHON
