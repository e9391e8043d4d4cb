#!/usr/bin/env bash
# transformers: Mamba, FalconMamba and Jamba forget their state at the start of a chunk, if a prompt comes in two chunks
# with a cache between them. Mamba2, with the same calls, is right.
#
# A model with a cache should give the same logits however its input is cut. These three do for a prompt followed by
# single tokens, which is how generate() works by itself. Give them a second chunk of two tokens or more, and the scan
# starts from a state of zeros, although the cache that was passed holds the state of the first chunk. The shapes are
# right, and the logits are off by about as much as they are large. All that is logged, for all four, is that the plain
# PyTorch implementation is used for want of a GPU package, and that it is correct. It is the one that was tried here.
#
# Chunked prefill, a prompt behind a shared prefix and the check of several drafts at once all take this way. Whoever
# tests an engine for these models against transformers must feed it the whole text, or single tokens.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
import transformers
from transformers import FalconMambaConfig, FalconMambaForCausalLM, JambaConfig, JambaForCausalLM
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

for package in ("transformers", "torch"):
    print(package, version(package))
transformers.logging.set_verbosity_error()
torch.set_grad_enabled(False)

common = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
experts = {"num_experts": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "intermediate_size": 64}
heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2, "chunk_size": 8}
forgetful = [
    (MambaForCausalLM, MambaConfig(state_size=8, **common)),
    (FalconMambaForCausalLM, FalconMambaConfig(state_size=8, **common)),
    (JambaForCausalLM, JambaConfig(**common, **attention, **experts)),
]
sound = [(Mamba2ForCausalLM, Mamba2Config(state_size=8, **common, **heads))]


def error(model, ids, sizes):
    """The largest difference between the logits of `ids` cut into chunks of these sizes, and of all at once."""
    whole, parts, cache = model(ids).logits, [], None
    for chunk in ids.split(sizes, dim=1):
        output = model(chunk, cache=cache, use_cache=True)
        cache = output.cache
        parts.append(output.logits)
    return (torch.cat(parts, dim=1) - whole).abs().max().item()


print("\nlargest difference of logits from those of 12 tokens in one call")
for kind, config in forgetful + sound:
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.3)
    ids = torch.randint(64, (1, 12))
    single, chunks = error(model, ids, [6, 1, 1, 1, 1, 1, 1]), error(model, ids, [6, 6])
    print(f"  {kind.__name__:23} 6, then single tokens: {single:.0e}   6, then 6: {chunks:.0e}")
    assert single < 1e-3
    assert chunks < 1e-3 if (kind, config) in sound else chunks > 0.1
print("confirmed")
PYTHON
