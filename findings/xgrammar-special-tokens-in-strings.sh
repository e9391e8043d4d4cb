#!/usr/bin/env bash
# xgrammar: inside a JSON string its mask allows the model's special tokens.
#
# A token bitmask says which tokens may come next. xgrammar goes by the text of a token, and only the stop tokens are
# treated as having none. To it, <|im_start|> or <tool_call> is a row of letters like any other, and a JSON string may
# hold these letters; so the mask allows the special token there, although tokenizer.json marks it as special and the
# tokenizer was handed over whole. The matcher accepts it, and the grammar is content. But a decoder that skips special
# tokens leaves it out, so the user's text isn't the text that was checked: a string of minLength 1 comes out empty.
#
# An engine must take special tokens out of the mask itself, all but the end tokens at the grammar's end.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    xgrammar==0.2.9 transformers==5.24.0 tokenizers==0.23.3 torch==2.13.0 jsonschema==4.25.1

"$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

import jsonschema
import xgrammar
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

for package in ("xgrammar", "transformers", "tokenizers"):
    print(package, version(package))
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, eos_token="<|end|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
)
special = tokenizer.all_special_ids
information = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=len(tokenizer))
print("special by the tokenizer:", tokenizer.convert_ids_to_tokens(special))
print("stop tokens by xgrammar: ", tokenizer.convert_ids_to_tokens(information.stop_token_ids))
print("special by xgrammar:     ", tokenizer.convert_ids_to_tokens(information.special_token_ids))

schema = {"type": "string", "minLength": 1}
matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(information).compile_json_schema(json.dumps(schema)))
mask = xgrammar.allocate_token_bitmask(1, information.vocab_size)


def allowed_special():
    mask.fill_(-1)
    matcher.fill_next_token_bitmask(mask)
    return [tokenizer.convert_ids_to_tokens(i) for i in special if mask[0, i // 32].item() >> (i % 32) & 1]


quote, start = tokenizer.convert_tokens_to_ids(['"', "<|im_start|>"])
print("\nschema", json.dumps(schema))
print("special tokens allowed before the string:", allowed_special())
assert allowed_special() == []
assert matcher.accept_token(quote)
print("special tokens allowed inside it:        ", allowed_special())
assert allowed_special() == ["<|im_start|>", "<|im_end|>"]
assert matcher.accept_token(start) and matcher.accept_token(quote)
print("special tokens allowed behind it:        ", allowed_special())
assert allowed_special() == ["<|end|>"]

text = tokenizer.decode([quote, start, quote], skip_special_tokens=True)
print("the accepted tokens, decoded without special tokens:", text)
try:
    jsonschema.validate(json.loads(text), schema)
except jsonschema.ValidationError as error:
    print("jsonschema on that text:", error.message)
else:
    raise SystemExit("the decoded text is valid")
print("confirmed")
PYTHON
