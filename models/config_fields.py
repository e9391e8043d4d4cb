"""The fields of config.json that mean nothing to what is run here, each with the reason.

Owns `WITHOUT_MEANING`, `ROPE_KEYS` and `Noted`. What always holds: every attribute of the config classes that
transformers has for our model types is read by its architecture, refused by name, or listed here; a test compares the
three with the classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_REASONS: Mapping[str, tuple[str, ...]] = {
    "training alone uses it": ("attention_dropout", "initializer_range", "problem_type", "id2label", "label2id"),
    "it says how transformers runs a model, not what the model computes": (
        "chunk_size_feed_forward",
        "output_attentions",
        "output_hidden_states",
        "pretraining_tp",
        "return_dict",
        "use_cache",
    ),
    "it names the file's origin; `model_type` decides": ("_name_or_path", "architectures", "transformers_version"),
    "a prompt begins as the tokenizer says, and nothing is padded": ("bos_token_id", "pad_token_id"),
    "`layer_types`, which is written beside it, says the same of each layer": ("_sliding_window_pattern",),
    "images are not read": (
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "mm_tokens_per_image",
        "vision_config",
    ),
    "a token of text has one position in all three rows, so every split of a head turns alike": (
        "mrope_section",
        "mrope_interleaved",
    ),
    "it tells where a scaling came from": ("finetuned",),
}

WITHOUT_MEANING: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names}
"""Field -> why it may have any value."""

ROPE_KEYS = (
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "short_factor",
    "long_factor",
)
"""What any type of rotary scaling reads: a key of another type than the one in force does not apply."""


class Noted(dict[str, Any]):
    """The fields of a config that remember which of them were asked for, nested ones too."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__(fields)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict gives it; an object within notes what is asked of it too."""
        self.asked.add(key)
        value = super().get(key, default)
        if isinstance(value, dict) and not isinstance(value, Noted):
            value = self[key] = Noted(value)
        return value

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def unexplained(self) -> Iterator[str]:
        """The fields with a value that nobody asked for and that are not known to mean nothing."""
        return (k for k, v in self.items() if v is not None and k not in self.asked and k not in WITHOUT_MEANING)


def unknown_rope_keys(fields: Mapping[str, object]) -> Iterator[str]:
    """The keys of a section on rotary embeddings that nobody knows the meaning of."""
    return (key for key, value in fields.items() if value is not None and key not in (*ROPE_KEYS, *WITHOUT_MEANING))
