"""A checkpoint's special tokens and ends of text: the one record that tokenizer, template and engine read.

Owns `SpecialTokens` and how what the files declare becomes tokens of the `tokenizers` library. What always holds: a
token that any file names has an id, the one that transformers 5.23 gives it; a named token is special; what a class
alone names is a token only where the vocabulary has it; and every id in `ends` says which files name it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import AddedToken, Tokenizer

from slotwise.core.errors import CheckpointError
from slotwise.models.declared_tokens import Declaration, DeclaredTokens, TokenEntry
from slotwise.models.tokenizer_classes import CLASS_TOKENS, GENERIC

TOKENIZER_FILE = "tokenizer.json"
END_NAMES = ("eos_token", "eot_token")
"""Names that say that a text, or a turn, ends with their token."""


@dataclass(frozen=True)
class SpecialToken:
    """A token that something names: `name` is such as `eos_token`, None for one of a list; `source` is the file."""

    name: str | None
    content: str
    id: int
    source: str


@dataclass(frozen=True)
class End:
    """An id that ends a text, the token's text (None where the tokenizer has none), and the files that say so."""

    id: int
    content: str | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class SpecialTokens:
    """What is special in a checkpoint's vocabulary.

    `named` are the tokens with a name, `listed` those that a file lists without one, both with the file that decided;
    a listed one need not be special.
    `special` maps the text of every token that decoding leaves out to its id. `ends` are the ids at which generating
    stops: what generation_config.json, config.json and the tokenizer call an end, all of them. Some may lie beyond the
    model's vocabulary, which then never gives them. `notes` are sentences on where files disagree.
    """

    named: Mapping[str, SpecialToken]
    listed: tuple[SpecialToken, ...]
    special: Mapping[str, int]
    ends: tuple[End, ...]
    notes: tuple[str, ...] = ()

    @property
    def variables(self) -> dict[str, str]:
        """Name -> text, for chat templates: as `special_tokens_map` of transformers' tokenizers gives them."""
        return {name: token.content for name, token in self.named.items()}

    def id_of(self, name: str) -> int | None:
        """The id of a named token, None where nothing names one."""
        return self.named[name].id if name in self.named else None


def settle(declared: DeclaredTokens, class_name: str, backend: Tokenizer) -> SpecialTokens:
    """Make tokens of what is declared, in the order of transformers, and return the record.

    `backend` is tokenizer.json as read, padding included; it is changed. Raises `CheckpointError` for a token that
    would take an id that the vocabulary uses.
    """
    defaults = list(_defaults(declared, class_name, backend))
    names = [*declared.named, *(each for each in declared.late if each.name is not None), *defaults]
    named = {each.entry.content for each in names}
    _add(backend, list(_missing(declared, defaults, named, backend, rebuilt=class_name != GENERIC)))

    def placed(each: Declaration) -> SpecialToken:
        content = each.entry.content
        index = backend.token_to_id(content)
        if index is None:
            raise CheckpointError(f"{each.source}: the tokenizer does not take {content[:80]!r} as a token")
        return SpecialToken(each.name, content, index, each.source)

    by_name: dict[str, SpecialToken] = {}
    for each in names:
        if each.name is not None:
            by_name.setdefault(each.name, placed(each))
    unnamed = (*declared.unnamed, *(each for each in declared.late if each.name is None))
    listed = {
        each.entry.content: placed(each)
        for each in (*unnamed, *(each for _, each in declared.listed))
        if each.entry.content not in named
    }
    added = backend.get_added_tokens_decoder()
    special = {token.content: index for index, token in added.items() if token.special}
    ends = [
        *declared.end_ids,
        *((placed(each).id, each.source) for each in names if each.name in END_NAMES),
    ]
    return SpecialTokens(
        MappingProxyType(by_name),
        tuple(listed.values()),
        MappingProxyType(special),
        tuple(
            End(
                index,
                added[index].content if index in added else backend.id_to_token(index),
                tuple(dict.fromkeys(source for other, source in ends if other == index)),
            )
            for index in dict.fromkeys(index for index, _ in ends)
        ),
        tuple(
            f"{each.source} gives {each.entry.content!r} the id {index}, it has {placed(each).id}"
            for index, each in declared.listed
            if placed(each).id != index
        ),
    )


def _defaults(declared: DeclaredTokens, class_name: str, backend: Tokenizer) -> Iterator[Declaration]:
    """What is named where no file of names speaks: the padding of tokenizer.json, then the tokenizer's class."""
    spoken = declared.denied | {each.name for each in (*declared.named, *declared.late)}
    padding = backend.padding
    if padding is not None and padding["pad_token"] and "pad_token" not in spoken:
        yield Declaration("pad_token", TokenEntry(padding["pad_token"], is_text=True), TOKENIZER_FILE)
    for name, content in CLASS_TOKENS.get(class_name, {}).items():
        if name not in spoken and backend.token_to_id(content) is not None:
            yield Declaration(name, TokenEntry(content, is_text=True), f"class {class_name}")


def _missing(
    declared: DeclaredTokens, defaults: Iterable[Declaration], named: set[str], backend: Tokenizer, *, rebuilt: bool
) -> Iterator[AddedToken]:
    """The tokens to hand to the library, in order: new ones, and those whose flags a file changes.

    `rebuilt`: transformers takes no flags from tokenizer.json.
    """
    ids = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    lists_tokens = "added_tokens_decoder" in declared.tokenizer_config.fields
    last: list[Declaration] = []
    for index, each in declared.listed:
        known = present.get(each.entry.content)
        # Of added_tokens.json transformers takes what tokenizer.json has no token for; the rest comes last here.
        if not lists_tokens and (index in ids.values() or index <= ids.get(each.entry.content, -1)):
            last.append(each)
            # It is added before tokenizer.json's own token, and what was special once stays so.
            if known is not None and not known.special and each.entry.special and index not in ids.values():
                present[each.entry.content] = token = _special(known)
                yield token
            continue
        # transformers lets its library read tokenizer.json, and what that has held special it holds special for good.
        for_good = known is not None and known.special and not rebuilt
        special = each.entry.special or each.entry.content in named or for_good
        present[each.entry.content] = token = each.entry.added(special=special)
        yield token
    for content in sorted(named & present.keys()):
        if not present[content].special:
            present[content] = token = _special(present[content])
            yield token
    settled = set(present)
    seen: set[TokenEntry] = set()
    for each in (*declared.named, *defaults, *declared.unnamed):
        # Of several that declare one new token the last decides its flags; saying the same again is no declaration.
        if each.entry.content not in settled and each.entry not in seen:
            seen.add(each.entry)
            special = each.entry.special or each.entry.content in named
            present[each.entry.content] = token = each.entry.added(special=special)
            yield token
    for each in (*declared.late, *last):
        if each.entry.content not in present:
            special = each.entry.special or each.entry.content in named
            present[each.entry.content] = token = each.entry.added(special=special)
            yield token


def _special(token: AddedToken) -> AddedToken:
    """`token` as a special one, with its other flags."""
    return AddedToken(
        token.content,
        special=True,
        normalized=token.normalized,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )


def _add(backend: Tokenizer, tokens: list[AddedToken]) -> None:
    new = [token.content for token in tokens if backend.token_to_id(token.content) is None]
    used = set(backend.get_vocab(True).values()) if new else set()
    backend.add_tokens(tokens)
    for content in new:
        if (index := backend.token_to_id(content)) in used:
            raise CheckpointError(
                f"the token {content[:80]!r} is not in the vocabulary, and would take id {index}, which is another's: "
                "the vocabulary has gaps; give the token a free id in tokenizer.json"
            )
