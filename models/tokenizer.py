"""A checkpoint's tokenizer: text to token ids and back.

Owns the reading of tokenizer.json (by the `tokenizers` library). What always holds: ids are those that tokenizer.json
gives, with the tokens that other files name (`special_tokens.py`), never truncated or padded; they are those of
`transformers.AutoTokenizer` (5.23) but for what docs/checkpoints.md lists; every id from `encode` is below
`vocab_size`; and a hostile file ends in a `CheckpointError`, also where the library panics.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TypeVar

from tokenizers import Tokenizer as Backend

from slotwise.core.errors import CheckpointError, OptionError, RequestError
from slotwise.models.config import is_there, read_bounded
from slotwise.models.declared_tokens import MAX_ID, DeclaredTokens
from slotwise.models.folder import existing_folder
from slotwise.models.special_tokens import SpecialTokens, settle
from slotwise.models.tokenizer_classes import GENERIC, LLAMA, rebuilt_as_llama, tokenizer_class

TOKENIZER_BYTES = 200 * 2**20
_T = TypeVar("_T")


class Tokenizer:
    """Text to token ids and back; make one with `Tokenizer.load`. Two are equal iff their id -> token maps are."""

    def __init__(
        self,
        backend: Backend,
        source: str,
        special_tokens: SpecialTokens,
        rows: int | None = None,
        class_name: str = GENERIC,
    ) -> None:
        self.backend = backend
        self.source = source
        self.class_name = class_name
        """The class of transformers that is meant, a key of `tokenizer_classes.CLASS_TOKENS` or `GENERIC`."""
        self.special_tokens = special_tokens
        """Every special token and every end that the checkpoint's files name; template and engine read it too."""
        self._special_ids = frozenset(special_tokens.special.values())
        self._tokens: dict[int, str] = {index: token for token, index in backend.get_vocab(True).items()}
        if not self._tokens:
            raise CheckpointError(f"{source}: expected a vocabulary, found none")
        highest = max(self._tokens)
        if highest > MAX_ID:
            raise CheckpointError(f"{source}: expected token ids up to {MAX_ID}, found {highest}")
        self.vocab_size: int = highest + 1
        """The highest id plus one, added tokens included."""
        self.rows: int = max(self.vocab_size, rows or 0)
        """What ids lie below: the model may have more rows than the tokenizer has tokens, and give their ids."""
        self.bos_id: int | None = special_tokens.id_of("bos_token")
        eos = special_tokens.id_of("eos_token")
        self.eos_ids: tuple[int, ...] = () if eos is None else (eos,)
        """What the tokenizer itself names; `special_tokens.ends` has what any file does."""
        framing = _guarded(lambda: backend.encode("").ids, CheckpointError, f"{source}: cannot encode empty text")
        if any(index >= self.vocab_size for index in framing):
            raise CheckpointError(
                f"{source}: its post-processor adds ids {framing}, expected ids below {self.vocab_size}"
            )

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, rows: int | None = None) -> Tokenizer:
        """Read the tokenizer of a checkpoint folder, whose model has `rows` ids. Raises `CheckpointError`."""
        root = existing_folder(folder)
        source = root / "tokenizer.json"
        if not is_there(source):
            raise CheckpointError(
                f"{root}: expected a tokenizer.json, found none; convert another kind of tokenizer once: "
                " `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` with transformers"
            )
        data = read_bounded(source, TOKENIZER_BYTES)
        declared = DeclaredTokens.load(root)
        config, model = declared.tokenizer_config, declared.model_config
        declaring = next((reader for reader in (config, model) if reader.has("tokenizer_class")), None)
        class_name = tokenizer_class(
            None if declaring is None else declaring.string("tokenizer_class"),
            model.string("model_type", default=""),
            data,
        )
        if class_name == LLAMA:
            data = rebuilt_as_llama(data, config, source)

        def build() -> tuple[Backend, SpecialTokens]:
            backend = Backend.from_buffer(data)
            special = settle(declared, class_name, backend)
            backend.no_truncation()
            backend.no_padding()
            backend.encode_special_tokens = config.boolean("split_special_tokens", default=False)
            return backend, special

        backend, special = _guarded(build, CheckpointError, f"{source}: is not a tokenizer that can be read")
        return cls(backend, str(source), special, rows, class_name)

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
        """Return the text of `ids`, any that the model can give; those that have no token stand for no text.

        Raises `OptionError` for an id that is no integer or lies outside [0, rows).
        """
        if not isinstance(ids, Iterable):
            raise OptionError(f"decode takes a list of token ids, found {ids!r:.80}")
        checked = [self._checked(index) for index in ids]
        if skip_special_tokens:
            # The library misses a token whose text the normalizer changes, and forgets none that was special once.
            checked = [index for index in checked if index not in self._special_ids]
        return _guarded(
            lambda: str(self.backend.decode(checked, skip_special_tokens=False)),
            RequestError,
            f"{self.source}: cannot decode these ids",
        )

    def token(self, index: int) -> str:
        """Return the token of an id as the vocabulary spells it, empty for an id that has none.

        Raises `OptionError` as `decode` does.
        """
        return self._tokens.get(self._checked(index), "")

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

    def _checked(self, index: int) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            raise OptionError(f"a token id must be an integer, found {index!r:.80}") from None
        if isinstance(index, bool) or not 0 <= number < self.rows:
            raise OptionError(f"token id {index} must lie in [0, {self.rows}), the vocabulary of {self.source}")
        return number


def vocabulary_mismatch(a: Tokenizer, b: Tokenizer, below: int = MAX_ID + 1) -> str | None:
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


def _guarded(action: Callable[[], _T], kind: type[CheckpointError] | type[RequestError], what: str) -> _T:
    """Run what calls into the library; its errors become `kind`, its Rust panics (no `Exception`) too."""
    try:
        return action()
    except CheckpointError:
        raise
    except Exception as error:
        raise kind(f"{what}: {str(error)[:300]}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what}: the library panicked: {str(error)[:300]}") from error
