"""Qwen 2 and 2.5: Llama's decoder with biases on queries, keys and values (Yang et al., 2024).

A sliding window applies only where `use_sliding_window` says so: to the layers that `layer_types` names, else to those
from `max_window_layers` on.
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
class Qwen2(Architecture):
    """A Qwen 2; `windows` has one entry a layer, 0 for full attention."""

    windows: tuple[int, ...]

    @classmethod
    def read(cls, config: ConfigReader) -> Qwen2:
        """Read a `qwen2` config."""
        sizes = read_sizes(config)
        return cls(sizes, read_one_rope(config, sizes), windows=qwen_windows(config, sizes.layers))

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed()
        for layer in range(self.sizes.layers):
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=True)
            q, k = g.rotate(q, k)
            x = g.add(x, g.attend(q, k, v, layer, bias=False, window=self.windows[layer]))
            normed = g.norm(x, layer, "feed_forward_norm", "post_attention_layernorm")
            x = g.add(x, g.feed_forward(normed, layer))
        return g.logits(x)


def qwen_windows(config: ConfigReader, layers: int) -> tuple[int, ...]:
    """Each layer's window as Qwen 2 and 3 configs say it; 0 sees everything."""
    window: int | None = None
    if config.boolean("use_sliding_window", default=False):
        given = config.optional_positive_int("sliding_window") or None
        window = given if "sliding_window" in config.fields else 4096
    default = [FULL] * layers
    if window is not None and not config.has("layer_types"):
        first = config.integer("max_window_layers", default=28, at_least=0, at_most=2**31)
        default = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return windows_of(config, read_layer_types(config, default), window)


ARCHITECTURES = {"qwen2": Qwen2}
