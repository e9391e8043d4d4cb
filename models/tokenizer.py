"""A checkpoint's tokenizer: text to token ids and back.

Owns the reading of tokenizer.json (by the `tokenizers` library), tokenizer_config.json and special_tokens_map.json.
What always holds: ids are those that `transformers.AutoTokenizer` (5.x) gives, never truncated or padded; every id
from `encode` is below `vocab_size`; and a hostile file ends in a `CheckpointError`, also where the library panics.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from slotwise.core.errors import CheckpointError, OptionError, RequestError
from slotwise.models.chat_template import special_tokens
from slotwise.models.checkpoint import existing_folder
from slotwise.models.config import ConfigReader, parse_json_object, read_bounded, read_json_object

TOKENIZER_BYTES = 200 * 2**20
_MAX_ID = 2**24 - 1
_T = TypeVar("_T")


class Tokenizer:
    """Text to token ids and back; make one with `Tokenizer.load`. Two are equal iff their id -> token maps are."""

    def __init__(self, backend: Backend, source: str, named_tokens: Mapping[str, str]) -> None:
        self.backend = backend
        self.source = source
        self._tokens: dict[int, str] = {index: token for token, index in backend.get_vocab(True).items()}
        if not self._tokens:
            raise CheckpointError(f"{source}: expected a vocabulary, found none")
        highest = max(self._tokens)
        if highest > _MAX_ID:
            raise CheckpointError(f"{source}: expected token ids up to {_MAX_ID}, found {highest}")
        self.vocab_size: int = highest + 1
        """The highest id plus one, added tokens included."""
        self.bos_id: int | None = self._id_of(named_tokens.get("bos_token"))
        eos = self._id_of(named_tokens.get("eos_token"))
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        framing = _guarded(lambda: backend.encode("").ids, CheckpointError, f"{source}: cannot encode empty text")
        if any(index >= self.vocab_size for index in framing):
            raise CheckpointError(
                f"{source}: its post-processor adds ids {framing}, expected ids below {self.vocab_size}"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder. Raises `CheckpointError`."""
        root = existing_folder(folder)
        source = root / "tokenizer.json"
        if not source.exists():
            raise CheckpointError(
                f"{root}: expected a tokenizer.json, found none; convert another kind of tokenizer once: "
                " `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` with transformers"
            )
        data = read_bounded(source, TOKENIZER_BYTES)
        config, special_map = (
            _optional_json(root / "tokenizer_config.json"),
            _optional_json(root / "special_tokens_map.json"),
        )
        named = {**special_tokens(special_map), **special_tokens(config)}
        if _is_rebuilt(root, config, data):
            data = _rebuilt(data, ConfigReader(config, str(root / "tokenizer_config.json")), source)

        def build() -> Backend:
            backend = Backend.from_buffer(data)
            backend.no_truncation()
            backend.no_padding()
            added = backend.get_added_tokens_decoder()
            special = {token.content for token in added.values() if token.special}
            # A token that the config names counts as special, also where tokenizer.json forgot to say so.
            forgotten = [
                AddedToken(token, special=True, normalized=False)
                for token in dict.fromkeys(named.values())
                if token not in special and backend.token_to_id(token) is not None
            ]
            if forgotten:
                backend.add_special_tokens(forgotten)
            return backend

        backend = _guarded(build, CheckpointError, f"{source}: is not a tokenizer that can be read")
        return cls(backend, str(source), named)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the tokens that the checkpoint puts around a text if asked.

        Raises `RequestError` for what is not text (a lone surrogate included).
        """
        if not isinstance(text, str):
            raise RequestError(f"a prompt must be text, found a {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the prompt has half of a surrogate pair at position {error.start}, not Unicode text; remove it"
            ) from error
        return _guarded(
            lambda: list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids),
            RequestError,
            f"{self.source}: cannot encode this prompt",
        )

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; ids within the vocabulary that have no token stand for no text.

        Raises `OptionError` for an id that is no integer or lies outside [0, vocab_size).
        """
        checked = [self._checked(index) for index in ids]
        return _guarded(
            lambda: str(self.backend.decode(checked, skip_special_tokens=skip_special_tokens)),
            RequestError,
            f"{self.source}: cannot decode these ids",
        )

    def token(self, index: int) -> str:
        """Return the token of an id as the vocabulary spells it; raises `OptionError` for an id that has none."""
        found = self._tokens.get(self._checked(index))
        if found is None:
            raise OptionError(f"{self.source}: has no token with id {index}")
        return found

    def fingerprint(self) -> str:
        """Return the SHA-256 of the id -> token map; equal for two tokenizers iff `vocabulary_mismatch` finds none."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        listed = json.dumps(sorted(self._tokens.items()), ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(listed.encode("ascii")).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self._fingerprint)

    def __repr__(self) -> str:
        return f"Tokenizer({self.source!r}, vocab_size={self.vocab_size})"

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self.backend.token_to_id(token)

    def _checked(self, index: int) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            raise OptionError(f"a token id must be an integer, found {index!r:.80}") from None
        if isinstance(index, bool) or not 0 <= number < self.vocab_size:
            raise OptionError(f"token id {index} must lie in [0, {self.vocab_size}), the vocabulary of {self.source}")
        return number


def vocabulary_mismatch(a: Tokenizer, b: Tokenizer, below: int = _MAX_ID + 1) -> str | None:
    """Return a sentence that names the lowest ids under `below` at which two vocabularies differ; None without any."""
    mine, other = a._tokens, b._tokens
    differing = sorted(i for i in mine.keys() | other.keys() if i < below and mine.get(i) != other.get(i))
    if not differing:
        return None
    first, *more = differing
    here, there = (repr(tokens[first]) if first in tokens else "no token" for tokens in (mine, other))
    further = f"; {', '.join(map(str, more[:3]))}{' ...' if len(more) > 3 else ''} differ too" if more else ""
    return (
        f"token id {first} is {here} in {a.source} and {there} in {b.source} "
        f"({len(mine)} and {len(other)} tokens in all{further})"
    )


def _optional_json(path: Path) -> dict[str, object]:
    return read_json_object(path) if path.exists() else {}


def _is_rebuilt(root: Path, config: Mapping[str, object], data: bytes) -> bool:
    """Whether transformers 5 builds this tokenizer anew, taking vocabulary, merges and post-processor alone.

    It does for `LlamaTokenizer` (`models/llama/tokenization_llama.py`), except for byte-level files and for the model
    types whose tokenizers it knows to be declared wrongly (`models/auto/tokenization_auto.py`).
    """
    name = config.get("tokenizer_class")
    if not isinstance(name, str) or name.removesuffix("Fast") != "LlamaTokenizer" or b'"ByteLevel"' in data:
        return False
    return _optional_json(root / "config.json").get("model_type", "llama") == "llama"


def _rebuilt(data: bytes, config: ConfigReader, source: Path) -> bytes:
    """A tokenizer.json with the normalizer, pre-tokenizer and decoder that transformers 5 gives a `LlamaTokenizer`."""
    tokenizer = parse_json_object(data, source)
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise CheckpointError(f"{source}: expected a BPE model, as {config.source} declares a LlamaTokenizer")
    prefixed = config.boolean("add_prefix_space", default=True)
    scheme = "never" if not prefixed else "always" if config.boolean("legacy", default=False) else "first"
    tokenizer["model"] = {**model, "unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None}
    tokenizer["normalizer"] = None
    tokenizer["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": scheme,
        "split": False,
    }
    decoders: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefixed:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    tokenizer["decoder"] = {"type": "Sequence", "decoders": decoders}
    return json.dumps(tokenizer).encode("ascii")


def _guarded(action: Callable[[], _T], kind: type[CheckpointError] | type[RequestError], what: str) -> _T:
    """Run what calls into the library; its errors become `kind`, its Rust panics (no `Exception`) too."""
    try:
        return action()
    except Exception as error:
        raise kind(f"{what}: {str(error)[:300]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: the library panicked: {str(error)[:300]}") from error
