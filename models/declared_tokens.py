"""What a checkpoint's files say about special tokens and ends of text, merged once.

Owns the reading of tokenizer_config.json, special_tokens_map.json, added_tokens.json and of the end ids of config.json
and generation_config.json; docs/checkpoints.md has the precedence, which is that of transformers 5.23
(`tokenization_utils_base.py`, `_from_pretrained`). What always holds: a token is text with flags, whatever form a file
gives it in; every entry knows its file; and what is neither a token nor absent is a `CheckpointError`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken

from slotwise.core.errors import CheckpointError
from slotwise.models.config import ConfigReader, is_there, read_json_object, shown
from slotwise.models.folder import existing_folder

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKEN_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
STANDARD_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The names that every tokenizer of transformers has, in the order in which it adds their tokens."""
MAX_ID = 2**24 - 1
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclass(frozen=True)
class TokenEntry:
    """A token as a file declares it; the flags are those of the `tokenizers` library."""

    content: str
    special: bool = True
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    is_text: bool = False
    """Given as its text alone: transformers tells that from an object with the same flags."""

    def added(self, *, special: bool) -> AddedToken:
        """The library's form of it."""
        return AddedToken(
            self.content,
            special=special,
            normalized=self.normalized,
            lstrip=self.lstrip,
            rstrip=self.rstrip,
            single_word=self.single_word,
        )


@dataclass(frozen=True)
class Declaration:
    """That a file names a token: `name` is such as `eos_token`, None for a token of a list."""

    name: str | None
    entry: TokenEntry
    source: str


@dataclass(frozen=True)
class DeclaredTokens:
    """All that the files beside tokenizer.json say.

    `listed` has tokens with the id that a file writes, in order of ids; `named`, `unnamed` and then `late`, which
    transformers does not read, follow in the order in which tokens are added. `denied` are the names that a file sets
    to null. `end_ids` are pairs of an id and the file that calls it an end.
    """

    tokenizer_config: ConfigReader
    model_config: ConfigReader
    listed: tuple[tuple[int, Declaration], ...]
    named: tuple[Declaration, ...]
    unnamed: tuple[Declaration, ...]
    late: tuple[Declaration, ...]
    denied: frozenset[str]
    end_ids: tuple[tuple[int, str], ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> DeclaredTokens:
        """Read a checkpoint folder; every file may be absent. Raises `CheckpointError`."""
        root = existing_folder(folder)
        config, token_map, added, model, generation = (
            _reader(root / name)
            for name in (TOKENIZER_CONFIG, TOKEN_MAP, ADDED_TOKENS, "config.json", "generation_config.json")
        )
        lists_tokens = "added_tokens_decoder" in config.fields
        first, second = (_Names(config, TOKENIZER_CONFIG), _Names(token_map, TOKEN_MAP))
        if lists_tokens:
            # Beside an `added_tokens_decoder` transformers leaves the map unread: it can fill gaps, not overrule.
            by_name = {**second.loose, **second.firm, **first.loose, **first.firm}
        else:
            by_name = {**first.loose, **second.loose, **first.firm, **second.firm}
        found = [entry for entries in by_name.values() for entry in entries]
        late = [entry for entry in found if lists_tokens and entry.source == TOKEN_MAP]
        named = sorted((entry for entry in found if entry not in late), key=_place)
        overruled = [each for entries in {**first.loose, **second.loose}.values() for each in entries]
        special = {each.entry.content for each in (*found, *overruled, *first.unnamed, *second.unnamed)}
        by_id = _by_id(config) if lists_tokens else {}
        legacy = _legacy(added, special)
        return cls(
            config,
            model,
            tuple(sorted((by_id if lists_tokens else legacy).items())),
            tuple(named),
            (*first.unnamed, *(() if lists_tokens else second.unnamed)),
            (*late, *first.hidden, *second.unnamed, *second.hidden, *(legacy.values() if lists_tokens else ())),
            frozenset(name for name, entries in by_name.items() if not entries),
            tuple(_end_ids(generation, model)),
        )

    @property
    def variables(self) -> dict[str, str]:
        """The named tokens as a template sees them, where there is no vocabulary to look them up in."""
        found: dict[str, str] = {}
        for declaration in (*self.named, *self.late):
            if declaration.name is not None:
                found.setdefault(declaration.name, declaration.entry.content)
        return found


class _Names:
    """What one file of names says; a null is a name without declarations.

    `firm` are names that the other file's `loose` ones do not overrule: a model's own, as text, and those of a mapping.
    `hidden` are lists that transformers overlooks.
    """

    def __init__(self, reader: ConfigReader, source: str) -> None:
        self.loose: dict[str, tuple[Declaration, ...]] = {}
        self.firm: dict[str, tuple[Declaration, ...]] = {}
        for key, value in reader.fields.items():
            is_own = key.endswith("_token") and isinstance(value, str | Mapping)
            if key in STANDARD_NAMES or is_own:
                is_firm = key not in STANDARD_NAMES and isinstance(value, str) and source == TOKENIZER_CONFIG
                (self.firm if is_firm else self.loose)[key] = tuple(_declarations(key, value, reader, source))
        extra, additional = (reader.fields.get(f"{kind}_special_tokens") for kind in ("extra", "additional"))
        if isinstance(extra, Mapping) and not _is_token(extra):
            for key, value in extra.items():
                self.firm[key] = tuple(_declarations(key, value, reader, source))
            extra = None
        for key, value in _saved_names(reader).items() if source == TOKENIZER_CONFIG else ():
            # What stands under its own key is newer: transformers writes both.
            self.firm.setdefault(key, tuple(_declarations(key, value, reader, source)))
        self.unnamed = tuple(_declarations(None, extra, reader, source, "extra_special_tokens"))
        self.hidden = tuple(_declarations(None, additional, reader, source, "additional_special_tokens"))
        if not self.unnamed:
            self.unnamed, self.hidden = self.hidden, ()


def _saved_names(reader: ConfigReader) -> Mapping[str, object]:
    """The names that are a model's own, as `save_pretrained` of transformers 5 keeps them."""
    table = reader.optional_mapping("model_specific_special_tokens")
    return {} if table is None else table.fields


def _place(declaration: Declaration) -> int:
    """Standard names first, in their order; others stay as they come."""
    name = declaration.name
    return STANDARD_NAMES.index(name) if name in STANDARD_NAMES else len(STANDARD_NAMES)


def _declarations(
    name: str | None, value: object, reader: ConfigReader, source: str, key: str | None = None
) -> Iterator[Declaration]:
    """The tokens of one value: text, an object with `content`, null, or a list of those."""
    for each in value if isinstance(value, list) else [value]:
        if each is None or each == "":
            continue
        if isinstance(each, str):
            yield Declaration(name, TokenEntry(each, is_text=True), source)
        elif isinstance(each, Mapping) and _is_token(each):
            yield Declaration(name, _entry(each, f"{reader.source}: '{name or key}'", special=True), source)
        else:
            raise CheckpointError(
                f"{reader.source}: '{name or key}' must be the text of a token, an object with its 'content', "
                f"or a list of them, found {shown(each)}; correct the file or fetch it again"
            )


def _is_token(value: object) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("content"), str)


def _entry(value: Mapping[str, object], where: str, *, special: bool) -> TokenEntry:
    """A token given as an object; `special` is what it is where the object does not say."""
    flags: dict[str, bool] = {}
    for flag in _FLAGS:
        if (given := value.get(flag)) is not None:
            if not isinstance(given, bool):
                raise CheckpointError(f"{where}: '{flag}' must be true or false, found {shown(given)}")
            flags[flag] = given
    flags.setdefault("special", special)
    flags.setdefault("normalized", not flags["special"])
    return TokenEntry(str(value["content"]), **flags)


def _by_id(config: ConfigReader) -> dict[int, Declaration]:
    """The `added_tokens_decoder` of tokenizer_config.json."""
    found = {}
    table = config.optional_mapping("added_tokens_decoder")
    for key, value in {} if table is None else table.fields.items():
        where = f"{config.source}: 'added_tokens_decoder'[{shown(key)}]"
        if not re.fullmatch(r"-?[0-9]{1,10}", key) or not isinstance(value, Mapping) or not _is_token(value):
            raise CheckpointError(
                f"{where} must map a token id to an object with the token's 'content', found {shown(value)}"
            )
        found[int(key)] = Declaration(None, _entry(value, where, special=False), TOKENIZER_CONFIG)
    return found


def _legacy(added: ConfigReader, special: Iterable[str]) -> dict[int, Declaration]:
    """added_tokens.json: text to id; a token is special where another file names it."""
    found = {}
    for content, index in added.fields.items():
        if isinstance(index, bool) or not isinstance(index, int):
            raise CheckpointError(f"{added.source}: {shown(content)} must be a token id, found {shown(index)}")
        named = content in special
        found[index] = Declaration(None, TokenEntry(content, special=named, normalized=not named), ADDED_TOKENS)
    return found


def _end_ids(generation: ConfigReader, model: ConfigReader) -> Iterator[tuple[int, str]]:
    """The ids that generation_config.json and config.json, of its text model too, call ends; -1 says that none is."""
    text = model.fields.get("text_config")
    readers = [(generation, "generation_config.json"), (model, "config.json")]
    if isinstance(text, Mapping):
        readers.append((ConfigReader(text, f"{model.source}, in 'text_config'"), "config.json"))
    for reader, source in readers:
        value = reader.fields.get("eos_token_id")
        for index in value if isinstance(value, list) else [value]:
            if index is None or (index == -1 and isinstance(index, int)):
                continue
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= MAX_ID:
                raise CheckpointError(
                    f"{reader.source}: 'eos_token_id' must be a token id from 0 to {MAX_ID} or a list of them, "
                    f"found {shown(value)}; correct the file or fetch it again"
                )
            yield index, source


def _reader(path: Path) -> ConfigReader:
    return ConfigReader(read_json_object(path) if is_there(path) else {}, str(path))
