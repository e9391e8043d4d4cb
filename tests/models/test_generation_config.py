"""What a generation_config.json says acts, is refused by name where it is in force, or is listed as meaning nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, LlamaConfig, LlamaForCausalLM

from slotwise.core.errors import CheckpointError
from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.adjust import LogitAdjuster
from slotwise.models.generation_config import SILENT_TOP_K, GenerationDefaults
from slotwise.models.generation_fields import FIELDS
from slotwise.requests import default_sampling

VOCABULARY = 23
EOS = 5


def defaults(tmp_path: Path, fields: dict[str, Any]) -> GenerationDefaults:
    (tmp_path / "generation_config.json").write_text(json.dumps(fields))
    return GenerationDefaults.load(tmp_path)


def test_the_table_has_every_field_that_transformers_has() -> None:
    assert set(vars(GenerationConfig())) <= set(FIELDS)
    assert set(FIELDS) <= set(vars(GenerationConfig()))
    assert all(field.note for field in FIELDS.values())


def test_docs_have_every_field_with_what_becomes_of_it() -> None:
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    for name, field in FIELDS.items():
        assert f"| `{name}` | {field.note}" in page


def test_where_the_file_is_silent_transformers_decides() -> None:
    assert GenerationConfig._get_default_generation_params()["top_k"] == SILENT_TOP_K


REFUSED = {
    "max_time": 1.0,
    "num_beams": 4,
    "use_mtp": True,
    "top_h": 0.5,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "encoder_repetition_penalty": 1.5,
    "remove_invalid_values": True,
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.5},
    "num_return_sequences": 3,
    "encoder_no_repeat_ngram_size": 2,
    "assistant_ensemble_weight": 0.5,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[1]],
}


def test_there_is_a_value_to_try_for_every_field_that_is_refused() -> None:
    assert set(REFUSED) == {name for name, field in FIELDS.items() if field.kind == "refused"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_done_is_refused_by_name_when_it_is_in_force_and_never_by_loading(
    tmp_path: Path, name: str
) -> None:
    found = defaults(tmp_path, {"do_sample": True, name: REFUSED[name]})
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: '{name}' is .*give a Sampling"):
        default_sampling(found, ())
    if FIELDS[name].sampled:
        default_sampling(defaults(tmp_path, {name: REFUSED[name]}), ())


def test_neutral_values_are_no_reason_to_refuse(tmp_path: Path) -> None:
    neutral = {k: v for k, v in GenerationConfig._get_default_generation_params().items() if k in FIELDS}
    neutral |= {"do_sample": True, "penalty_alpha": 0.0, "guidance_scale": 1.0, "num_beam_groups": 1}
    default_sampling(defaults(tmp_path, neutral | {"diversity_penalty": 0.0, "top_h": None}), ())


@pytest.mark.parametrize("entry", [{"pad_token_id": -1}, {"bos_token_id": [1]}, {"top_k": -7, "temperature": -1}])
def test_an_odd_value_that_nothing_uses_is_no_reason_to_refuse(tmp_path: Path, entry: dict[str, Any]) -> None:
    assert defaults(tmp_path, entry).suggested(()) == {}


@pytest.mark.parametrize(
    "entry",
    [
        {"do_sample": 1},
        {"do_sample": True, "temperature": -0.1},
        {"do_sample": True, "top_k": 2.5},
        {"do_sample": True, "top_p": 1.5},
        {"repetition_penalty": 0},
        {"bad_words_ids": 7},
        {"sequence_bias": [[5]]},
    ],
)
def test_a_value_that_makes_no_sense_is_refused_when_it_is_used(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        default_sampling(defaults(tmp_path, entry), ())


def test_samplers_act_where_the_file_samples(tmp_path: Path) -> None:
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    assert defaults(tmp_path, given).suggested(()) == {}
    assert defaults(tmp_path, {"do_sample": True, **given}).suggested(()) == given
    assert defaults(tmp_path, {"do_sample": True}).suggested(()) == {"temperature": 1.0, "top_k": SILENT_TOP_K}


def test_lengths_and_strings_act(tmp_path: Path) -> None:
    sampling = default_sampling(defaults(tmp_path, {"max_length": 90, "stop_strings": ["END"]}), ())
    assert (sampling.budget(80), sampling.stop) == (10, ("END",))
    assert default_sampling(defaults(tmp_path, {"max_length": 90, "max_new_tokens": 7}), ()).budget(80) == 7


SHIPPED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Qwen2.5-7B-Instruct": (
        {
            "bos_token_id": 151643,
            "pad_token_id": 151643,
            "do_sample": True,
            "eos_token_id": [151645, 151643],
            "repetition_penalty": 1.05,
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "transformers_version": "4.37.0",
        },
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05},
    ),
    "Llama-3.1-8B-Instruct": (
        {
            "bos_token_id": 128000,
            "do_sample": True,
            "eos_token_id": [128001, 128008, 128009],
            "temperature": 0.6,
            "top_p": 0.9,
            "transformers_version": "4.42.3",
        },
        {"temperature": 0.6, "top_p": 0.9, "top_k": SILENT_TOP_K},
    ),
    "Llama-2-7b-chat": (
        {"bos_token_id": 1, "do_sample": True, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6}
        | {"max_length": 4096, "top_p": 0.9},
        {"temperature": 0.6, "top_p": 0.9, "top_k": SILENT_TOP_K, "max_length": 4096, "max_new_tokens": None},
    ),
    "gemma-2-2b-it": (
        {"_from_model_config": True, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 107]},
        {},
    ),
    "Phi-3-mini": ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": [32000, 32001, 32007]}, {}),
    "as Whisper's": (
        {
            "begin_suppress_tokens": [220, 50257],
            "suppress_tokens": [1, 2, 7],
            "forced_decoder_ids": [[1, None], [2, 50359]],
            "is_multilingual": True,
            "max_length": 448,
            "return_timestamps": False,
        },
        {"begin_suppress_tokens": (220, 50257), "banned_tokens": (1, 2, 7), "max_length": 448, "max_new_tokens": None},
    ),
    "all that is null": (dict.fromkeys(FIELDS), {}),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_files_as_they_are_shipped_sample_as_they_say(tmp_path: Path, name: str) -> None:
    fields, expected = SHIPPED[name]
    assert default_sampling(defaults(tmp_path, fields), ()) == Sampling(**expected)


ACTING: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[3], [EOS], [4, 9], [2, 4, 9], [9, 4, 2]]},
    "sequence_bias": {"sequence_bias": [[[6], 2.5], [[4, 8], -3.0], [[2, 4, 8], 1.25]]},
    "min_new_tokens": {"min_new_tokens": 4},
    "min_length": {"min_length": 8},
    "forced_eos_token_id": {"forced_eos_token_id": [EOS, 7]},
    "forced_bos_token_id": {"forced_bos_token_id": 11},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [1, 1.5]},
    "suppress_tokens": {"suppress_tokens": [1, 2]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [12, 13]},
    "many": {"repetition_penalty": 1.3, "sequence_bias": [[[6], 2.5]], "no_repeat_ngram_size": 1, "min_new_tokens": 9},
}


@pytest.mark.parametrize("name", sorted(ACTING))
@pytest.mark.parametrize("prompt", [[2, 4, 6, 2, 4], [4]], ids=["prompt", "one token"])
def test_logits_are_edited_as_transformers_edits_them(tmp_path: Path, name: str, prompt: list[int]) -> None:
    budget = 6
    sampling = default_sampling(defaults(tmp_path, ACTING[name]), (EOS,))
    config = GenerationConfig(**ACTING[name], eos_token_id=EOS, max_length=len(prompt) + budget)
    config._eos_token_tensor = torch.tensor([EOS])
    mixin = LlamaForCausalLM(tiny_llama())
    processors = GenerationMixin._get_logits_processor(mixin, config, input_ids_seq_length=len(prompt), device="cpu")
    adjuster = LogitAdjuster(sampling, prompt, [EOS], budget)
    generator = torch.Generator().manual_seed(3)
    output: list[int] = []
    for _ in range(budget):
        logits = torch.randn(1, VOCABULARY, generator=generator) * 4
        expected = processors(torch.tensor([prompt + output]), logits.clone())[0].numpy()
        row = logits[0].numpy().copy()
        adjuster.edits(output).apply(row)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
        output.append(int(np.argmax(row)))


def tiny_llama() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
