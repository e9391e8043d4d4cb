"""However files combine, names, ids and flags are those of transformers; what is no token is refused by its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from slotwise.core.errors import CheckpointError, SlotwiseError
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.declared_tokens import ADDED_TOKENS, STANDARD_NAMES, TOKEN_MAP, TOKENIZER_CONFIG
from slotwise.models.tokenizer import Tokenizer

from .test_special_tokens import PLAIN, assert_as_transformers, checkpoint

CONTENTS = st.sampled_from(["<one>", "<two>", "<three>", "<|end|>", "<|pad|>"])
NAMES = st.sampled_from([*STANDARD_NAMES, "x_token"])
FLAGS = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "normalized", "single_word")})
LISTS = st.lists(CONTENTS, min_size=1, max_size=3, unique=True)
TEXT = "a <one> b<two>c <three>d<|end|> <|pad|>e"


def entry(draw: Any, content: str, **more: bool) -> dict[str, Any]:
    return {"content": content, **draw(FLAGS), **more}


@st.composite
def folders(draw: Any) -> tuple[dict[str, Any], dict[str, Any], tuple[AddedToken, ...]]:
    """What files say; left out is what transformers leaves unread or refuses (docs/checkpoints.md)."""
    config: dict[str, Any] = {**PLAIN, **draw(st.dictionaries(NAMES, CONTENTS | st.none(), max_size=3))}
    config = {name: value for name, value in config.items() if value is not None or name in STANDARD_NAMES}
    lists = draw(st.sampled_from(["none", "list", "additional", "mapping", "mapping and additional"]))
    if "mapping" in lists:
        names = st.sampled_from(["eos_token", "y_token", "z"])
        config["extra_special_tokens"] = draw(st.dictionaries(names, CONTENTS, min_size=1))
    if lists == "list":
        config["extra_special_tokens"] = draw(LISTS)
    if "additional" in lists:
        config["additional_special_tokens"] = draw(LISTS)
    added = draw(st.lists(CONTENTS, max_size=2, unique=True))
    in_file = tuple(AddedToken(special=draw(st.booleans()), **entry(draw, content)) for content in added)
    files: dict[str, Any] = {}
    if draw(st.booleans()):
        ids = draw(st.lists(st.sampled_from([-1, 2, 2047, 2048, 2049, 5000]), min_size=1, max_size=3, unique=True))
        config["added_tokens_decoder"] = {
            str(index): entry(draw, draw(CONTENTS), special=draw(st.booleans())) for index in ids
        }
        # Named in the config and special there or nowhere: transformers leaves others as tokenizer.json has them.
        known = {each["content"] for each in config["added_tokens_decoder"].values()}
        in_file = tuple(token for token in in_file if token.special or token.content in known)
    else:
        values = CONTENTS | st.none() | st.builds(lambda content, flags: {"content": content, **flags}, CONTENTS, FLAGS)
        names = st.sampled_from([*STANDARD_NAMES, *(["x_token"] if "x_token" not in config else [])])
        files["special_tokens_map.json"] = {
            name: value
            for name, value in draw(st.dictionaries(names, values, max_size=2)).items()
            if name in STANDARD_NAMES or isinstance(value, str)
        }
        if lists in ("none", "list"):
            key = "extra_special_tokens" if lists == "list" else draw(
                st.sampled_from(["extra_special_tokens", "additional_special_tokens"])
            )  # fmt: skip
            files["special_tokens_map.json"][key] = draw(LISTS)
        additional = {"additional_special_tokens"} & {*config, *files["special_tokens_map.json"]}
        # That a list under the old name makes tokens of added_tokens.json special is ours alone.
        if not additional and draw(st.booleans()):
            taken = {2048 + place for place in range(len(in_file))}
            free = st.sampled_from(sorted({5, 2048, 2049, 2050, 2051} - taken))
            # Of two tokens with one id transformers forgets the first, and not its flags.
            places = draw(st.lists(free, max_size=2, unique=True))
            contents = draw(st.lists(CONTENTS, min_size=len(places), max_size=len(places), unique=True))
            files["added_tokens.json"] = dict(zip(contents, places, strict=True))
    return config, files, in_file


@settings(max_examples=60, deadline=None)
@given(drawn=folders())
def test_any_files_together_mean_what_they_mean_to_transformers(
    tmp_path_factory: pytest.TempPathFactory, drawn: tuple[dict[str, Any], dict[str, Any], tuple[AddedToken, ...]]
) -> None:
    assert_as_transformers(checkpoint(tmp_path_factory.mktemp("t"), *drawn), TEXT)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "'eos_token' must be the text of a token"),
        ("tokenizer_config.json", {"eos_token": True}, "'eos_token' must be the text of a token"),
        ("tokenizer_config.json", {"eos_token": {"text": "x"}}, "'eos_token' must be the text of a token"),
        ("tokenizer_config.json", {"eos_token": ["x", 1]}, "'eos_token' must be the text of a token"),
        ("tokenizer_config.json", {"eos_token": {"content": "x", "lstrip": 1}}, "'lstrip' must be true or false"),
        ("tokenizer_config.json", {"extra_special_tokens": 3}, "'extra_special_tokens' must be the text"),
        ("tokenizer_config.json", {"extra_special_tokens": {"x": 3}}, "'x' must be the text of a token"),
        ("tokenizer_config.json", {"model_specific_special_tokens": {"x": 3}}, "'x' must be the text of a token"),
        ("tokenizer_config.json", {"model_specific_special_tokens": ["x"]}, "'model_specific_special_tokens' must be"),
        ("tokenizer_config.json", {"additional_special_tokens": [[]]}, "'additional_special_tokens' must be"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "'added_tokens_decoder' must be an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "must map a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "must map a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "a"}}, "must map a token id"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 1}}}, "must map a token id"),
        ("tokenizer_config.json", {"tokenizer_class": ["x"]}, "'tokenizer_class' must be a string"),
        ("tokenizer_config.json", {"split_special_tokens": "no"}, "'split_special_tokens' must be true or false"),
        ("tokenizer_config.json", {"pad_token": "\ud800"}, "tokenizer.json"),
        ("special_tokens_map.json", {"pad_token": 5}, "'pad_token' must be the text of a token"),
        ("special_tokens_map.json", {"extra_special_tokens": [0]}, "'extra_special_tokens' must be"),
        ("added_tokens.json", {"<x>": "5"}, '"<x>" must be a token id'),
        ("added_tokens.json", {"<x>": True}, '"<x>" must be a token id'),
        ("config.json", {"model_type": 5}, "'model_type' must be a string"),
    ],
    ids=str,
)
def test_what_is_no_token_is_refused_by_its_file(tmp_path: Path, name: str, content: Any, words: str) -> None:
    folder = checkpoint(tmp_path, PLAIN, {name: content})
    with pytest.raises(CheckpointError, match=words.replace(".", r"\.")) as refused:
        Tokenizer.load(folder)
    assert name in str(refused.value) or words == "tokenizer.json"


FILES = [TOKENIZER_CONFIG, TOKEN_MAP, ADDED_TOKENS, "config.json", "generation_config.json"]


@pytest.mark.parametrize("name", [*FILES, "tokenizer.json", "chat_template.jinja", "chat_template.json"])
def test_a_file_that_points_to_nothing_is_not_taken_for_none(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "never downloaded")
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: cannot be read \(No such file"):
        ChatTemplate.load(folder, Tokenizer.load(folder).special_tokens.variables)


LISTING = ["extra_special_tokens", "additional_special_tokens", "added_tokens_decoder"]
KEYS = st.sampled_from([*STANDARD_NAMES, "x_token", *LISTING, "eos_token_id"])
INNER_KEYS = st.sampled_from(["content", "special", "5", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.just("<|end|>"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(INNER_KEYS, inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(FILES), content=st.dictionaries(KEYS, JSON, max_size=3))
def test_whatever_a_file_says_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: dict[str, Any]
) -> None:
    folder = checkpoint(tmp_path_factory.mktemp("t"), PLAIN, {name: content})
    try:
        tokenizer = Tokenizer.load(folder)
    except SlotwiseError:
        return
    ids = tokenizer.encode("a<|end|>")
    assert all(index < tokenizer.vocab_size for index in ids)
    for token in tokenizer.special_tokens.named.values():
        assert tokenizer.backend.token_to_id(token.content) == token.id
