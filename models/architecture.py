"""What every architecture is: sizes read from a config, rotary embeddings, and a graph.

Owns `Sizes`, `Architecture` and the registry. What always holds: the registry is read off the folder (a module that has
`ARCHITECTURES`, model type -> class, is one), so adding an architecture is adding a file; whatever a config asks for
that is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from slotwise.core.errors import CheckpointError
from slotwise.core.graph import Graph, Value
from slotwise.core.specs import DType
from slotwise.models.blocks import DecoderBuilder, Sizes, Sources
from slotwise.models.config import ConfigReader
from slotwise.models.rope import Rope, read_rope, rope_section

FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Architecture(ABC):
    """One model family with a config's values filled in.

    `ropes` maps the name of a pair of tables (`rope` for `rope.cos` and `rope.sin`) to what computes them. Tensors that
    start with one of `ignored` belong to parts not run here. `norm_offset` is what its norms add to their weight.
    """

    sizes: Sizes
    ropes: Mapping[str, Rope]

    ignored: ClassVar[tuple[str, ...]] = ()
    norm_offset: ClassVar[float] = 0.0

    @classmethod
    @abstractmethod
    def read(cls, config: ConfigReader) -> Architecture:
        """The architecture with the values of `config`; raises CheckpointError for what is missing or unsupported."""

    @abstractmethod
    def logits(self, g: DecoderBuilder) -> Value:
        """Append the whole model to `g`; returns the logits of the rows asked for, f32[R, V]."""

    @property
    def max_positions(self) -> int:
        """How many positions the model serves, scaling included."""
        return max(rope.reach for rope in self.ropes.values())

    def graph(self, name: str, sources: Sources, dtype: DType) -> Graph:
        """The checked graph, with parameters in `dtype`."""
        g = DecoderBuilder(name, self.sizes, sources, dtype, self.norm_offset)
        return g.finish(self.logits(g))


@functools.cache
def architectures() -> Mapping[str, type[Architecture]]:
    """Every supported model type and its class, read off this folder."""
    found: dict[str, type[Architecture]] = {}
    package = importlib.import_module("slotwise.models")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"slotwise.models.{info.name}")
        found.update(getattr(module, "ARCHITECTURES", {}))
    return found


def read_architecture(config: ConfigReader, model_type: str) -> Architecture:
    """The architecture of `model_type`, one of `architectures()`, filled in from `config`.

    Raises CheckpointError for quantised weights and all else unsupported.
    """
    if config.has("quantization_config"):
        raise CheckpointError(
            f"{config.source}: has 'quantization_config'; quantised weights are not supported, expected weights in "
            "float32, float16 or bfloat16"
        )
    return architectures()[model_type].read(config)


def refuse_encoder(config: ConfigReader) -> None:
    """Raise CheckpointError for a model that reads its input with an encoder, or looks at what follows a token."""
    if not config.boolean("is_causal", default=True):
        raise CheckpointError(f"{config.source}: 'is_causal' is false; only causal decoders are supported")
    if config.boolean("is_encoder_decoder", default=False):
        raise CheckpointError(f"{config.source}: 'is_encoder_decoder' is true; only decoders are supported")


def read_sizes(
    config: ConfigReader,
    *,
    activation: str = "hidden_act",
    tied: bool = False,
    defaults: Mapping[str, int] | None = None,
) -> Sizes:
    """The sizes that all architectures share.

    `activation` is the key that names it, `tied` and `defaults` hold where the config says nothing. A head_dim that is
    neither given nor in `defaults` is hidden_size / num_attention_heads. Raises CheckpointError for sizes that cannot
    be, or a mixture of experts.
    """
    for key in _EXPERTS:
        if config.has(key) and config.integer(key, at_least=0, at_most=2**31):
            raise CheckpointError(f"{config.source}: has '{key}'; mixture of experts is not supported")
    refuse_encoder(config)
    known = defaults or {}
    hidden = config.positive_int("hidden_size")
    q_heads = config.positive_int("num_attention_heads", default=known.get("num_attention_heads"))
    kv_heads = config.positive_int("num_key_value_heads", default=known.get("num_key_value_heads", q_heads))
    if q_heads % kv_heads:
        raise CheckpointError(
            f"{config.source}: 'num_attention_heads' must be a multiple of 'num_key_value_heads', found {q_heads} and "
            f"{kv_heads}"
        )
    derived = hidden // q_heads if hidden % q_heads == 0 else None
    if derived is None and "head_dim" not in known and not config.has("head_dim"):
        raise CheckpointError(
            f"{config.source}: 'hidden_size' must be a multiple of 'num_attention_heads' unless 'head_dim' is given, "
            f"found {hidden} and {q_heads}"
        )
    head_dim = config.positive_int("head_dim", default=known.get("head_dim", derived))
    if head_dim % 2:
        raise CheckpointError(f"{config.source}: 'head_dim' must be even for a rotary embedding, found {head_dim}")
    return Sizes(
        hidden=hidden,
        inner=config.positive_int("intermediate_size"),
        layers=config.positive_int("num_hidden_layers"),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=config.positive_int("vocab_size", default=known.get("vocab_size")),
        max_positions=config.positive_int("max_position_embeddings", default=known.get("max_position_embeddings")),
        eps=config.number("rms_norm_eps", default=1e-6, at_least=0.0, at_most=1.0),
        activation=_read_activation(config, activation),
        tied=config.boolean("tie_word_embeddings", default=tied),
    )


def _read_activation(config: ConfigReader, key: str) -> str:
    default = "silu" if key == "hidden_act" else "gelu_pytorch_tanh"
    return _ACTIVATIONS[config.choice(key, tuple(_ACTIVATIONS), default=default)]


def read_one_rope(config: ConfigReader, sizes: Sizes) -> dict[str, Rope]:
    """The rotary embedding that all layers share, as the tables `rope`."""
    section, theta = rope_section(config), 10_000.0
    if not section.has("rope_theta"):
        theta = config.number("rope_theta", default=theta, at_least=2.0, at_most=1e15)
    return {"rope": read_rope(config, section, head_dim=sizes.head_dim, max_positions=sizes.max_positions, theta=theta)}


def read_layer_types(config: ConfigReader, default: Sequence[str]) -> tuple[str, ...]:
    """`layer_types`, one of full and sliding attention for each layer; `default` where the config has none."""
    if not config.has("layer_types"):
        return tuple(default)
    return config.str_list("layer_types", options=(FULL, SLIDING), length=len(default))


def windows_of(config: ConfigReader, layer_types: Sequence[str], window: int | None) -> tuple[int, ...]:
    """Each layer's window: 0 sees everything. Raises CheckpointError for a sliding layer when `window` is None."""
    if SLIDING in layer_types and window is None:
        raise CheckpointError(f"{config.source}: has sliding-attention layers, but no 'sliding_window' is in force")
    return tuple((window or 0) if kind == SLIDING else 0 for kind in layer_types)
