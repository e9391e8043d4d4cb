"""Random-weight checkpoints in the shapes of known models.

Owns `Shape`, `SHAPES` and the Hugging Face folders made of them. What always holds: a folder is made once, whole or not
at all, and its content follows from the shape alone (a seed is fixed), so every engine and every run sees the same
weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SEED = 20_260
POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama with tied embeddings."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    rope_theta: float

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Every matrix that a decode step reads, by its name in the checkpoint: (rows out, columns in)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        found = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            found |= {
                at + "self_attn.q_proj.weight": (queries, self.hidden),
                at + "self_attn.k_proj.weight": (keys, self.hidden),
                at + "self_attn.v_proj.weight": (keys, self.hidden),
                at + "self_attn.o_proj.weight": (self.hidden, queries),
                at + "mlp.gate_proj.weight": (self.ffn, self.hidden),
                at + "mlp.up_proj.weight": (self.ffn, self.hidden),
                at + "mlp.down_proj.weight": (self.hidden, self.ffn),
            }
        return found

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of the norm weights, each of `hidden` numbers."""
        within = (f"model.layers.{layer}.{which}_layernorm.weight" for layer in range(self.layers) for which in PLACES)
        return (*within, "model.norm.weight")

    @property
    def parameters(self) -> int:
        """Numbers in all matrices and norms; the tied head counts once."""
        return sum(rows * columns for rows, columns in self.matrices.values()) + len(self.norms) * self.hidden

    def multiply_adds(self, *, logits: bool) -> int:
        """Multiply-adds with weights that a token costs, with or without the head's."""
        done = sum(rows * columns for rows, columns in self.matrices.values())
        return done if logits else done - self.vocab * self.hidden

    def cache_bytes(self, tokens: float, itemsize: int) -> float:
        """Bytes of K and V of `tokens` tokens in all layers."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * itemsize

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
            "dtype": "bfloat16",
        }


PLACES = ("input", "post_attention")

SHAPES = {
    shape.name: shape
    for shape in (
        # SmolLM-135M and Llama-3.2-1B; the rope scaling of the latter is left out, which costs and saves nothing.
        Shape("135M", 576, 30, 9, 3, 64, 1536, 49152, 10_000.0),
        Shape("1B", 2048, 16, 32, 8, 64, 8192, 128_256, 500_000.0),
        # For trying the benchmark out.
        Shape("tiny", 256, 4, 4, 2, 64, 512, 4096, 10_000.0),
    )
}


def make_checkpoint(shape: Shape, cache: Path) -> Path:
    """The checkpoint folder of `shape` in `cache`: bf16 weights, drawn once."""
    folder = cache / f"llama-{shape.name}"
    if (folder / "config.json").exists():
        return folder
    with whole_folder(folder) as made:
        save_file(dict(_draw(shape)), str(made / "model.safetensors"), metadata={"format": "pt"})
        make_tokenizer(shape.vocab).save(str(made / "tokenizer.json"))
        (made / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    return folder


class whole_folder:  # noqa: N801 - used as a verb
    """`with whole_folder(path) as made:` fills `made`, which becomes `path` at the end unless something was raised."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made = folder.with_name(f".{folder.name}.{os.getpid()}")

    def __enter__(self) -> Path:
        self._made.mkdir(parents=True)
        return self._made

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._made.rename(self._folder)
        else:
            shutil.rmtree(self._made, ignore_errors=True)


def _draw(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights that keep activations near one: a matrix by the width it sums over, the tied head a good deal smaller."""
    source = torch.Generator().manual_seed(SEED)
    for name, (rows, columns) in shape.matrices.items():
        scale = (0.25 if "embed" in name else 1.0) / math.sqrt(columns)
        yield name, torch.randn(rows, columns, generator=source).mul_(scale).to(torch.bfloat16)
    for name in shape.norms:
        yield name, torch.ones(shape.hidden, dtype=torch.bfloat16)


def make_tokenizer(size: int) -> Tokenizer:
    """A byte-level tokenizer of exactly `size` tokens: the 256 bytes, and made-up words that no text is cut into."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"Ġw{number}" for number in range(size - len(alphabet)))]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
