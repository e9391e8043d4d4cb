"""Every field of a config.json acts, is refused by name, or is listed as one without a meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slotwise.core.errors import CheckpointError
from slotwise.models.architecture import architectures, read_architecture
from slotwise.models.config import ConfigReader
from slotwise.models.config_fields import ROPE_KEYS, WITHOUT_MEANING, Noted
from slotwise.models.declared_tokens import DeclaredTokens
from slotwise.models.load import load_model

from .randomised import GEMMA, Model, assert_close, our_logits, rewrite, their_logits, tokens

READ_ELSEWHERE = {
    "model_type": "load_model chooses by it",
    "dtype": "load_model computes in it",
    "eos_token_id": "DeclaredTokens",
}
MODEL_TYPES = sorted(architectures())


def fields_of(model_type: str) -> dict[str, Any]:
    """All attributes of the config class, as transformers writes and keeps them; null ones get a value."""
    config = transformers.AutoConfig.for_model(model_type)
    kept = {name: value for name, value in vars(config).items() if not name.endswith(("_internal", "_init_done"))}
    public = {name: value for name, value in kept.items() if name not in ("_output_attentions", "_commit_hash")}
    plain = json.loads(json.dumps({**public, **config.to_dict()}, default=lambda value: value.to_dict()))
    return {name: 1 if value is None else value for name, value in plain.items()}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_attribute_of_the_config_class_is_read_refused_or_listed(model_type: str) -> None:
    fields = fields_of(model_type)
    asked_for = {"use_sliding_window": True, "sliding_window": 7, "use_bidirectional_attention": False}
    fields.update({name: value for name, value in asked_for.items() if name in fields})
    fields.update({"attn_logit_softcapping": None} if model_type == "gemma3_text" else {})  # refused by name there
    noted = Noted(fields)
    read_architecture(ConfigReader(noted, "config.json"), model_type)
    by_number = Noted({**fields, "layer_types": None})  # `max_window_layers` speaks where `layer_types` does not
    read_architecture(ConfigReader(by_number, "config.json"), model_type)
    noted.asked |= by_number.asked
    parts = [noted] + ([noted["text_config"]] if "text_config" in fields else [])
    for part in parts:
        assert set(part.unexplained()) <= READ_ELSEWHERE.keys()
        assert not part.asked & WITHOUT_MEANING.keys(), "what is read has a meaning"


def test_every_field_that_is_listed_exists() -> None:
    known = {name for model_type in MODEL_TYPES for name in fields_of(model_type)}
    in_ropes = {"mrope_section", "mrope_interleaved", "finetuned"}
    assert WITHOUT_MEANING.keys() - in_ropes <= known | {"use_return_dict"}
    assert not in_ropes & set(ROPE_KEYS)


def test_the_fields_that_are_read_elsewhere_are(tmp_path: Path) -> None:
    Model("LlamaConfig").build().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    rewrite(tmp_path, lambda config: config.update(eos_token_id=7, dtype="float16"))
    assert DeclaredTokens.load(tmp_path).end_ids == ((7, "config.json"),)
    assert load_model(tmp_path).spec.dtype.torch == torch.float16


@pytest.mark.parametrize(
    "values",
    [
        {"attention_dropout": 0.9, "initializer_range": -1, "problem_type": 3},
        {"chunk_size_feed_forward": 2, "output_attentions": True, "pretraining_tp": 4, "use_cache": False},
        {"architectures": ["LlamaForSequenceClassification"], "bos_token_id": -1, "pad_token_id": [-1]},
        {"num_local_experts": 0, "num_experts": None},
    ],
    ids=str,
)
def test_a_field_without_a_meaning_may_have_any_value(values: dict[str, Any], tmp_path: Path) -> None:
    model = Model("LlamaConfig").build()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config.update(values))
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
NOT_IN_FORCE: dict[str, tuple[Model, dict[str, Any]]] = {
    "a window that is switched off": (
        Model("Qwen2Config"),
        {"use_sliding_window": False, "sliding_window": -1, "max_window_layers": -1, "layer_types": None},
    ),
    "a first window layer beside layer types": (Model("Qwen3Config"), {"max_window_layers": "none"}),
    "a base beside that of the rotary section": (Model("LlamaConfig"), {"rope_theta": 0, "rope_parameters": ROPE}),
    "settings of another rotary type": (
        Model("LlamaConfig"),
        {"rope_parameters": {**ROPE, "factor": -1, "beta_fast": "x", "low_freq_factor": 0}},
    ),
    "a window where no layer has one": (
        Model("Gemma2Config", {"layer_types": ["full_attention"] * 4}, GEMMA),
        {"sliding_window": 0},
    ),
    "a pattern beside layer types": (
        Model("Gemma3TextConfig", {"layer_types": ["full_attention"] * 4}, GEMMA),
        {"sliding_window_pattern": 0, "sliding_window": -1, "rope_local_base_freq": -1},
    ),
}


@pytest.mark.parametrize("case", NOT_IN_FORCE)
def test_a_field_that_is_not_in_force_may_have_any_value(case: str, tmp_path: Path) -> None:
    source, values = NOT_IN_FORCE[case]
    model = source.build()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config.update(values))
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


OTHER_WORDS: dict[str, tuple[Model, dict[str, Any]]] = {
    "swish": (Model("LlamaConfig", {"hidden_act": "silu"}), {"hidden_act": "swish"}),
    "gelu_new": (Model("LlamaConfig", {"hidden_act": "gelu_new"}), {}),
    "torch.float32": (Model("LlamaConfig"), {"dtype": None, "torch_dtype": "torch.float32"}),
    "auto": (Model("LlamaConfig"), {"dtype": "auto"}),
}


@pytest.mark.parametrize("word", OTHER_WORDS)
def test_another_word_for_the_same_is_understood(word: str, tmp_path: Path) -> None:
    source, values = OTHER_WORDS[word]
    model = source.build()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config.update(values))
    loaded = load_model(tmp_path)
    assert loaded.spec.dtype.torch == torch.float32
    assert_close(our_logits(loaded)(tokens()), their_logits(model, tokens()))


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    """transformers gives any decoder whose config says so a mask without an order."""
    Model("LlamaConfig").build().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config.update(is_causal=False))
    with pytest.raises(CheckpointError, match="'is_causal' is false; only causal decoders"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["default", "mrope"])
@pytest.mark.parametrize("section", [[4, 4, 4], [2, 3, 7]], ids=str)
def test_text_turns_by_mrope_as_by_an_ordinary_rotary_embedding(kind: str, section: list[int], tmp_path: Path) -> None:
    model = Model("Qwen2Config", {"hidden_size": 6 * 24, "head_dim": 24}).build()
    model.save_pretrained(tmp_path)
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "mrope_section": section}
    rewrite(tmp_path, lambda config: config.update(rope_parameters=rope))
    sees = _that_sees(model, section)
    with torch.inference_mode():
        theirs = model.lm_head(sees(tokens().unsqueeze(0)).last_hidden_state[0])
    assert_close(our_logits(load_model(tmp_path))(tokens()), theirs)


def _that_sees(model: Any, section: list[int]) -> Any:
    """The decoder of Qwen2.5-VL with the weights of a Qwen2: it splits each head by `section`."""
    plain = model.config.to_dict()
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section}
    config = transformers.Qwen2_5_VLTextConfig(**{**plain, "model_type": "qwen2_5_vl_text", "rope_parameters": rope})
    sees = transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLTextModel._from_config(
        config, attn_implementation="eager"
    ).eval()
    sees.load_state_dict(model.model.state_dict())
    assert sees.rotary_emb.mrope_section == section
    return sees
