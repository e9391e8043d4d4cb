"""Each architecture's plan reads as its golden file: what a small config of it becomes, call by call.

A change of an architecture, of a pass or of the choice of kernels shows here as lines of text. The configs are odd on
purpose: head_dim is not hidden / heads, key heads are shared, layers differ where the architecture lets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from slotwise.core.errors import CheckpointError
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType
from slotwise.models.architecture import architectures, read_architecture
from slotwise.models.blocks import Sources
from slotwise.models.config import ConfigReader
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.show import show_program

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
GEMMA = {**SMALL, "query_pre_attn_scalar": 17, "sliding_window": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {**SMALL, "sliding_window": 7},
    "qwen2": {**SMALL, "head_dim": 12, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {**SMALL, "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {**GEMMA, "rope_local_base_freq": 1000.0, "layer_types": ["sliding_attention", "full_attention"]},
}
REFUSED: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 3},
    "mistral": {**SMALL, "num_local_experts": 8},
    "qwen2": {**SMALL, "hidden_act": "relu"},
    "qwen3": {**SMALL, "layer_types": ["full_attention", "linear_attention"]},
    "gemma2": {**GEMMA, "head_dim": 15},
    "gemma3_text": {**GEMMA, "sliding_window": None, "layer_types": ["sliding_attention", "full_attention"]},
}


def _spec(model_type: str, config: dict[str, Any]) -> ModelSpec:
    reader = ConfigReader({"model_type": model_type, **config}, "config.json")
    architecture = read_architecture(reader, model_type)
    sources = Sources("model.", "model.embed_tokens.weight", "lm_head.weight")
    graph = architecture.graph(model_type, sources, DType.BF16)
    return ModelSpec(model_type, model_type, graph, architecture.sizes.vocab, architecture.max_positions, DType.BF16)


def test_every_architecture_is_here() -> None:
    # gemma3 is the multimodal folder of gemma3_text: another place of the same config.
    assert set(CONFIGS) == set(REFUSED) == set(architectures()) - {"gemma3"}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_architectures_plan_reads_as_its_golden_file(model_type: str, golden: Callable[[str, str], None]) -> None:
    options = PlanOptions(page_size=4, max_sequences=1, prefill_chunk=16, speculate=0)
    plan = compile_plan(_spec(model_type, CONFIGS[model_type]), options=options)
    programs = {program.name: program for program in plan.programs}
    states = [f"state: {group}" for group in plan.target.groups]
    text = "\n".join([*states, show_program(programs["target.decode.1"])])
    golden(f"architectures/{model_type}.txt", text + "\n")


def test_what_architectures_refuse_reads_as_its_golden_file(golden: Callable[[str, str], None]) -> None:
    lines = []
    for model_type, config in REFUSED.items():
        with pytest.raises(CheckpointError) as refused:
            _spec(model_type, config)
        lines += [f"{model_type}: {refused.value}"]
    golden("architectures/refused.txt", "\n".join(lines) + "\n")
