"""A target grown for the speculation benchmark computes what the small one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sidebyside.grown import LIKE_135M, Growth, Sizes, grow
from sidebyside.guard import EXACT_LIMIT, logits_error

import slotwise

STORIES = Path(__file__).parents[2] / "examples" / "models" / "stories"
SMALL_GROWTH = Growth(hidden=768, layers=8, kv_heads=4, ffn=544)
TOKENS = [1, 409, 414, 261, 378, 77, 1023, 5]


def logits(folder):
    llm = slotwise.LLM(folder, backend="reference", dtype="float32", capacity=32, max_sequences=1)
    return llm.logits(TOKENS).numpy()


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    return grow(STORIES, SMALL_GROWTH, tmp_path_factory.mktemp("grown") / "stories")


@pytest.fixture(scope="module")
def small_logits():
    return logits(STORIES)


def test_a_grown_model_gives_the_logits_of_the_small_one(grown, small_logits):
    assert logits_error(logits(grown), small_logits) <= EXACT_LIMIT


@pytest.mark.parametrize("name", ["input_layernorm", "mlp.down_proj", "self_attn.o_proj"])
def test_a_grown_model_that_is_not_exact_is_seen(grown, small_logits, tmp_path, name):
    for file in grown.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    changed = f"model.layers.6.{name}.weight" if "proj" in name else f"model.layers.0.{name}.weight"
    tensors[changed] = tensors[changed] * 2 if "norm" in name else torch.full_like(tensors[changed], 0.01)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert logits_error(logits(tmp_path), small_logits) > 1000 * EXACT_LIMIT


def test_the_benchmark_grows_the_bundled_target_to_the_cost_of_135_million_parameters():
    config = json.loads((STORIES / "config.json").read_text())
    sizes = Sizes.of(config).grown(LIKE_135M)
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    layer = sizes.hidden * (2 * queries + 2 * keys + 3 * sizes.ffn)
    assert sizes.layers * layer + config["vocab_size"] * sizes.hidden == pytest.approx(134.5e6, rel=0.005)
    assert sizes.hidden % sizes.heads == 0  # transformers asks for it


@pytest.mark.parametrize(
    ("growth", "said"),
    [
        (Growth(hidden=384, layers=8, kv_heads=4, ffn=544), "power of four"),
        (Growth(hidden=768, layers=2, kv_heads=4, ffn=544), "layers would shrink"),
    ],
)
def test_growth_that_would_not_be_exact_is_refused(growth, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        grow(STORIES, growth, tmp_path / "grown")
    assert not list(tmp_path.iterdir())
