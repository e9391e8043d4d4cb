"""A checkpoint folder as a GGUF file: the same weights for llama.cpp.

What always holds: the file is made once, whole or not at all; norms are float32 (llama.cpp takes no other), every
matrix, the tied head included, is of the kind asked for, quantised by the gguf package itself.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from sidebyside.shapes import Shape

KINDS = ("bf16", "q8_0", "q4_0")

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def make_gguf(shape: Shape, folder: Path, kind: str) -> Path:
    """The GGUF file of `folder` with matrices of `kind`, beside its safetensors."""
    import gguf

    file = folder / f"{kind}.gguf"
    if file.exists():
        return file
    quantisation = gguf.GGMLQuantizationType[kind.upper()]
    part = file.with_name(f".{file.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_name(f"llama-{shape.name}")
    writer.add_context_length(shape.config()["max_position_embeddings"])
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.config()["rms_norm_eps"])
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
    try:
        with safe_open(folder / "model.safetensors", framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                tensor = weights.get_tensor(name)
                if tensor.ndim == 1:
                    writer.add_tensor(gguf_name(name), tensor.float().numpy())
                    continue
                heads = {"q_proj": shape.heads, "k_proj": shape.kv_heads}.get(name.split(".")[-2])
                matrix = tensor if heads is None else interleave_rotary(tensor, heads)
                writer.add_tensor(gguf_name(name), _stored(matrix, quantisation), raw_dtype=quantisation)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        part.rename(file)
    finally:
        part.unlink(missing_ok=True)
    return file


def gguf_name(name: str) -> str:
    """What GGUF calls a Llama's tensor."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, what = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_NAMES[what]}.weight"


def interleave_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a Q or K projection in the order that llama.cpp's Llama expects.

    It rotates neighbours (2i, 2i + 1), the checkpoint the halves (i, i + D/2) of each head.
    """
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def _stored(matrix: torch.Tensor, quantisation: object) -> npt.NDArray[np.uint8]:
    """The bytes of a bf16 matrix in GGUF's layout, uint8 [rows, bytes of a row]."""
    import gguf

    if quantisation == gguf.GGMLQuantizationType.BF16:
        return matrix.contiguous().view(torch.uint8).numpy()
    # By parts, for the float32 copies of a large matrix would take several times its size.
    parts = (gguf.quants.quantize(part.float().numpy(), quantisation) for part in matrix.split(8192))
    return np.concatenate(list(parts))
