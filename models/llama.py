"""Llama 2 and 3: pre-norm decoder with grouped-query attention, rotary embedding and a SwiGLU feed-forward block.

(Touvron et al., 2023; Grattafiori et al., 2024.) Biases are optional, all of attention's together and all of the
feed-forward block's together.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.graph import Value
from slotwise.models.architecture import Architecture, read_one_rope, read_sizes
from slotwise.models.blocks import DecoderBuilder
from slotwise.models.config import ConfigReader


@dataclass(frozen=True)
class Llama(Architecture):
    """A Llama of any size."""

    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def read(cls, config: ConfigReader) -> Llama:
        """Read a `llama` config."""
        sizes = read_sizes(config, defaults={"max_position_embeddings": 2048})
        return cls(
            sizes,
            read_one_rope(config, sizes),
            attention_bias=config.boolean("attention_bias", default=False),
            mlp_bias=config.boolean("mlp_bias", default=False),
        )

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed()
        for layer in range(self.sizes.layers):
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=self.attention_bias)
            q, k = g.rotate(q, k)
            x = g.add(x, g.attend(q, k, v, layer, bias=self.attention_bias))
            normed = g.norm(x, layer, "feed_forward_norm", "post_attention_layernorm")
            x = g.add(x, g.feed_forward(normed, layer, bias=self.mlp_bias))
        return g.logits(x)


ARCHITECTURES = {"llama": Llama}
