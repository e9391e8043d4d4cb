#!/usr/bin/env bash
# tokenizers: with byte fallback, one bad byte makes DecodeStream take back text that it already gave out.
#
# A Llama-style tokenizer spells characters that it has no token for as byte tokens, <0x00> to <0xFF>. Its decoder joins
# neighbouring byte tokens and decodes the run as a whole; if the run isn't valid UTF-8, every byte of it becomes one
# replacement character. So a byte that comes late changes how earlier bytes read: a newline, sent to the user a step
# ago, turns into a replacement character. DecodeStream sees that the text it has given out is no longer a beginning of
# the whole text, raises, and raises again at every later step, though the tokens after the bad byte are fine.
#
# An engine that streams a sampled answer meets this with any model of this kind: a newline is a byte token there, and
# nothing stops a model from sampling a lone byte behind it. It must not let one bad byte end the request.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3.11}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3

"$folder/venv/bin/python" - <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream
from tokenizers.models import BPE

print("tokenizers", tokenizers.__version__)
A, NEWLINE, BAD = 256, 0x0A, 0xFF
vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": A, "<unk>": 257}
tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])


def stream(ids):
    decoding, pieces = DecodeStream(skip_special_tokens=False), []
    for token in ids:
        try:
            pieces.append(decoding.step(tokenizer, token))
        except Exception as error:
            pieces.append(f"raises: {error}")
    return pieces


apart, together = [A, NEWLINE, A, BAD, A, A], [A, NEWLINE, BAD, A, A]
print("\nA letter stands between the newline and the bad byte: every step gives text.")
for token, piece in zip(apart, stream(apart)):
    print(f"  {token:3}  {piece!r}")
assert stream(apart) == ["a", "\n", "a", None, "\ufffda", "a"]

print("The bad byte follows the newline: the newline has been given out, and then every letter raises.")
pieces = stream(together)
for token, piece in zip(together, pieces):
    print(f"  {token:3}  {piece!r}")
print("  the same tokens in one call:", repr(tokenizer.decode(together)))
assert pieces[:3] == ["a", "\n", None]
assert all(piece.startswith("raises: Invalid prefix") for piece in pieces[3:])
assert tokenizer.decode(together) == "a\ufffd\ufffdaa"
print("confirmed")
PYTHON
