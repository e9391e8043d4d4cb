#!/usr/bin/env bash
# transformers: crop on the cache of a linear-attention model takes back the attention and the convolutions, but leaves
# the rejected tokens in the recurrent state.
#
# crop(-3) takes the last three tokens out of a cache; speculative decoding does so with rejected drafts. For a model
# such as Qwen3-Next it raises at first, and the error names the cure: call activate_past_recording before. With
# recording on, crop succeeds: the cache's length is right again, and so are keys, values and the convolutions' states,
# to the bit. The recurrent states, where most of the past is kept, still hold the three tokens. The next logits are
# wrong, and nothing says so but the property is_croppable, which one has to ask.
#
# An engine must keep a copy of the recurrent state from before the drafts, or steps to replay; it can't crop.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0

HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from copy import deepcopy
from importlib.metadata import version

import torch
import transformers
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

for package in ("transformers", "torch"):
    print(package, version(package))
transformers.logging.set_verbosity_error()
torch.manual_seed(0)
torch.set_grad_enabled(False)
model = Qwen3NextForCausalLM(
    Qwen3NextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        mlp_only_layers=[0, 1, 2, 3], num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )
).eval()
for parameter in model.parameters():
    if parameter.dim() > 1:
        parameter.normal_(0, 0.3)
prompt, drafts, following = torch.randint(64, (1, 8)), torch.randint(64, (1, 3)), torch.randint(64, (1, 2))
exact = model(torch.cat([prompt, following], dim=1)).logits[:, 8:]

cache = model(prompt, use_cache=True).cache
before = deepcopy(cache)
try:
    deepcopy(cache).crop(-3)
except RuntimeError as error:
    print("\ncrop at first:", error)
else:
    raise SystemExit("crop worked without recording")

cache.activate_past_recording()
model(drafts, cache=cache, use_cache=True)
assert cache.get_seq_length() == 11
cache.crop(-3)
print("crop with recording on: length", cache.get_seq_length(), "and is_croppable", cache.is_croppable)
assert cache.get_seq_length() == 8 and not cache.is_croppable

print("\nlargest difference to the cache before the drafts")
for number, (kind, old, new) in enumerate(zip(model.config.layer_types, before.layers, cache.layers)):
    if kind == "full_attention":
        keys = (new.keys - old.keys).abs().max().item()
        print(f"  layer {number} {kind:17} keys {keys:g}")
        assert keys == 0
    else:
        convolution = (new.conv_states[0] - old.conv_states[0]).abs().max().item()
        recurrent = (new.recurrent_states[0] - old.recurrent_states[0]).abs().max().item()
        print(f"  layer {number} {kind:17} convolution {convolution:g}, recurrent {recurrent:.2f}")
        assert convolution == 0 and recurrent > 0.1

print("\nlargest difference of the next two tokens' logits to those without a cache")
wrong = (model(following, cache=cache, use_cache=True).logits - exact).abs().max().item()
right = (model(following, cache=before, use_cache=True).logits - exact).abs().max().item()
print(f"  cache after crop {wrong:.2g}; cache from before the drafts {right:.2g}; largest logit {exact.max():.2g}")
assert wrong > 0.1 and right < 1e-4
print("confirmed")
PYTHON
