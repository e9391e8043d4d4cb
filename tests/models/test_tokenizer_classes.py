"""Which class transformers builds and what it names is known here; where ours stays with tokenizer.json is listed."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Backend

from slotwise.engine.detokenize import TokenPieces
from slotwise.models.declared_tokens import STANDARD_NAMES
from slotwise.models.special_tokens import End
from slotwise.models.tokenizer import Tokenizer
from slotwise.models.tokenizer_classes import CLASS_TOKENS

from .test_special_tokens import FREE, OFF, PLAIN, checkpoint, record, theirs

TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text")
DECLARED = (None, "PreTrainedTokenizerFast", "LlamaTokenizerFast", "Qwen2Tokenizer", "GemmaTokenizerFast",
            "GPT2Tokenizer", "CohereTokenizerFast", "TokenizersBackend", "Nonsense")  # fmt: skip


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_a_class_names_what_its_signature_says(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    signature = inspect.signature(getattr(transformers, name).__init__).parameters
    defaults = {key: value.default for key, value in signature.items() if key.endswith("_token")}
    flags = {key for key, default in defaults.items() if isinstance(default, bool) or default is None}
    assert {key: str(default) for key, default in defaults.items() if key not in flags} == CLASS_TOKENS[name]


@pytest.mark.parametrize("declared", DECLARED)
@pytest.mark.parametrize("model_type", TYPES)
def test_the_class_is_the_one_that_transformers_builds(tmp_path: Path, model_type: str, declared: str | None) -> None:
    config = {} if declared is None else {"tokenizer_class": declared}
    folder = checkpoint(tmp_path, config, {"config.json": {"model_type": model_type}})
    assert Tokenizer.load(folder).class_name == type(theirs(folder)).__name__


def test_a_class_alone_names_an_end_that_the_vocabulary_has(tmp_path: Path) -> None:
    end = AddedToken("<|endoftext|>", special=True, normalized=False)
    config = {"tokenizer_class": "GPT2Tokenizer", "pad_token": None}
    folder = checkpoint(tmp_path, config, added=(end,))
    assert record(folder).ends == (End(FREE, "<|endoftext|>", ("class GPT2Tokenizer",)),)
    assert record(folder).variables == theirs(folder).special_tokens_map
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert record(folder).ends == ()
    assert record(folder).variables == theirs(folder).special_tokens_map


# The known differences, in the order of docs/checkpoints.md.


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_ours_stays_with_the_file_where_transformers_rebuilds(tmp_path: Path, model_type: str) -> None:
    named = dict.fromkeys(STANDARD_NAMES)
    folder = checkpoint(tmp_path, named, {"config.json": {"model_type": model_type}})
    text = "cafe\u0301"  # Qwen2Tokenizer composes it, tokenizer.json does not
    in_file = Backend.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    assert Tokenizer.load(folder).encode(text, add_special_tokens=False) == in_file
    assert theirs(folder).encode(text, add_special_tokens=False) != in_file


def test_an_added_token_of_the_file_stays_where_transformers_rebuilds(tmp_path: Path) -> None:
    named = dict.fromkeys(STANDARD_NAMES)
    table = {"added_tokens_decoder": {str(FREE): {"content": "<b>", "special": True, **OFF}}}
    token = AddedToken("<a>", special=True, normalized=False)
    folder = checkpoint(tmp_path, {**named, **table}, {"config.json": {"model_type": "qwen3"}}, (token,))
    ours, other = Tokenizer.load(folder), theirs(folder)
    assert [ours.backend.token_to_id(name) for name in ("<a>", "<b>")] == [FREE, FREE + 1]
    assert [other.convert_tokens_to_ids(name) for name in ("<a>", "<b>")] == [None, FREE]


def test_what_only_a_class_names_is_not_added_to_a_vocabulary_that_lacks_it(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {"tokenizer_class": "GPT2Tokenizer"})
    assert (record(folder).variables, record(folder).ends, Tokenizer.load(folder).vocab_size) == ({}, (), FREE)
    assert theirs(folder).eos_token_id == FREE


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {}}, {"special_tokens_map.json": {"pad_token": "<new>"}}),
        ({"added_tokens_decoder": {}}, {"added_tokens.json": {"<new>": FREE}}),
        ({"extra_special_tokens": ["<|end|>"], "additional_special_tokens": ["<new>"]}, {}),
    ],
    ids=["the map beside a table", "added_tokens.json beside a table", "two lists"],
)
def test_a_place_that_transformers_does_not_read_names_tokens_too(
    tmp_path: Path, config: dict[str, Any], files: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path, {**PLAIN, **config}, files)
    assert Tokenizer.load(folder).encode("<new>", add_special_tokens=False) == [FREE]
    assert FREE not in theirs(folder).encode("<new>", add_special_tokens=False)


def test_a_map_beside_a_table_fills_gaps_and_overrules_nothing(tmp_path: Path) -> None:
    config = {**PLAIN, "added_tokens_decoder": {}, "unk_token": None}
    files = {"special_tokens_map.json": {"eos_token": "<x>", "unk_token": "<y>", "sep_token": "<|end|>"}}
    variables = record(checkpoint(tmp_path, config, files)).variables
    assert variables == {"bos_token": "<|begin|>", "eos_token": "<|end|>", "sep_token": "<|end|>"}


@pytest.mark.parametrize("value", [{"content": "<new>"}, ["<new>", "<|end|>"]], ids=["object", "list"])
def test_forms_that_transformers_refuses_name_tokens(tmp_path: Path, value: Any) -> None:
    folder = checkpoint(tmp_path, {**PLAIN, "eos_token": value})
    assert record(folder).variables["eos_token"] == "<new>"
    with pytest.raises(TypeError):
        theirs(folder)


def test_saved_names_of_a_model_count_beside_another_name_of_its_own(tmp_path: Path) -> None:
    config = {**PLAIN, "model_specific_special_tokens": {"eot_token": "<new>"}, "image_token": "<|end|>"}
    folder = checkpoint(tmp_path, config)
    assert record(folder).variables["eot_token"] == "<new>"
    assert "eot_token" not in theirs(folder).special_tokens_map


def test_a_special_token_that_the_normalizer_changes_is_left_out_of_text(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, PLAIN)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.normalizer = normalizers.Prepend("x")
    backend.add_special_tokens([AddedToken("<hid>", normalized=True)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, pieces = Tokenizer.load(folder), TokenPieces(Backend.from_file(str(folder / "tokenizer.json")))
    assert tokenizer.decode([FREE]) == "" == pieces.opening(FREE).decode()
    assert theirs(folder).decode([FREE], skip_special_tokens=True) == "x<hid>"
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": FREE}))
    assert [(end.id, end.content) for end in record(folder).ends] == [(FREE, "<hid>"), (2, "<|end|>")]


@pytest.mark.parametrize(
    ("name", "shown"), [("Qwen2Tokenizer", True), ("GPT2Tokenizer", True), ("PreTrainedTokenizerFast", False)]
)
def test_the_config_takes_the_flag_special_away_where_transformers_builds_from_the_class(
    tmp_path: Path, name: str, shown: bool
) -> None:
    token = AddedToken("<hid>", special=True, normalized=False)
    decoder = {str(FREE): {**OFF, "content": "<hid>", "special": False}}
    folder = checkpoint(tmp_path, {**PLAIN, "tokenizer_class": name, "added_tokens_decoder": decoder}, added=(token,))
    tokenizer = Tokenizer.load(folder)
    text = theirs(folder).decode([FREE], skip_special_tokens=True)
    assert tokenizer.decode([FREE]) == TokenPieces(tokenizer.backend).opening(FREE).decode() == text
    assert text == ("<hid>" if shown else "")
    assert ("<hid>" in tokenizer.special_tokens.special) is not shown


def test_a_named_token_is_special_whatever_the_files_flag(tmp_path: Path) -> None:
    token = AddedToken("<hid>", special=False, normalized=False)
    folder = checkpoint(tmp_path, {**PLAIN, "pad_token": "<hid>", "added_tokens_decoder": {}}, added=(token,))
    assert Tokenizer.load(folder).decode([FREE]) == ""
    assert theirs(folder).decode([FREE], skip_special_tokens=True) == "<hid>"


def test_spaces_are_not_cleaned_up(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, {**PLAIN, "clean_up_tokenization_spaces": True})
    model = {"type": "WordLevel", "vocab": {"a": 0, ".": 1, "?": 2}, "unk_token": "?"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    (folder / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": true}')
    assert Tokenizer.load(folder).decode([0, 1]) == "a ."
    assert theirs(folder).decode([0, 1]) == "a."
