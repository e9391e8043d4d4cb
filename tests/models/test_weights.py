"""A checkpoint and its config are checked against each other before a weight is touched; weights stay memory-mapped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slotwise.core.errors import CheckpointError, OptionError
from slotwise.core.specs import DType, TensorSpec
from slotwise.models import checkpoint as checkpoint_module
from slotwise.models.architecture import architectures
from slotwise.models.load import load_model
from slotwise.proving.interpret import load_parameters

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Change = Callable[[Tensors], object]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied Llama of two layers, in bfloat16."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def without(*names: str) -> Change:
    return lambda tensors: [tensors.pop(name) for name in names]


def source_of(folder: Path, parameter: str) -> str:
    for known in load_model(folder).spec.graph.parameters:
        if known.value.name == parameter:
            return known.sources[0]
    raise AssertionError(f"no parameter {parameter}")


# --- what is handed over -------------------------------------------------------------------------------------------


def test_weights_are_views_of_the_mapped_file(folder: Path) -> None:
    loaded = load_model(folder, DType.F32)
    spec = TensorSpec(DType.F32, (24, 12))
    one, again = loaded.weights.tensor(Q, spec), loaded.weights.tensor(Q, spec)
    assert one.data_ptr() == again.data_ptr(), "two calls give one memory: the mapping"
    assert one.dtype == torch.bfloat16, "converting is left to whoever copies"
    assert torch.equal(one, load_file(folder / "model.safetensors")[Q])


def test_loading_touches_no_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a weight was touched")

    monkeypatch.setattr(checkpoint_module.Checkpoint, "tensor", refuse)
    assert load_model(folder).spec.vocab_size == 11


def test_every_source_of_the_graph_is_answered(folder: Path) -> None:
    loaded = load_model(folder)
    values = load_parameters(loaded.spec.graph, loaded.weights, {"M": 7})
    assert values["rope.cos"].shape == (7, 2)
    for parameter in loaded.spec.graph.parameters:
        assert values[parameter.value.name].dtype == parameter.value.spec.dtype.torch


@pytest.mark.parametrize("name", ["model.nothing", "rope.tan", "rope.local.cos"])
def test_a_name_that_is_not_there_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"no tensor '{re.escape(name)}'"):
        load_model(folder).weights.tensor(name, TensorSpec(DType.F32, (3, 2)))


def test_the_spec_says_what_the_model_is(folder: Path) -> None:
    spec = load_model(folder).spec
    assert (spec.name, spec.architecture) == (folder.name, "llama")
    assert (spec.vocab_size, spec.max_positions, spec.dtype) == (11, 32, DType.BF16)
    assert [str(value.spec) for value in spec.graph.inputs] == ["i32[T]", "i32[T]", "i32[R]"]
    assert [str(value.spec) for value in spec.graph.outputs] == ["f32[R, 11]"]


def test_a_dtype_that_is_not_computed_in_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="dtype must be one of f32, f16, bf16 to compute in, found f64"):
        load_model(folder, DType.F64)
    edit_config(folder, dtype="float8_e4m3fn")
    with pytest.raises(CheckpointError, match="'dtype' must be one of float32, float16, bfloat16"):
        load_model(folder)


# --- tied embeddings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [EMBEDDING, HEAD])
def test_tied_embeddings_need_one_tensor_whichever_it_is(folder: Path, stored: str) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, without(HEAD if stored == EMBEDDING else EMBEDDING))
    graph = load_model(folder).spec.graph
    assert source_of(folder, "embedding") == stored
    assert not [p for p in graph.parameters if p.value.name == "lm_head"], "one weight serves both ends"
    assert graph.nodes[-1].inputs[1] == graph.nodes[0].inputs[1]


def test_a_second_copy_of_tied_embeddings_is_harmless(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
    assert [p.sources for p in load_model(folder).spec.graph.parameters].count((EMBEDDING,)) == 1


def test_tied_embeddings_that_differ_each_serve_their_own_end(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert (source_of(folder, "embedding"), source_of(folder, "lm_head")) == (EMBEDDING, HEAD)


# --- tensors that do not fit ---------------------------------------------------------------------------------------


def _cast(name: str, dtype: torch.dtype) -> Change:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


TENSORS: dict[str, tuple[Change, str]] = {
    "missing": (
        without(Q),
        rf"tensor '{re.escape(Q)}' of shape \[24, 12\] is missing \(did you mean",
    ),
    "missing head": (
        without(HEAD),
        "tensor 'lm_head.weight' .* is missing; if the model shares its embeddings, 'tie_word_embeddings'",
    ),
    "transposed": (
        lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}),
        rf"tensor '{re.escape(Q)}' must have the shape \[24, 12\] by config.json, found \[12, 24\]",
    ),
    "another rank": (lambda tensors: tensors.update({Q: tensors[Q].flatten()}), r"found \[288\]"),
    "integers": (_cast(Q, torch.int8), f"tensor '{re.escape(Q)}' must be one of F32, F16, BF16, found I8"),
    "float64": (_cast(Q, torch.float64), "found F64"),
    "float8": (_cast(Q, torch.float8_e4m3fn), "found F8_E4M3"),
    "a third layer": (
        lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(3)}),
        r"'num_hidden_layers' is 2, but the weights named 'model.layers.\*' hold layers 0 to 2 \(3 of them\)",
    ),
    "unknown in a layer": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(4)}),
        "holds 1 tensors without a use in a llama of this config.json: 'model.layers.0.self_attn.q_norm.weight'",
    ),
    "a bias that the config does not have": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(24)}),
        "without a use",
    ),
    "unknown beside": (lambda tensors: tensors.update({"adapter.weight": torch.zeros(4)}), "'adapter.weight'"),
    "no layer at all": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers." in name],
        "hold no layer",
    ),
}


@pytest.mark.parametrize("case", TENSORS, ids=TENSORS)
def test_tensors_that_do_not_fit_are_refused(case: str, folder: Path) -> None:
    change, message = TENSORS[case]
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)


def test_rotary_buffers_of_old_checkpoints_are_harmless(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    assert load_model(folder).spec.vocab_size == 11


# --- configs that do not fit ---------------------------------------------------------------------------------------

CONFIGS: dict[str, tuple[Config, str]] = {
    "unknown model type": (
        {"model_type": "qwen4"},
        r'model_type "qwen4" is not supported; supported are gemma2, gemma3, gemma3_text, llama, mistral, qwen2, qwen3',
    ),
    "a type by which it would load": (
        {"model_type": "Llama"},
        r'model_type "Llama" is not supported \(did you mean \'llama\'\? as that it would load\)',
    ),
    "a near type, and a field that it would not read": (
        {"model_type": "llama_next", "attention_multiplier": 0.5},
        r'model_type "llama_next" is not supported; supported are',
    ),
    "an encoder and decoder": ({"is_encoder_decoder": True}, "'is_encoder_decoder' is true; only decoders"),
    "a mixture of experts": ({"model_type": "mixtral"}, "model_type .*mixtral.* is not supported"),
    "experts in a known type": ({"num_local_experts": 8}, "mixture of experts is not supported"),
    "no model type": ({"model_type": ...}, "'model_type' is missing"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised weights are not supported"),
    "one layer more": ({"num_hidden_layers": 3}, r"'num_hidden_layers' is 3, but .* hold layers 0 to 1 \(2 of them\)"),
    "one layer less": ({"num_hidden_layers": 1}, "'num_hidden_layers' is 1, but"),
    "absurdly many layers": ({"num_hidden_layers": 10_000}, "'num_hidden_layers' is 10000, but"),
    "more layers than can be": ({"num_hidden_layers": 10**12}, "'num_hidden_layers' must be an integer from 1 to"),
    "no layer": ({"num_hidden_layers": 0}, "'num_hidden_layers' must be an integer from 1"),
    "hidden size is text": ({"hidden_size": "12"}, "'hidden_size' must be an integer"),
    "no hidden size": ({"hidden_size": ...}, "'hidden_size' is missing"),
    "another hidden size": ({"hidden_size": 24}, r"must have the shape \[11, 24\] by config.json, found \[11, 12\]"),
    "another vocabulary": ({"vocab_size": 12}, r"must have the shape \[12, 12\] by config.json, found \[11, 12\]"),
    "heads not grouped evenly": (
        {"num_key_value_heads": 4},
        "'num_attention_heads' must be a multiple of 'num_key_value_heads', found 6 and 4",
    ),
    "no heads": ({"num_attention_heads": 0}, "'num_attention_heads' must be an integer from 1"),
    "head size 0": ({"head_dim": 0}, "'head_dim' must be an integer from 1"),
    "odd head size": ({"head_dim": 5}, "'head_dim' must be even for a rotary embedding, found 5"),
    "heads that do not divide": (
        {"head_dim": None, "hidden_size": 13},
        "'hidden_size' must be a multiple of 'num_attention_heads' unless 'head_dim' is given, found 13 and 6",
    ),
    "activation": (
        {"hidden_act": "relu"},
        "'hidden_act' must be one of silu, swish, gelu, gelu_pytorch_tanh, gelu_new",
    ),
    "epsilon": ({"rms_norm_eps": -1}, "'rms_norm_eps' must be a number from 0 to 1"),
    "biases that are not stored": (
        {"attention_bias": True},
        r"tensor 'model.layers.0.self_attn.q_proj.bias' of shape \[24\] is missing",
    ),
    "a rotary setting that nobody knows": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}},
        "in 'rope_parameters': the rotary setting \"alpha\" is not supported",
    ),
    "rope type": ({"rope_parameters": {"rope_type": "longrope"}}, "rope type .*longrope.* is not supported"),
}


@pytest.mark.parametrize("case", CONFIGS, ids=CONFIGS)
def test_configs_that_do_not_fit_are_refused(case: str, folder: Path) -> None:
    changes, message = CONFIGS[case]
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_model(folder)
    assert str(folder) in str(refusal.value)


FAMILIES: dict[str, tuple[str, Config, str]] = {
    "qwen2 layer types": ("qwen2", {"layer_types": ["full_attention"]}, "'layer_types' must be a list of 2 strings"),
    "qwen2 unknown layer type": ("qwen2", {"layer_types": ["full_attention", "linear"]}, "'layer_types' must be"),
    "qwen3 sliding without a window": (
        "qwen3",
        {"layer_types": ["sliding_attention", "full_attention"]},
        "has sliding-attention layers, but no 'sliding_window' is in force",
    ),
    "mistral window 0": ("mistral", {"sliding_window": 0}, "'sliding_window' must be an integer from 1"),
    "gemma2 bidirectional": ("gemma2", {"use_bidirectional_attention": True}, "only causal decoders are supported"),
    "gemma2 soft cap 0": ("gemma2", {"final_logit_softcapping": 0}, "'final_logit_softcapping' must be a number"),
    "gemma2 scale": ("gemma2", {"query_pre_attn_scalar": 0}, "'query_pre_attn_scalar' must be a number"),
    "gemma3 capped scores": ("gemma3_text", {"attn_logit_softcapping": 50.0}, "not supported for Gemma 3"),
    "gemma3 without its text": ("gemma3", {}, "'text_config' is missing"),
}


@pytest.mark.parametrize("case", FAMILIES, ids=FAMILIES)
def test_what_a_family_cannot_be_is_refused(case: str, folder: Path) -> None:
    model_type, changes, message = FAMILIES[case]
    edit_config(folder, model_type=model_type, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.parametrize("model_type", sorted(architectures()))
@given(data=st.data())
def test_any_value_in_a_config_is_taken_or_refused_clearly(model_type: str, saved: Path, data: st.DataObject) -> None:
    config = json.loads((saved / "config.json").read_text())
    keys = st.sampled_from([*sorted(config), "sliding_window", "layer_types", "rope_scaling", "text_config"])
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 2**33),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=3),
        st.lists(st.integers(), max_size=2),
        st.just(dict(config)),
    )
    changes = data.draw(st.dictionaries(keys.filter(lambda key: key != "model_type"), values, max_size=3))
    spoiled = checkpoint_module.Checkpoint.open(saved)
    fields = {**config, "model_type": model_type, **changes}
    try:
        _load_with(spoiled, fields)
    except CheckpointError as error:
        message = str(error)
    else:
        return
    assert str(saved) in message


def _load_with(opened: checkpoint_module.Checkpoint, fields: Config) -> None:
    """`load_model` as far as it goes without a folder of its own."""
    from dataclasses import replace

    from slotwise.models.architecture import read_architecture
    from slotwise.models.weights import check_layers, check_tensors, find_sources

    checkpoint, model_type = replace(opened, config=fields), fields["model_type"]
    architecture = read_architecture(checkpoint.reader(), model_type)
    sources = find_sources(checkpoint, architecture)
    check_layers(checkpoint, sources.prefix, architecture.sizes.layers)
    check_tensors(checkpoint, architecture.graph(model_type, sources, DType.F32), sources, architecture.ignored)
