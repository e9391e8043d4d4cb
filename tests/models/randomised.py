"""Small random checkpoints, and their logits by transformers and by us.

They are odd on purpose (heads of 24, three query heads per key head, a vocabulary of 101, windows shorter than the
sequence) and their weights are large enough for logits of order one, so that a wrong detail shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from slotwise.models.load import LoadedModel
from slotwise.proving.interpret import interpret, load_parameters

TOLERANCE = 1e-4
LENGTH = 40

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 60,
    "intermediate_size": 74,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = {**SMALL, "num_hidden_layers": 4, "query_pre_attn_scalar": 17, "sliding_window": 8}


@dataclass(frozen=True)
class Model:
    """A config class of transformers with its arguments, and what else a test wants of the checkpoint."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=lambda: SMALL)

    def build(self) -> Any:
        config = getattr(transformers, self.config)(**{**self.small, **self.options})
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        randomise(model)
        return model


def randomise(model: Any) -> None:
    """Weights that keep activations near unit variance; biases and norm weights that cannot be overlooked."""
    generator = torch.Generator().manual_seed(1)
    unit_norm = "gemma" not in model.config.model_type
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(unit_norm + 0.3 * values)
            elif parameter.dim() == 1:
                parameter.copy_(0.5 * values)
            else:
                parameter.copy_(values * 2 / parameter.shape[1] ** 0.5)


def tokens(length: int = LENGTH, vocab: int = 101) -> torch.Tensor:
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(2))


def our_logits(loaded: LoadedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """Token ids [T] -> logits [T, V] by the loaded model's graph."""
    graph = loaded.spec.graph
    parameters = load_parameters(graph, loaded.weights, {"M": 2 * loaded.spec.max_positions})

    def run(token_ids: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(token_ids), dtype=torch.int32)
        inputs = {"token_ids": token_ids.int(), "positions": rows, "logit_rows": rows}
        with torch.inference_mode():
            return interpret(graph, {**parameters, **inputs})[0]

    return run


def their_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(token_ids.unsqueeze(0)).logits[0].float()
    return logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.3, "the logits must be large enough for the tolerance to mean something"
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= TOLERANCE


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change config.json in place."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    file = folder / "model.safetensors"
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file)
