"""Gemma 2: scaled embeddings, norms before and after each block, soft caps, alternating windows (Gemma Team, 2024).

Norms multiply by 1 + weight. Layers 0, 2, ... see a sliding window unless `layer_types` says otherwise; scores are
scaled by `query_pre_attn_scalar`, not by the head's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from slotwise.core.errors import CheckpointError
from slotwise.core.graph import Value
from slotwise.models.architecture import (
    FULL,
    SLIDING,
    Architecture,
    read_layer_types,
    read_one_rope,
    read_sizes,
    windows_of,
)
from slotwise.models.blocks import DecoderBuilder
from slotwise.models.config import ConfigReader


@dataclass(frozen=True)
class Gemma2(Architecture):
    """A Gemma 2; `windows` has one entry a layer, 0 for full attention; a soft cap of 0 is none."""

    windows: tuple[int, ...]
    attention_bias: bool
    scale: float
    score_softcap: float
    logit_softcap: float

    norm_offset: ClassVar[float] = 1.0

    @classmethod
    def read(cls, config: ConfigReader) -> Gemma2:
        """Read a `gemma2` config."""
        refuse_bidirectional(config)
        sizes = read_sizes(config, activation="hidden_activation", tied=True, defaults={"head_dim": 256})
        types = read_layer_types(config, [FULL if layer % 2 else SLIDING for layer in range(sizes.layers)])
        return cls(
            sizes,
            read_one_rope(config, sizes),
            windows=windows_of(config, types, gemma_window(config, types)),
            attention_bias=config.boolean("attention_bias", default=False),
            scale=config.number("query_pre_attn_scalar", default=256.0, at_least=1e-6, at_most=1e6) ** -0.5,
            score_softcap=softcap(config, "attn_logit_softcapping", default=50.0),
            logit_softcap=softcap(config, "final_logit_softcapping", default=30.0),
        )

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed(self.sizes.hidden**0.5)
        for layer in range(self.sizes.layers):
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=self.attention_bias)
            q, k = g.rotate(q, k)
            mixed = g.attend(
                q,
                k,
                v,
                layer,
                bias=self.attention_bias,
                scale=self.scale,
                window=self.windows[layer],
                softcap=self.score_softcap,
            )
            x = g.add(x, g.norm(mixed, layer, "post_attention_norm", "post_attention_layernorm"))
            normed = g.norm(x, layer, "feed_forward_norm", "pre_feedforward_layernorm")
            fed = g.feed_forward(normed, layer)
            x = g.add(x, g.norm(fed, layer, "post_feed_forward_norm", "post_feedforward_layernorm"))
        return g.logits(x, softcap=self.logit_softcap)


def softcap(config: ConfigReader, key: str, *, default: float) -> float:
    """A soft cap: null is none (0.0), an absent key is `default`."""
    given = config.optional_number(key, at_least=1e-6, at_most=1e9) or 0.0
    return given if key in config.fields else default


def gemma_window(config: ConfigReader, types: Sequence[str]) -> int | None:
    """`sliding_window`: 4096 where the config does not name it, None where it is null or no layer has one."""
    if SLIDING not in types:
        return None
    return config.optional_positive_int("sliding_window") if "sliding_window" in config.fields else 4096


def refuse_bidirectional(config: ConfigReader) -> None:
    """Raise CheckpointError for an encoder in a decoder's clothes (EmbeddingGemma)."""
    if config.boolean("use_bidirectional_attention", default=False):
        raise CheckpointError(
            f"{config.source}: 'use_bidirectional_attention' is true; only causal decoders are supported"
        )


ARCHITECTURES = {"gemma2": Gemma2}
