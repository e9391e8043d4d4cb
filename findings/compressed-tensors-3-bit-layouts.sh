#!/usr/bin/env bash
# compressed-tensors: two versions write 3-bit weights in two layouts under one format name, and the newer version reads
# the older one's weights wrong, without a word.
#
# The format pack-quantized puts small integers into 32-bit words. Version 0.12.2 puts ten 3-bit codes in a word and
# leaves two bits empty; version 0.20.1 lets codes run over from one word into the next. Name, tensor names, dtype and
# weight_shape are the same. The only trace in the tensors is the number of words in a row, 7 or 6 for 64 codes, and the
# newer reader doesn't look: it takes as many words as it needs, and decodes other numbers. 4 and 8 bits, which fill a
# word, are the same in both, so the common checkpoints never show it.
#
# A loader must choose the layout by the words in a row, and by the version in the config where both counts are equal.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
pip() { "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "$@"; }
pip transformers==5.24.0 torch==2.13.0 numpy==2.4.6 pydantic==2.14.3 loguru==0.7.3 psutil==7.2.2
pip --no-deps --target "$folder/older" compressed-tensors==0.12.2
pip --no-deps --target "$folder/newer" compressed-tensors==0.20.1

cat > "$folder/weights.py" <<'PYTHON'
"""What both versions are given: codes [2, 64] in the range of `bits`, with a scale of 1."""
import torch


def codes(bits):
    return (torch.arange(128) * 5 % 2**bits - 2 ** (bits - 1)).reshape(2, 64).float()
PYTHON

cat > "$folder/write.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs
from weights import codes

print("written by compressed-tensors", version("compressed-tensors"))
for bits in (3, 4):
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel")
    compressor = PackedQuantizationCompressor()
    scale = torch.ones(2, 1)
    written = compressor.compress_weight(weight=codes(bits), scale=scale, quantization_args=arguments)
    back = compressor.decompress_weight(written | {"weight_scale": scale}, arguments)
    assert torch.equal(back, codes(bits))
    print(f"  {bits} bits: {list(written['weight_packed'].shape)} words, read back right")
    torch.save(written, f"{sys.argv[1]}/{bits}.pt")
PYTHON

cat > "$folder/read.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from weights import codes

print("read by compressed-tensors", version("compressed-tensors"))
for bits in (3, 4):
    arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    own = PackedQuantizationCompressor.compress({"weight": codes(bits), "weight_scale": torch.ones(2, 1)}, scheme)
    assert torch.equal(PackedQuantizationCompressor.decompress(own, scheme)["weight"], codes(bits))
    older = torch.load(f"{sys.argv[1]}/{bits}.pt") | {"weight_scale": torch.ones(2, 1)}
    assert own.keys() == older.keys() and own["weight_packed"].dtype == older["weight_packed"].dtype
    read = PackedQuantizationCompressor.decompress(older, scheme)["weight"]
    wrong = int((read != codes(bits)).sum())
    print(f"  {bits} bits: its own has {list(own['weight_packed'].shape)} words; {wrong} of 128 older weights are wrong")
    for how, values in (("written", codes(bits)), ("read", read)):
        print(f"    first ones, {how:7}", *(f"{value:g}" for value in values[0, :16].tolist()))
    assert wrong > 60 if bits == 3 else wrong == 0
print("confirmed: no error, no warning, other weights")
PYTHON

export HF_HUB_OFFLINE=1
PYTHONPATH="$folder/older" "$folder/venv/bin/python" "$folder/write.py" "$folder"
PYTHONPATH="$folder/newer" "$folder/venv/bin/python" "$folder/read.py" "$folder"
