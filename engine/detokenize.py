"""From token ids to text, one token at a time.

Owns which bytes a token adds to a text and the UTF-8 state of each stream. What always holds: text handed out is whole
characters and final; a push costs the same however long the text or an ill-formed run has become. (`DecodeStream` of
`tokenizers` decodes a window that an ill-formed run grows without bound, and raises where the byte-fallback decoder
takes complete characters back; so bytes are tracked here.)
"""

from __future__ import annotations

import codecs
import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from tokenizers import Tokenizer

from slotwise.core.errors import CheckpointError

# What a decoder does to a token can depend on there being text before it; any ordinary text will do for that.
_ANCHOR: Final = "a"
_CONTEXTUAL_DECODERS: Final = frozenset({"BPEDecoder", "CTC"})
_PER_BYTE: Final = "slotwise.replace_each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for (GPT-2's table, inverted)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL: Final = _byte_level_alphabet()


class TokenPieces:
    """The bytes that each token of a tokenizer adds to a text; made once, shared by all sequences.

    Knows byte-level tokens and `<0xE6>`-style byte tokens by their bytes, all others by what the tokenizer's own
    decoder makes of them. Special tokens add nothing (unless `skip_special_tokens` is off), nor do ids that the
    tokenizer lacks: a model's vocabulary may be padded beyond it.

    Raises `CheckpointError` for a decoder whose text for a token depends on the tokens that follow it.
    """

    def __init__(self, backend: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._backend = backend
        self._skips = skip_special_tokens
        special = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        self.silent: Mapping[str, int] = MappingProxyType(special if skip_special_tokens else {})
        """Text -> id of the tokens whose text is left out."""
        self._skipped = frozenset(self.silent.values())
        kinds = _decoder_kinds(backend)
        contextual = kinds & _CONTEXTUAL_DECODERS
        if contextual or ("ByteLevel" in kinds and len(kinds) > 1):
            raise CheckpointError(
                f"tokenizer decoder {' + '.join(sorted(kinds))}: expected ByteLevel alone, or decoders that treat each "
                "token by itself (Replace, ByteFallback, Fuse, Strip, Metaspace, WordPiece): the text of others cannot "
                "be streamed; use a tokenizer.json with one of these decoders"
            )
        self._is_byte_level = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._cache: dict[int, bytes] = {}

    @property
    def utf8_errors(self) -> str:
        """The codec error handler for ill-formed bytes: U+FFFD for each byte or each run, as the decoder has it."""
        return _PER_BYTE if self._has_byte_tokens else "replace"

    @functools.cached_property
    def with_special(self) -> TokenPieces:
        """The same, with special tokens shown."""
        return TokenPieces(self._backend, skip_special_tokens=False) if self._skips else self

    def shown(self, token_id: int) -> str:
        """Return what a person should see of a token by itself: its text, or a special token's name."""
        special = next((text for text, number in self.silent.items() if number == token_id), None)
        return special or self.continuing(token_id).decode("utf-8", self.utf8_errors)

    def continuing(self, token_id: int) -> bytes:
        """Return the bytes that a token adds after other text, a leading space of its own included."""
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = self._piece(token_id, first=False)
        return piece

    def opening(self, token_id: int) -> bytes:
        """Return the bytes of a token that begins a text: many tokenizers take a leading space away there."""
        return self._piece(token_id, first=True)

    def is_silent(self, token_id: int) -> bool:
        """Whether a token adds nothing wherever it stands: special, or unknown to the tokenizer."""
        return token_id in self._skipped or self._backend.id_to_token(token_id) is None

    def _piece(self, token_id: int, *, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return b""
        if self._is_byte_level:
            # A token with a character outside the alphabet (an added token with a space, say) stands for itself.
            known = all(character in _BYTE_LEVEL for character in token)
            return bytes(_BYTE_LEVEL[character] for character in token) if known else token.encode()
        if self._has_byte_tokens and (byte := _byte_of(token)) is not None and byte >= 0x80:
            return bytes([byte])
        decoder = self._backend.decoder
        if decoder is None:
            return (token if first else " " + token).encode()
        text: str = decoder.decode([token]) if first else decoder.decode([_ANCHOR, token])[len(_ANCHOR) :]
        return text.encode()


class Detokenizer:
    """The text of one sequence, as it grows.

    With `prompt_ids` the text is that of a continuation: what decoding prompt and output together adds to decoding the
    prompt alone. So the first word keeps its leading space, where the decoder would take it from the start of a text,
    and a character of which the prompt holds the first bytes is given whole. A prompt without text (empty, or special
    tokens alone) starts a text.

    The text of a sequence is all its pushes joined. Bytes of a character that the sequence's end leaves unfinished are
    never given; bytes that cannot become a character give U+FFFD as soon as that is certain. This is the tokenizer's
    own `decode` of all ids, but for two things: that decode shows the unfinished end as U+FFFD, and a byte-fallback
    decoder replaces a whole run of byte tokens when one of them is ill-formed, complete characters included.
    """

    def __init__(self, pieces: TokenPieces, prompt_ids: Sequence[int] = ()) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.utf8_errors)
        self._begun = False
        # The state of UTF-8 depends on the last three bytes at most.
        tail = b""
        for token_id in reversed(prompt_ids):
            if len(tail) > 3:
                break
            self._begun = self._begun or not pieces.is_silent(token_id)
            tail = pieces.continuing(token_id) + tail
        self._decode(tail)

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is complete with it, which may be empty."""
        if self._begun:
            return self._decode(self._pieces.continuing(token_id))
        self._begun = not self._pieces.is_silent(token_id)
        return self._decode(self._pieces.opening(token_id))

    def _decode(self, piece: bytes) -> str:
        text = self._utf8.decode(piece)
        pending = self._utf8.getstate()[0]
        # Python waits for the third byte of a surrogate, which UTF-8 does not have.
        if len(pending) == 2 and pending[0] == 0xED and pending[1] >= 0xA0:
            text += self._utf8.decode(b"", True)
        return text


def _decoder_kinds(backend: Tokenizer) -> frozenset[str]:
    if backend.decoder is None:
        return frozenset()
    state = json.loads(backend.decoder.__getstate__())
    return frozenset(part["type"] for part in state.get("decoders", [state]))


def _byte_of(token: str) -> int | None:
    """Return the byte of a token such as `<0xE6>`, None for any other."""
    if len(token) != 6 or not (token.startswith("<0x") and token.endswith(">")):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None
