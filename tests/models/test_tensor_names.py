"""A decoder's tensors are found by whichever of the known prefixes they have, in every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from slotwise.core.errors import CheckpointError
from slotwise.models.load import load_model
from slotwise.models.weights import PREFIXES

from .randomised import GEMMA, Model, assert_close, our_logits, rename_tensors, their_logits, tokens

FAMILIES = {
    "llama": Model("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": Model("MistralConfig", {"sliding_window": 7}),
    "qwen2": Model("Qwen2Config"),
    "qwen3": Model("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma2": Model("Gemma2Config", {}, GEMMA),
    "gemma3_text": Model("Gemma3TextConfig", {"sliding_window_pattern": 3}, GEMMA),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_is_found_by_any_known_prefix(family: str, prefix: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    model.save_pretrained(tmp_path)
    head = "language_model." if prefix.startswith("language_model.") else ""
    rename_tensors(
        tmp_path, lambda name: f"{head}{name}" if name.startswith("lm_head") else prefix + name.removeprefix("model.")
    )
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_decoder_saved_from_its_base_class_is_what_transformers_makes_of_it(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family].build()
    model.model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(theirs, tokens()))


def test_a_base_class_without_tied_embeddings_is_refused_for_its_missing_head(tmp_path: Path) -> None:
    FAMILIES["qwen2"].build().model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' .* is missing; .* made for embeddings alone has none"):
        load_model(tmp_path)


def test_names_of_another_kind_are_shown(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    rename_tensors(tmp_path, lambda name: name.replace("model.", "transformer.", 1))
    with pytest.raises(CheckpointError, match=r"hold no layer; expected names .*'transformer.embed_tokens.weight'"):
        load_model(tmp_path)
