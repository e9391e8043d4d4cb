"""A tokenizer gives the ids that transformers gives, for any text, and refuses what is not a tokenizer, text or id."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, OptionError, RequestError, SlotwiseError
from slotwise.models.tokenizer import Tokenizer, vocabulary_mismatch

ROOT = Path(__file__).parents[2]
BUNDLED = [ROOT / "examples" / "models" / name for name in ("stories", "stories-draft")]
SHARED = ROOT.parent / "shared" / "models"
NAMES = ("babyllama", "babyllama-draft", "qwen3-tokenizer", "stories260k", "tinystories-656k")
TEXTS = (
    "", " ", "  ", "\n", "a", " a", "  a b", "Once upon a time, there was", "Once upon  a time\n héllo 🙂", "\n\nx\n",
    "<s>hello</s> there", "<s> hello", "a</s>", " <|begin|>hi<|end|> ok", "<|start_story|> x <|end_story|>y",
    "▁x ▁ y", "日本語 テスト", "e\u0301 é ﬁ", "\t\ttab\r\n", "it's 12345 we'LL", "\u0000\u200b x", "<unk> x",
    "<|im_start|>user\nhi<|im_end|>\n", "👨‍👩‍👧 family", "trailing  ", "a" * 300,
)  # fmt: skip


@lru_cache
def pair(folder: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder, and transformers'; a folder that is not there skips the test."""
    if not folder.exists():
        pytest.skip(f"the checkpoint {folder.name} is not beside this checkout")
    transformers = pytest.importorskip("transformers")
    return Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)


FOLDERS = [*BUNDLED, *(SHARED / name for name in NAMES)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_ids_and_text_are_those_of_transformers(folder: Path) -> None:
    ours, theirs = pair(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip), text
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_ids == (theirs.eos_token_id,)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40) | st.text("aA e1.\n▁<|>s/🙂", max_size=40))
def test_any_text_has_the_ids_of_transformers(folder: Path, text: str) -> None:
    ours, theirs = pair(folder)
    ids = ours.encode(text)
    assert ids == theirs.encode(text)
    assert all(0 <= index < ours.vocab_size for index in ids)


@pytest.mark.parametrize("prefixed", [None, True, False])
@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("model_type", ["llama", "mistral", None])
def test_a_llama_tokenizer_is_rebuilt_as_transformers_rebuilds_it(
    tmp_path: Path, model_type: str | None, legacy: bool | None, prefixed: bool | None
) -> None:
    transformers = pytest.importorskip("transformers")
    options = {"legacy": legacy, "add_prefix_space": prefixed}
    settled = {key: value for key, value in options.items() if value is not None}
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "<0x0A>"])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": index, "content": token, **special} for token, index in list(vocab.items())[:3]],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [["▁", "a"]], "unk_token": "<unk>", "byte_fallback": True},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", **settled})
    )
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, theirs = Tokenizer.load(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", " ", "a", " a", "  a b", "ab</s> a", "\nq", "<s>a"):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@given(text=st.text(max_size=60))
def test_a_byte_level_tokenizer_gives_back_any_text(text: str) -> None:
    tokenizer, _ = pair(BUNDLED[0])
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_the_bundled_pair_shares_a_vocabulary() -> None:
    target, draft = (Tokenizer.load(folder) for folder in BUNDLED)
    assert vocabulary_mismatch(target, draft) is None
    assert target == draft
    assert target.fingerprint() == draft.fingerprint()
    assert hash(target) == hash(draft)
    assert (target.vocab_size, target.bos_id, target.eos_ids) == (2048, 1, (2,))
    assert target.token(1) == "<|begin|>"
    assert target.backend.token_to_id("<|begin|>") == 1


def changed(folder: Path, change: dict[str, Any]) -> Path:
    """A copy of the bundled tokenizer in `folder`, with entries of its tokenizer.json replaced."""
    folder.mkdir(exist_ok=True)
    shutil.copy(BUNDLED[0] / "tokenizer_config.json", folder)
    data = json.loads((BUNDLED[0] / "tokenizer.json").read_text("utf-8"))
    (folder / "tokenizer.json").write_text(json.dumps({**data, **change}), "utf-8")
    return folder


def test_a_mismatch_names_the_first_id_that_differs(tmp_path: Path) -> None:
    model = json.loads((BUNDLED[0] / "tokenizer.json").read_text("utf-8"))["model"]
    swap = {300: 301, 301: 300}
    vocab = {token: swap.get(index, index) for token, index in model["vocab"].items()}
    target, other = Tokenizer.load(BUNDLED[0]), Tokenizer.load(changed(tmp_path, {"model": {**model, "vocab": vocab}}))
    mismatch = vocabulary_mismatch(target, other)
    assert mismatch is not None
    assert mismatch.startswith(f"token id 300 is {target.token(300)!r} in ")
    assert target != other
    assert target.fingerprint() != other.fingerprint()
    longer = Tokenizer.load(changed(tmp_path, {"model": {**model, "vocab": {**model["vocab"], "extra one": 2048}}}))
    assert "token id 2048 is no token in" in str(vocabulary_mismatch(target, longer))


def test_truncation_and_padding_in_the_file_are_off(tmp_path: Path) -> None:
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    text = "Once upon a time there was a big red ball."
    limited = Tokenizer.load(changed(tmp_path, {"truncation": truncation, "padding": padding}))
    assert limited.encode(text) == Tokenizer.load(BUNDLED[0]).encode(text)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 100_000, b'{"model": {"type": "Magic"}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}}',
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},'
        b' "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_what_is_not_a_tokenizer_is_refused(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    (tmp_path / "tokenizer.json").write_bytes(content)
    if kind == "LlamaTokenizer" and b"pre_tokenizer" in content:
        assert Tokenizer.load(tmp_path).vocab_size == 1  # a LlamaTokenizer's pre-tokenizer is not the file's
        return
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_post_processor_may_not_add_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    post = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "X", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"X": {"id": "X", "ids": [999_999], "tokens": ["X"]}},
    }
    with pytest.raises(CheckpointError, match="expected ids below 2048"):
        Tokenizer.load(changed(tmp_path, {"post_processor": post}))


def test_a_folder_without_a_tokenizer_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a tokenizer\.json, found none.*save_pretrained"):
        Tokenizer.load(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="expected at most"):
        Tokenizer.load(tmp_path)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_tokenizer_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    whole = json.dumps(
        {
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
            "added_tokens": [],
            "normalizer": {"type": "Prepend", "prepend": "x"},
            "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        }
    ).encode()
    position = data.draw(st.integers(0, len(whole) - 1))
    folder = tmp_path_factory.mktemp("t")
    changed_bytes = whole[:position] + data.draw(st.binary(max_size=3)) + whole[position + 1 :]
    (folder / "tokenizer.json").write_bytes(changed_bytes)
    try:
        tokenizer = Tokenizer.load(folder)
        tokenizer.decode(tokenizer.encode("ab ba"))
    except SlotwiseError:
        pass
    shutil.rmtree(folder)


@pytest.mark.parametrize("ids", [[-1], [2048], [2**40], ["1"], [1.0], [None], [True]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[Any]) -> None:
    tokenizer = Tokenizer.load(BUNDLED[0])
    with pytest.raises(OptionError, match="token id"):
        tokenizer.decode(ids)
    with pytest.raises(OptionError, match="token id"):
        tokenizer.token(ids[0])


@pytest.mark.parametrize("text", [None, b"bytes", 3, ["a"], "half \ud83d of a pair"])
def test_what_is_not_text_is_refused(text: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        Tokenizer.load(BUNDLED[0]).encode(text)
