"""Each architecture computes what transformers computes: float32 logits and greedy tokens on random small checkpoints.

`randomised.py` makes the checkpoints.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slotwise.core.specs import DType
from slotwise.core.state import kv_state
from slotwise.models.load import load_model
from slotwise.proving.interpret import interpret, load_parameters

from .randomised import (
    GEMMA,
    LENGTH,
    Model,
    assert_close,
    our_logits,
    randomise,
    rename_tensors,
    rewrite,
    their_logits,
    tokens,
)


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 16}

MODELS = {
    "llama": Model("LlamaConfig"),
    "llama, tied": Model("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, biases": Model("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head": Model("LlamaConfig", {"num_key_value_heads": 1}),
    "llama, derived head size": Model("LlamaConfig", {"head_dim": None}),
    "llama, gelu": Model("LlamaConfig", {"hidden_act": "gelu"}),
    "llama, theta": Model("LlamaConfig", rope("default") | {"rope_parameters": {"rope_theta": 500.0}}),
    "llama, linear": Model("LlamaConfig", rope("linear", factor=2.5) | {"max_position_embeddings": 16}),
    "llama, llama3": Model("LlamaConfig", LLAMA3),
    "llama, yarn": Model("LlamaConfig", rope("yarn", **YARN)),
    "llama, yarn with mscale": Model("LlamaConfig", rope("yarn", **YARN, mscale=1.5, mscale_all_dim=0.7)),
    "llama, yarn with betas": Model("LlamaConfig", rope("yarn", **YARN, beta_fast=4.0, beta_slow=0.3, truncate=False)),
    "llama, yarn with attention factor": Model("LlamaConfig", rope("yarn", **YARN, attention_factor=1.7)),
    "mistral": Model("MistralConfig", {"sliding_window": None}),
    "mistral, window": Model("MistralConfig", {"sliding_window": 7}),
    "qwen2": Model("Qwen2Config"),
    "qwen2, tied, window": Model(
        "Qwen2Config",
        {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2, window unused": Model("Qwen2Config", {"use_sliding_window": False, "sliding_window": 5}),
    "qwen3": Model("Qwen3Config"),
    "qwen3, biases, tied": Model("Qwen3Config", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3, layer types": Model(
        "Qwen3Config",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma2": Model("Gemma2Config", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, GEMMA),
    "gemma2, no caps, biases": Model(
        "Gemma2Config",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
        GEMMA,
    ),
    "gemma2, untied": Model("Gemma2Config", {"tie_word_embeddings": False}, GEMMA),
    "gemma3": Model("Gemma3TextConfig", {"sliding_window_pattern": 3}, GEMMA),
    "gemma3, scaled, capped": Model(
        "Gemma3TextConfig",
        {
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "final_logit_softcapping": 4.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
        GEMMA,
    ),
    "gemma3, sliding only": Model("Gemma3TextConfig", {"layer_types": ["sliding_attention"] * 4}, GEMMA),
}
GREEDY = ("llama", "llama, llama3", "mistral, window", "qwen2", "qwen3", "gemma2", "gemma3")


@pytest.mark.parametrize("case", MODELS, ids=MODELS)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = MODELS[case].build()
    model.save_pretrained(tmp_path)
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("kinds", [("full", "sliding"), ("sliding", "full"), ("full", "full")], ids=str)
def test_a_mistral_with_layer_types_is_what_transformers_loads_it_as(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    named = [f"{kind}_attention" for kind in kinds]
    Model("MistralConfig", {"sliding_window": 7, "layer_types": named}).build().save_pretrained(tmp_path)
    # Of its own the class gives every layer the window; from a folder it is loaded as another, which reads the types.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(model).__name__ == "MinistralForCausalLM"
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("case", GREEDY)
def test_64_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    model = MODELS[case].build()
    model.save_pretrained(tmp_path)
    run = our_logits(load_model(tmp_path))
    prompt = tokens(5)
    with torch.inference_mode():
        theirs = model.generate(prompt.unsqueeze(0), max_new_tokens=64, do_sample=False)[0]
    sequence = prompt
    for _ in range(64):
        sequence = torch.cat([sequence, run(sequence)[-1].argmax().unsqueeze(0)])
    assert sequence.tolist() == theirs.tolist()


@pytest.mark.parametrize("prompt", [1, 12])
def test_dynamic_scaling_equals_transformers_decoding_token_by_token(prompt: int, tmp_path: Path) -> None:
    model = Model("LlamaConfig", rope("dynamic", factor=3.0) | {"max_position_embeddings": 16}).build()
    model.save_pretrained(tmp_path)
    token_ids = tokens(46)
    with torch.inference_mode():
        step = model(token_ids[None, :prompt], use_cache=True)
        theirs = [step.logits[0]]
        for i in range(prompt, len(token_ids)):
            step = model(token_ids[None, i : i + 1], past_key_values=step.past_key_values, use_cache=True)
            theirs.append(step.logits[0])
    assert_close(our_logits(load_model(tmp_path))(token_ids), torch.cat(theirs))


@pytest.mark.parametrize("case", ["llama, biases", "gemma3"])
def test_a_sharded_checkpoint_is_read_like_a_single_file(case: str, tmp_path: Path) -> None:
    model = MODELS[case].build()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_half_precision_weights_compute_in_float32_on_request(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    MODELS[case].build().to(dtype).save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    )
    loaded = load_model(tmp_path, DType.F32)
    assert loaded.spec.dtype is DType.F32
    assert_close(our_logits(loaded)(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_checkpoints_own_dtype_is_the_default(dtype: torch.dtype, tmp_path: Path) -> None:
    MODELS["llama"].build().to(dtype).save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.spec.dtype.torch == dtype
    logits = our_logits(loaded)(tokens())
    assert logits.dtype == torch.float32
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path).spec.dtype.torch == dtype, "without the config's word, that of the tensors"


def _to_version_4(config: dict[str, Any]) -> None:
    """The keys that transformers 4 wrote for the same model."""
    parameters = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    if "full_attention" in parameters:
        config["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = parameters["full_attention"]
        config["sliding_window_pattern"] = config.pop("_sliding_window_pattern")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    config.pop("layer_types", None)
    if "gemma" in config["model_type"]:
        del config["tie_word_embeddings"]  # true is the family's default, so it was left out


V4 = {
    **{case: MODELS[case] for case in ("llama, theta", "llama, linear", "llama, llama3", "llama, yarn with betas")},
    **{case: MODELS[case] for case in ("mistral, window", "qwen2, tied, window", "qwen3", "gemma2")},
    "gemma3": Model(
        "Gemma3TextConfig",
        {
            "sliding_window_pattern": 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
        GEMMA,
    ),
}


@pytest.mark.parametrize("case", V4, ids=V4)
def test_configs_written_by_transformers_4_mean_the_same(case: str, tmp_path: Path) -> None:
    model = V4[case].build()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, _to_version_4)
    assert_close(our_logits(load_model(tmp_path))(tokens()), their_logits(model, tokens()))


@pytest.mark.parametrize("style", ["as saved", "as transformers 4.52 named them"])
def test_the_text_model_of_a_multimodal_gemma3(style: str, tmp_path: Path) -> None:
    text = transformers.Gemma3TextConfig(**GEMMA)
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    if style != "as saved":
        rename_tensors(tmp_path, lambda name: name.replace("language_model.model.", "model.language_model."))
    loaded = load_model(tmp_path)
    assert loaded.spec.architecture == "gemma3"
    with torch.inference_mode():
        theirs = model.model.language_model(tokens().unsqueeze(0)).last_hidden_state[0]
        assert_close(our_logits(loaded)(tokens()), model.lm_head(theirs))


@pytest.mark.parametrize("name", ["stories", "stories-draft"])
def test_the_bundled_checkpoints(name: str, examples_dir: Path) -> None:
    _compare_real(examples_dir / "models" / name)


@pytest.mark.parametrize("name", ["babyllama", "babyllama-draft", "stories260k", "tinystories-656k"])
def test_further_real_checkpoints(name: str, shared_models: Path) -> None:
    if not (shared_models / name).is_dir():
        pytest.skip(f"needs the checkpoint {name} in shared/models")
    _compare_real(shared_models / name)


def _compare_real(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = load_model(folder, DType.F32)
    assert loaded.spec.name == folder.name
    token_ids = tokens(100, loaded.spec.vocab_size)
    assert_close(our_logits(loaded)(token_ids), their_logits(model, token_ids))


def test_logits_are_of_the_rows_asked_for(tmp_path: Path) -> None:
    model = MODELS["llama"].build()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    parameters = load_parameters(loaded.spec.graph, loaded.weights, {"M": 64})
    inputs = {
        "token_ids": tokens().int(),
        "positions": torch.arange(LENGTH, dtype=torch.int32),
        "logit_rows": torch.tensor([LENGTH - 1, 3], dtype=torch.int32),
    }
    (logits,) = interpret(loaded.spec.graph, {**parameters, **inputs})
    assert_close(logits, their_logits(model, tokens())[[LENGTH - 1, 3]])


ABSENT = object()
WINDOWS: dict[str, tuple[str, Any, list[int]]] = {
    "mistral, 7": ("mistral, window", 7, [7, 7]),
    "mistral, null": ("mistral, window", None, [0, 0]),
    "mistral, not named": ("mistral, window", ABSENT, [4096, 4096]),
    "qwen2, not named": ("qwen2, tied, window", ABSENT, [0, 4096]),
    "gemma2, not named": ("gemma2", ABSENT, [4096, 0, 4096, 0]),
    "gemma3, not named": ("gemma3", ABSENT, [4096, 4096, 0, 4096]),
}


@pytest.mark.parametrize("case", WINDOWS, ids=WINDOWS)
def test_windows_that_a_config_names_denies_or_leaves_out(case: str, tmp_path: Path) -> None:
    base, window, expected = WINDOWS[case]
    MODELS[base].build().save_pretrained(tmp_path)
    rewrite(tmp_path, lambda config: config.pop("sliding_window") if window is ABSENT else _set_window(config, window))
    nodes = load_model(tmp_path).spec.graph.nodes
    assert [node.attr("window") for node in nodes if node.op == "attend"] == expected


def _set_window(config: dict[str, Any], window: int | None) -> None:
    config["sliding_window"] = window


def test_each_layer_declares_what_it_remembers_and_how_far_back_it_is_read(tmp_path: Path) -> None:
    MODELS["gemma2"].build().save_pretrained(tmp_path)
    states = load_model(tmp_path).spec.graph.states
    assert states == tuple(kv_state(layer, 2, 24, DType.F32, window=(8, 0)[layer % 2]) for layer in range(4))
