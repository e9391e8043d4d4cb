"""Gemma 3, the text model alone or within the multimodal checkpoint (Gemma Team, 2025): Gemma 2's decoder, q/k norms.

Five of six layers see a sliding window and turn by a rotary embedding of their own (`rope.local`, base 10,000); the
others turn by `rope` (base 1,000,000, scaled in the larger models). There are no soft caps on scores. Published
multimodal configs leave out what equals the defaults below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

from slotwise.core.errors import CheckpointError
from slotwise.core.graph import Value
from slotwise.models.architecture import (
    FULL,
    SLIDING,
    Architecture,
    read_layer_types,
    read_sizes,
    refuse_encoder,
    windows_of,
)
from slotwise.models.blocks import DecoderBuilder, Sizes
from slotwise.models.config import ConfigReader
from slotwise.models.gemma2 import gemma_window, refuse_bidirectional, softcap
from slotwise.models.rope import Rope, read_rope

_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}


_Gemma3 = TypeVar("_Gemma3", bound="Gemma3")


@dataclass(frozen=True)
class Gemma3(Architecture):
    """A Gemma 3; `windows` has one entry a layer, 0 for full attention; a soft cap of 0 is none."""

    windows: tuple[int, ...]
    attention_bias: bool
    scale: float
    logit_softcap: float

    norm_offset: ClassVar[float] = 1.0

    @classmethod
    def read(cls: type[_Gemma3], config: ConfigReader) -> _Gemma3:
        """Read a `gemma3_text` config."""
        refuse_bidirectional(config)
        if config.has("attn_logit_softcapping"):
            raise CheckpointError(f"{config.source}: 'attn_logit_softcapping' is not supported for Gemma 3")
        sizes = read_sizes(config, activation="hidden_activation", tied=True, defaults=_DEFAULTS)
        pattern = 6 if config.has("layer_types") else config.positive_int("sliding_window_pattern", default=6)
        types = read_layer_types(config, [SLIDING if (n + 1) % pattern else FULL for n in range(sizes.layers)])
        return cls(
            sizes,
            _read_ropes(config, sizes),
            windows=windows_of(config, types, gemma_window(config, types)),
            attention_bias=config.boolean("attention_bias", default=False),
            scale=config.number("query_pre_attn_scalar", default=256.0, at_least=1e-6, at_most=1e6) ** -0.5,
            logit_softcap=softcap(config, "final_logit_softcapping", default=0.0),
        )

    @property
    def max_positions(self) -> int:
        """What the config says: it counts the scaling of `rope` already."""
        return self.sizes.max_positions

    def logits(self, g: DecoderBuilder) -> Value:
        """Append the model."""
        x = g.embed(self.sizes.hidden**0.5)
        for layer in range(self.sizes.layers):
            window = self.windows[layer]
            normed = g.norm(x, layer, "attention_norm", "input_layernorm")
            q, k, v = g.qkv(normed, layer, bias=self.attention_bias)
            q, k = g.head_norm(q, layer, "q_norm"), g.head_norm(k, layer, "k_norm")
            q, k = g.rotate(q, k, "rope.local" if window else "rope")
            mixed = g.attend(q, k, v, layer, bias=self.attention_bias, scale=self.scale, window=window)
            x = g.add(x, g.norm(mixed, layer, "post_attention_norm", "post_attention_layernorm"))
            normed = g.norm(x, layer, "feed_forward_norm", "pre_feedforward_layernorm")
            fed = g.feed_forward(normed, layer)
            x = g.add(x, g.norm(fed, layer, "post_feed_forward_norm", "post_feedforward_layernorm"))
        return g.logits(x, softcap=self.logit_softcap)


@dataclass(frozen=True)
class MultimodalGemma3(Gemma3):
    """The text model within a `gemma3` checkpoint; the vision tower is left alone."""

    ignored: ClassVar[tuple[str, ...]] = (
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    )

    @classmethod
    def read(cls: type[_Gemma3], config: ConfigReader) -> _Gemma3:
        """Read the `text_config` of a `gemma3` config."""
        refuse_encoder(config)
        text = super().read(config.mapping("text_config"))
        tied = config.boolean("tie_word_embeddings", default=text.sizes.tied)
        return replace(text, sizes=replace(text.sizes, tied=tied))


def _read_ropes(config: ConfigReader, sizes: Sizes) -> dict[str, Rope]:
    """`rope` for full-attention layers, `rope.local` for sliding ones, from either style of config."""
    parameters = config.optional_mapping("rope_parameters") or ConfigReader({}, config.source)
    sections: dict[str, ConfigReader] = {
        kind: parameters.optional_mapping(kind) or ConfigReader({}, config.source) for kind in (FULL, SLIDING)
    }
    scaling = config.optional_mapping("rope_scaling")
    if scaling is not None:
        merged: Mapping[str, object] = {**sections[FULL].fields, **scaling.fields}
        sections[FULL] = ConfigReader(merged, scaling.source)

    def rope(kind: str, key: str, theta: float) -> Rope:
        section = sections[kind]
        if not section.has("rope_theta"):
            theta = config.number(key, default=theta, at_least=2.0, at_most=1e15)
        return read_rope(config, section, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=theta)

    return {
        "rope": rope(FULL, "rope_theta", 1_000_000.0),
        "rope.local": rope(SLIDING, "rope_local_base_freq", 10_000.0),
    }


ARCHITECTURES = {"gemma3_text": Gemma3, "gemma3": MultimodalGemma3}
