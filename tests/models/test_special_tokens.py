"""Whatever file names a token or an end, it is one: at the id, with the flags and under the name of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from slotwise.core.errors import CheckpointError
from slotwise.models.special_tokens import End, SpecialTokens
from slotwise.models.tokenizer import Tokenizer

STORIES = Path(__file__).parents[2] / "examples" / "models" / "stories"
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>", "eos_token": "<|end|>"}
"""A tokenizer_config.json whose tokens are all in tokenizer.json; the first free id is 2048."""
FREE = 2048
OFF = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def checkpoint(
    folder: Path,
    config: Mapping[str, Any] = PLAIN,
    files: Mapping[str, Any] | None = None,
    added: tuple[AddedToken, ...] = (),
) -> Path:
    """The bundled vocabulary in `folder`, `added` to its tokenizer.json, with other files as given."""
    folder.mkdir(exist_ok=True)
    backend = Backend.from_file(str(STORIES / "tokenizer.json"))
    backend.add_tokens(list(added))
    backend.save(str(folder / "tokenizer.json"))
    for name, content in {
        "config.json": {"model_type": "llama"},
        "tokenizer_config.json": config,
        **(files or {}),
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def record(folder: Path) -> SpecialTokens:
    return Tokenizer.load(folder).special_tokens


def theirs(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def assert_as_transformers(folder: Path, text: str = "a <hid> b<hid>c<|end|><two>") -> None:
    """Names, ids, flags as decoding shows them, and the ids of a text are those of transformers."""
    ours, other = Tokenizer.load(folder), theirs(folder)
    assert ours.special_tokens.variables == other.special_tokens_map
    for name, content in other.special_tokens_map.items():
        assert ours.special_tokens.id_of(name) == other.convert_tokens_to_ids(content), name
    ids = other.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == other.decode(ids, skip_special_tokens=skip)
    assert ours.vocab_size == len(other)


def at(index: int, content: str = "<hid>", **flags: bool) -> dict[str, Any]:
    """An `added_tokens_decoder` with one entry."""
    return {"added_tokens_decoder": {str(index): {"content": content, "special": True, **OFF, **flags}}}


HIDDEN = AddedToken("<hid>", special=True, normalized=False)
SHOWN = AddedToken("<hid>", special=False, normalized=False)
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[AddedToken, ...]]] = {
    "a name in tokenizer_config": ({"pad_token": "<hid>"}, {}, ()),
    "a name with flags": ({"pad_token": {"__type": "AddedToken", "content": "<hid>", "lstrip": True}}, {}, ()),
    "a model's own name": ({"image_token": "<hid>"}, {}, ()),
    "additional_special_tokens": ({"additional_special_tokens": ["<hid>", "<two>"]}, {}, ()),
    "added_tokens.json before tokenizer.json": (
        {},
        {"special_tokens_map.json": {"extra_special_tokens": ["<hid>"]}, "added_tokens.json": {"<hid>": 5}},
        (SHOWN,),
    ),
    "extra_special_tokens, a list": ({"extra_special_tokens": ["<hid>", "<two>"]}, {}, ()),
    "extra_special_tokens, a mapping": ({"extra_special_tokens": {"tool_token": "<hid>", "two": "<two>"}}, {}, ()),
    "a mapping that overrules a name": ({"extra_special_tokens": {"eos_token": "<hid>"}}, {}, ()),
    "names as transformers 5 saves them": (
        {"model_specific_special_tokens": {"tool_token": "<hid>", "eot_token": "<two>", "pad_token": "<|end|>"}},
        {},
        (),
    ),
    "saved names beside the list of ids": (
        {"model_specific_special_tokens": {"tool_token": "<hid>"}, **at(FREE, "<two>")},
        {},
        (),
    ),
    "saved names, each under its own key too": (
        {"model_specific_special_tokens": {"a_token": "<hid>"}, "b_token": "<two>", "a_token": "<hid>"},
        {},
        (),
    ),
    "saved names and a map": (
        {"model_specific_special_tokens": {"tool_token": "<hid>"}},
        {"special_tokens_map.json": {"tool_token": "<two>", "pad_token": "<two>"}},
        (),
    ),
    "one token under two names and in a list": (
        {"bos_token": "<hid>", "extra_special_tokens": ["<hid>"]},
        {"special_tokens_map.json": {"eos_token": {"content": "<hid>", **OFF, "rstrip": True}}},
        (),
    ),
    "an object and a text with the same flags": (
        {"bos_token": {"__type": "AddedToken", "content": "<hid>", **OFF}, "extra_special_tokens": ["<hid>"]},
        {"special_tokens_map.json": {"eos_token": {"content": "<hid>", **OFF, "rstrip": True}}},
        (),
    ),
    "a mapping beside a list": (
        {"extra_special_tokens": {"tool_token": "<hid>"}, "additional_special_tokens": ["<two>"]},
        {},
        (),
    ),
    "added_tokens_decoder": (at(FREE), {}, ()),
    "added_tokens_decoder, an id in use": (at(5), {}, ()),
    "added_tokens_decoder, another token's id": (at(2), {}, ()),
    "added_tokens_decoder, an id beyond": (at(5000), {}, ()),
    "added_tokens_decoder, id -1": (at(-1), {}, ()),
    "added_tokens_decoder, not special": (at(FREE, special=False), {}, ()),
    "special in the config alone": (at(FREE), {}, (SHOWN,)),
    "special in tokenizer.json alone": (at(FREE, special=False), {}, (HIDDEN,)),
    "strips on the left": (at(FREE, lstrip=True), {}, (HIDDEN,)),
    "strips on the right": (at(FREE, rstrip=True), {}, (HIDDEN,)),
    "a single word": (at(FREE, single_word=True), {}, (HIDDEN,)),
    "normalized": (at(FREE, normalized=True), {}, (HIDDEN,)),
    "another content at the id of tokenizer.json": (at(FREE, "<two>"), {}, (HIDDEN,)),
    "named, not special in tokenizer.json": ({"pad_token": "<hid>"}, {}, (SHOWN,)),
    "listed, not special in tokenizer.json": ({"extra_special_tokens": ["<hid>"]}, {}, (SHOWN,)),
    "special_tokens_map": ({}, {"special_tokens_map.json": {"pad_token": "<hid>"}}, ()),
    "special_tokens_map overrules": ({}, {"special_tokens_map.json": {"eos_token": "<hid>"}}, ()),
    "special_tokens_map with flags": (
        {},
        {"special_tokens_map.json": {"eos_token": {"content": "<hid>", "rstrip": True, "normalized": False}}},
        (),
    ),
    "special_tokens_map denies": ({}, {"special_tokens_map.json": {"eos_token": None}}, ()),
    "special_tokens_map, a list": ({}, {"special_tokens_map.json": {"additional_special_tokens": ["<hid>"]}}, ()),
    "special_tokens_map, a mapping": ({}, {"special_tokens_map.json": {"extra_special_tokens": {"x": "<hid>"}}}, ()),
    "special_tokens_map, a model's own name": ({}, {"special_tokens_map.json": {"x_token": "<hid>"}}, ()),
    "added_tokens.json": ({}, {"added_tokens.json": {"<two>": 2049, "<hid>": FREE}}, ()),
    "added_tokens.json, named": ({"pad_token": "<hid>"}, {"added_tokens.json": {"<hid>": FREE}}, ()),
    "added_tokens.json, an id in use": ({}, {"added_tokens.json": {"<hid>": 5}}, ()),
    "null": ({"eos_token": None}, {}, ()),
    "special tokens are split": ({"pad_token": "<hid>", "split_special_tokens": True}, {}, ()),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_token_named_anywhere_is_the_token_of_transformers(tmp_path: Path, place: str) -> None:
    config, files, added = PLACES[place]
    assert_as_transformers(checkpoint(tmp_path, {**PLAIN, **config}, files, added))


def test_every_end_counts_with_the_files_that_name_it(tmp_path: Path) -> None:
    files = {
        "generation_config.json": {"eos_token_id": [7, 9, 7]},
        "config.json": {"model_type": "llama", "eos_token_id": 9, "text_config": {"eos_token_id": [11, -1]}},
    }
    ends = record(checkpoint(tmp_path, {**PLAIN, "eot_token": "<turn>"}, files)).ends
    named = Tokenizer.load(tmp_path)
    assert [(end.id, end.sources) for end in ends] == [
        (7, ("generation_config.json",)),
        (9, ("generation_config.json", "config.json")),
        (11, ("config.json",)),
        (2, ("tokenizer_config.json",)),
        (FREE, ("tokenizer_config.json",)),
    ]
    assert ends[3] == End(2, "<|end|>", ("tokenizer_config.json",))
    assert [end.content for end in ends] == [named.token(end.id) for end in ends]
    assert named.eos_ids == (2,)


def test_an_end_may_have_no_token_and_minus_one_is_none(tmp_path: Path) -> None:
    files = {"generation_config.json": {"eos_token_id": -1}, "config.json": {"eos_token_id": [90_000]}}
    ends = record(checkpoint(tmp_path, {}, files)).ends
    assert ends == (End(90_000, None, ("config.json",)),)


@pytest.mark.parametrize("value", [-2, "2", [2, -3], True, 1e3, [None, "x"], {"id": 2}, 2**24, [[2]]])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_what_is_no_end_is_refused_by_its_file(tmp_path: Path, name: str, value: Any) -> None:
    folder = checkpoint(tmp_path, PLAIN, {name: {"eos_token_id": value}})
    with pytest.raises(CheckpointError, match=rf"{name}.*'eos_token_id' must be a token id"):
        Tokenizer.load(folder)


def test_several_ends_of_one_name_are_all_ends(tmp_path: Path) -> None:
    tokens = record(checkpoint(tmp_path, {**PLAIN, "eos_token": ["<|end|>", {"content": "<turn>"}]}))
    assert tokens.variables["eos_token"] == "<|end|>"
    assert [end.id for end in tokens.ends] == [2, FREE]
    assert tokens.special["<turn>"] == FREE


@pytest.mark.parametrize(
    "place", ["special in the config alone", "special in tokenizer.json alone", "a name with flags"]
)
def test_what_decoding_leaves_out_is_what_the_record_calls_special(tmp_path: Path, place: str) -> None:
    config, files, added = PLACES[place]
    tokenizer = Tokenizer.load(checkpoint(tmp_path, {**PLAIN, **config}, files, added))
    assert tokenizer.special_tokens.special["<hid>"] == FREE
    assert tokenizer.decode([FREE]) == ""


def test_a_named_token_is_special_even_where_its_own_flag_denies_it(tmp_path: Path) -> None:
    tokens = record(checkpoint(tmp_path, {**PLAIN, "pad_token": {"content": "<hid>", "special": False}}))
    assert tokens.special["<hid>"] == tokens.id_of("pad_token") == FREE
