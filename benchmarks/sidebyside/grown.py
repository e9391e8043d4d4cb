"""A small model made as large as another without changing what it computes.

What always holds: the grown checkpoint's logits are the small one's, up to the rounding of sums whose order changes;
what was added is read and multiplied like everything else, and adds nothing.

How. The residual stream is padded with zeros: embeddings have zero columns there, and nothing that is added writes to
them (rows of `o_proj` and `down_proj` beyond the old width are zero). RMS norm takes its mean over the padded width,
which is `old / new` of the former mean; with epsilon scaled by the same factor, the norm is `sqrt(new / old)` too
large, and its weights carry the inverse. Growing the width by a power of four makes that factor a power of two, which
bf16 holds exactly. Added heads and MLP columns have random weights that read the stream, and zero columns in `o_proj`
and `down_proj`. Added layers have both output projections zero.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sidebyside.shapes import SEED, whole_folder


@dataclass(frozen=True, slots=True)
class Growth:
    """The sizes to grow to. Query heads per key/value head and the head's size stay what they are."""

    hidden: int
    layers: int
    kv_heads: int
    ffn: int


LIKE_135M = Growth(hidden=768, layers=30, kv_heads=8, ffn=1408)
"""With the bundled target's vocabulary of 2048: 134.3 million parameters in 30 layers, as SmolLM-135M has."""


def grow(source: Path, growth: Growth, folder: Path) -> Path:
    """Write the grown checkpoint of the Llama in `source` to `folder`, unless it is there; returns `folder`.

    Raises ValueError when the sizes do not allow it to be exact.
    """
    if (folder / "config.json").exists():
        return folder
    config = json.loads((source / "config.json").read_text())
    old = Sizes.of(config)
    new = old.grown(growth)
    norm_scale = math.sqrt(old.hidden / new.hidden)
    grower = _Grower(load_file(source / "model.safetensors"), old, new, norm_scale)
    config |= {
        "hidden_size": new.hidden,
        "num_hidden_layers": new.layers,
        "num_attention_heads": new.heads,
        "num_key_value_heads": new.kv_heads,
        "head_dim": new.head_dim,
        "intermediate_size": new.ffn,
        "rms_norm_eps": config["rms_norm_eps"] * old.hidden / new.hidden,
    }
    with whole_folder(folder) as made:
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            if (source / name).exists():
                shutil.copyfile(source / name, made / name)
        save_file(grower.tensors(), str(made / "model.safetensors"), metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return folder


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a Llama's tensors are shaped by."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Those of a config.json."""
        return cls(
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["num_key_value_heads"],
            config["head_dim"],
            config["intermediate_size"],
        )

    def grown(self, growth: Growth) -> Sizes:
        """These sizes after `growth`; raises ValueError where it would shrink one or not be exact."""
        heads = growth.kv_heads * self.heads // self.kv_heads
        new = Sizes(growth.hidden, growth.layers, heads, growth.kv_heads, self.head_dim, growth.ffn)
        shrunk = [name for name in self.__slots__ if getattr(new, name) < getattr(self, name)]
        if shrunk:
            raise ValueError(f"a model grows in every size, {', '.join(shrunk)} would shrink")
        factor = new.hidden / self.hidden
        if math.log(factor, 4) % 1 != 0:
            raise ValueError(f"the width must grow by a power of four, for norm weights to stay exact; is {factor:g}")
        return new


class _Grower:
    def __init__(self, old: dict[str, torch.Tensor], before: Sizes, after: Sizes, norm_scale: float) -> None:
        self._old, self._before, self._after, self._norm_scale = old, before, after, norm_scale
        self._source = torch.Generator().manual_seed(SEED)

    def tensors(self) -> dict[str, torch.Tensor]:
        before, after = self._before, self._after
        found = {
            "model.embed_tokens.weight": self._padded(
                self._old["model.embed_tokens.weight"], (self._old["model.embed_tokens.weight"].shape[0], after.hidden)
            ),
            "model.norm.weight": self._norm("model.norm.weight"),
        }
        queries, keys = after.heads * after.head_dim, after.kv_heads * after.head_dim
        shapes = {
            "self_attn.q_proj": (queries, after.hidden),
            "self_attn.k_proj": (keys, after.hidden),
            "self_attn.v_proj": (keys, after.hidden),
            "self_attn.o_proj": (after.hidden, queries),
            "mlp.gate_proj": (after.ffn, after.hidden),
            "mlp.up_proj": (after.ffn, after.hidden),
            "mlp.down_proj": (after.hidden, after.ffn),
        }
        for layer in range(after.layers):
            at = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{at}{norm}.weight"] = self._norm(f"{at}{norm}.weight")
            for name, shape in shapes.items():
                found[f"{at}{name}.weight"] = self._matrix(f"{at}{name}.weight", shape, layer < before.layers)
        return found

    def _norm(self, name: str) -> torch.Tensor:
        """The scaled weights of a norm, one beyond them."""
        grown = torch.ones(self._after.hidden, dtype=torch.bfloat16)
        if name in self._old:
            weight = self._old[name]
            grown[: weight.numel()] = weight * self._norm_scale
        return grown

    def _matrix(self, name: str, shape: tuple[int, int], is_old: bool) -> torch.Tensor:
        """The old weights in the first rows and columns; beyond them zeros in projections that write the stream."""
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        if is_old and writes:
            return self._padded(self._old[name], shape)
        if writes:
            return torch.zeros(shape, dtype=torch.bfloat16)
        drawn = torch.randn(shape, generator=self._source).div_(math.sqrt(shape[1])).to(torch.bfloat16)
        if is_old:
            rows, columns = self._old[name].shape
            drawn[:rows, :columns] = self._old[name]
        return drawn

    def _padded(self, tensor: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        grown = torch.zeros(shape, dtype=torch.bfloat16)
        grown[: tensor.shape[0], : tensor.shape[1]] = tensor
        return grown
