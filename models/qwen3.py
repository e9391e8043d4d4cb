"""Qwen 3, dense: Llama's decoder with an RMS norm over each query and key head (Yang et al., 2025).

Biases are optional, all of attention's together. Windows are as in Qwen 2 configs; a head has 128 dimensions unless the
config says otherwise, whatever the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.graph import Value
from slotwise.models.architecture import Architecture, read_one_rope, read_sizes
from slotwise.models.blocks import DecoderBuilder
from slotwise.models.config import ConfigReader
from slotwise.models.qwen2 import qwen_windows


@dataclass(frozen=True)
class Qwen3(Architecture):
    """A dense Qwen 3; `windows` has one entry a layer, 0 for full attention."""

    windows: tuple[int, ...]
    attention_bias: bool

    @classmethod
    def read(cls, config: ConfigReader) -> Qwen3:
        """Read a `qwen3` config."""
        sizes = read_sizes(config, defaults={"head_dim": 128})
        return cls(
            sizes,
            read_one_rope(config, sizes),
            windows=qwen_windows(config, sizes.layers),
            attention_bias=config.boolean("attention_bias", default=False),
        )

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed()
        for layer in range(self.sizes.layers):
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=self.attention_bias)
            q, k = g.head_norm(q, layer, "q_norm"), g.head_norm(k, layer, "k_norm")
            q, k = g.rotate(q, k)
            x = g.add(x, g.attend(q, k, v, layer, bias=self.attention_bias, window=self.windows[layer]))
            normed = g.norm(x, layer, "feed_forward_norm", "post_attention_layernorm")
            x = g.add(x, g.feed_forward(normed, layer))
        return g.logits(x)


ARCHITECTURES = {"qwen3": Qwen3}
