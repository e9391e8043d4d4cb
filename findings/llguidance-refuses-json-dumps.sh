#!/usr/bin/env bash
# llguidance: its JSON grammar refuses valid JSON that Python's own json.dumps writes.
#
# Two rules differ from JSON's. In a string, the escape \u is allowed for control characters alone, so "\u00e9", which
# json.dumps writes for an e with an accent, is refused, and so is \/. In a number, an exponent is allowed as long as
# the schema has no bounds: {"type": "number"} takes 1e-07, and with "minimum": 0 beside it the same text is refused.
# A bound thus takes away a way of writing, not only values.
#
# For an engine this matters twice. A model that was trained on ASCII-only JSON is steered away from the text that it
# would have written, with nothing said. And "valid under the schema" can't be checked by running text through the
# matcher: a draft, a cached answer or a test case that any validator accepts may be refused.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 jsonschema==4.25.1

"$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version

import jsonschema
from llguidance import LLMatcher, LLTokenizer

for package in ("llguidance", "jsonschema"):
    print(package, version(package))
tokenizer = LLTokenizer("byte")
string, number, bounded = {"type": "string"}, {"type": "number"}, {"type": "number", "minimum": 0}


def accepts(schema, text):
    """Whether the matcher takes the whole text, token by token, and may stop there."""
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    tokens = tokenizer.tokenize_str(text)
    return matcher.validate_tokens(tokens) == len(tokens) and matcher.consume_tokens(tokens) and matcher.is_accepting()


print("\nAll of these texts are JSON, and jsonschema finds their values valid. llguidance says:")
cases = [
    (string, json.dumps("\u00e9", ensure_ascii=False), True),
    (string, json.dumps("\u00e9"), False),
    (string, json.dumps("\U0001f600"), False),
    (string, json.dumps("\x01"), True),
    (string, '"\\/"', False),
    (number, json.dumps(1e-7), True),
    (bounded, json.dumps(1e-7), False),
    (bounded, json.dumps(1e22), False),
    (bounded, "0.0000001", True),
]
for schema, text, expected in cases:
    jsonschema.validate(json.loads(text), schema)
    accepted = accepts(schema, text)
    print(f"  {'accepted' if accepted else 'REFUSED '}  {text:18}  {json.dumps(schema)}")
    assert accepted == expected, (schema, text)
print("confirmed")
PYTHON
