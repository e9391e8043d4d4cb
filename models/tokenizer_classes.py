"""The classes that transformers 5 builds tokenizers from: which one a checkpoint means, and what it brings along.

Owns the choice of the class, the names of tokens that a class declares when no file does, and the one rebuilding that
is done here, `LlamaTokenizer`'s. Read from transformers 5.23: `models/auto/tokenization_auto.py` and the signatures of
`models/*/tokenization_*.py`; a test compares both. What always holds: a class is known by name alone, nothing of a
checkpoint is run; any other class means what tokenizer.json says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from slotwise.core.errors import CheckpointError
from slotwise.models.config import ConfigReader, parse_json_object

GENERIC = "TokenizersBackend"
"""The class that takes tokenizer.json as it is and names no token."""

LLAMA = "LlamaTokenizer"

_SENTENCE_PIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_END_OF_TEXT = "<|endoftext|>"
_QWEN = {"eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT}

CLASS_TOKENS: Mapping[str, Mapping[str, str]] = {
    LLAMA: _SENTENCE_PIECE,
    "CodeLlamaTokenizer": {
        **_SENTENCE_PIECE,
        "prefix_token": "▁<PRE>",
        "middle_token": "▁<MID>",
        "suffix_token": "▁<SUF>",
        "eot_token": "▁<EOT>",
        "fill_token": "<FILL_ME>",
    },
    "Qwen2Tokenizer": _QWEN,
    "Qwen3_5Tokenizer": _QWEN,
    "GemmaTokenizer": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
    "GPT2Tokenizer": {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT},
    "GPTNeoXTokenizer": {
        "bos_token": _END_OF_TEXT,
        "eos_token": _END_OF_TEXT,
        "unk_token": _END_OF_TEXT,
        "pad_token": "<|padding|>",
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "unk_token": "<UNK>",
        "sep_token": "<SEP>",
        "pad_token": "<PAD>",
        "cls_token": "<CLS>",
        "mask_token": "<MASK_TOKEN>",
    },
}
"""Class -> the tokens that it names where no file names any."""

_BY_MODEL_TYPE: Mapping[str, str] = {
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "mistral": GENERIC,
}
"""Model type -> the class registered for it; llama has none."""

_WRONGLY_DECLARED = ("qwen2",)
"""Model types whose checkpoints often declare a wrong class: the registered one counts."""


def tokenizer_class(declared: str | None, model_type: str | None, data: bytes) -> str:
    """The class that transformers builds for a checkpoint: a key of `CLASS_TOKENS`, or `GENERIC`.

    `declared` is what tokenizer_config.json (else config.json) says, `data` the bytes of tokenizer.json.
    """
    declared = None if declared is None else declared.removesuffix("Fast")
    registered = _BY_MODEL_TYPE.get(model_type or "")
    if declared == LLAMA and model_type not in _WRONGLY_DECLARED and b'"ByteLevel"' in data:
        return GENERIC
    if registered is not None and (declared is None or registered == GENERIC or model_type in _WRONGLY_DECLARED):
        return registered
    return declared if declared is not None and declared in CLASS_TOKENS else GENERIC


def rebuilt_as_llama(data: bytes, config: ConfigReader, source: Path) -> bytes:
    """A tokenizer.json with the normalizer, pre-tokenizer and decoder that transformers 5 gives a `LlamaTokenizer`."""
    tokenizer = parse_json_object(data, source)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{source}: expected a BPE model, as {config.source} declares a {LLAMA}")
    prefixed = config.boolean("add_prefix_space", default=True)
    scheme = "never" if not prefixed else "always" if config.boolean("legacy", default=False) else "first"
    tokenizer["model"] = {**model, "unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None}
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    return json.dumps(tokenizer).encode("ascii")
