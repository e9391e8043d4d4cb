"""Mistral: Llama's decoder with a sliding window on every layer (Jiang et al., 2023).

`sliding_window: null` means full attention, as in Mistral 7B v0.2 and later; a config without the key means 4096.
`layer_types`, where a config has them, say which layers the window is for: transformers 5.23 loads such a folder as its
Ministral (`models/auto/configuration_auto.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

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
class Mistral(Architecture):
    """A Mistral; `windows` has each layer's, 0 for full attention."""

    windows: tuple[int, ...]

    @classmethod
    def read(cls, config: ConfigReader) -> Mistral:
        """Read a `mistral` config."""
        sizes = read_sizes(config)
        given = config.optional_positive_int("sliding_window") if "sliding_window" in config.fields else 4096
        kinds = read_layer_types(config, (FULL if given is None else SLIDING,) * sizes.layers)
        return cls(sizes, read_one_rope(config, sizes), windows_of(config, kinds, given))

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed()
        for layer in range(self.sizes.layers):
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=False)
            q, k = g.rotate(q, k)
            x = g.add(x, g.attend(q, k, v, layer, bias=False, window=self.windows[layer]))
            normed = g.norm(x, layer, "feed_forward_norm", "post_attention_layernorm")
            x = g.add(x, g.feed_forward(normed, layer))
        return g.logits(x)


ARCHITECTURES = {"mistral": Mistral}
