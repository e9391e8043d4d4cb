"""What streaming text promises: the tokenizer's own text, whole characters only, nothing taken back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from slotwise.core.errors import CheckpointError
from slotwise.engine.detokenize import Detokenizer, TokenPieces

STORIES = Path(__file__).resolve().parents[2] / "examples" / "models" / "stories" / "tokenizer.json"
REPLACEMENT = "\ufffd"
AWKWARD_TEXTS = [
    "Once upon a time",
    "  two  spaces ",
    "😀👨‍👩‍👧‍👦🇩🇪",
    "日本語 中文 한국어",
    "e\u0301 \u0928\u093f ô",
    "\n\t a\r\n",
    "tail \ufffd ok",
]
TEXTS = st.one_of(st.sampled_from(AWKWARD_TEXTS), st.text(max_size=20), st.text("a é日😀", max_size=12))


def streamed(pieces: TokenPieces, ids: Sequence[int], prompt: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(pieces, prompt)
    return "".join(detokenizer.push(token_id) for token_id in ids)


def sentencepiece_like() -> Tokenizer:
    """Word pieces with the space in front, bytes for the rest: the decoder of Llama 2."""
    words = ["▁", "▁Once", "▁upon", "ce", "é", "日", "x▁y"]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken("<unk>", special=True), AddedToken("<s>", special=True)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def words_with(decoder: decoders.Decoder | None, words: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, words[0]))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


BYTE_LEVEL = Tokenizer.from_file(str(STORIES))
BYTE_LEVEL_PIECES = TokenPieces(BYTE_LEVEL)
SENTENCEPIECE = sentencepiece_like()
SENTENCEPIECE_PIECES = TokenPieces(SENTENCEPIECE)
FIRST_BYTE, FIRST_WORD = 2, 258


def decoded_up_to_an_unfinished_end(text: str, whole: str) -> bool:
    return whole in (text, text + REPLACEMENT)


@given(TEXTS)
def test_byte_level_text_comes_back_whole(text: str) -> None:
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    assert streamed(BYTE_LEVEL_PIECES, ids) == BYTE_LEVEL.decode(ids) == text


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=30))
def test_any_byte_level_ids_decode_as_the_tokenizer_does(ids: list[int]) -> None:
    text = streamed(BYTE_LEVEL_PIECES, ids)
    assert decoded_up_to_an_unfinished_end(text, BYTE_LEVEL.decode(ids))
    # Only an unfinished end is left out: after a whole character the two are equal.
    finish = BYTE_LEVEL.encode("!", add_special_tokens=False).ids
    assert streamed(BYTE_LEVEL_PIECES, ids + finish) == BYTE_LEVEL.decode(ids + finish)


# Tokens of single bytes reach every ill-formed sequence far sooner than ids of the whole vocabulary.
AWKWARD_BYTES = [0x80, 0xBF, 0xC3, 0xE6, 0x97, 0xA5, 0xED, 0xF0, 0x9F, 0x98, 0xF5, 0xFF, 0x41]
BYTES = st.lists(st.sampled_from(AWKWARD_BYTES), max_size=12)


BYTE_LEVEL_IDS = {BYTE_LEVEL_PIECES.continuing(n): n for n in range(BYTE_LEVEL.get_vocab_size())}


@given(BYTES)
def test_ill_formed_byte_level_runs_read_as_the_tokenizer_has_them(run: list[int]) -> None:
    ids = [BYTE_LEVEL_IDS[bytes([byte])] for byte in run]
    text = streamed(BYTE_LEVEL_PIECES, ids)
    assert decoded_up_to_an_unfinished_end(text, bytes(run).decode(errors="replace"))
    assert decoded_up_to_an_unfinished_end(text, BYTE_LEVEL.decode(ids))
    assert streamed(BYTE_LEVEL_PIECES, [*ids, BYTE_LEVEL_IDS[b"!"]]) == BYTE_LEVEL.decode([*ids, BYTE_LEVEL_IDS[b"!"]])


def test_an_unfinished_character_is_held_back_and_dropped_at_the_end() -> None:
    ids = [FIRST_BYTE + byte for byte in "日".encode()]
    detokenizer = Detokenizer(SENTENCEPIECE_PIECES)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "日"]
    assert streamed(SENTENCEPIECE_PIECES, ids[:2]) == ""


def test_bytes_that_cannot_become_a_character_are_given_up_at_once() -> None:
    detokenizer = Detokenizer(SENTENCEPIECE_PIECES)
    pushes = [detokenizer.push(FIRST_BYTE + byte) for byte in (0xFF, 0xE6, 0x97, 0xC3)]
    assert pushes == [REPLACEMENT, "", "", REPLACEMENT * 2]


def test_a_surrogate_is_given_up_at_its_second_byte() -> None:
    detokenizer = Detokenizer(BYTE_LEVEL_PIECES)
    pushes = [detokenizer.push(BYTE_LEVEL_IDS[bytes([byte])]) for byte in (0xED, 0xBF, 0x41)]
    assert pushes == ["", REPLACEMENT * 2, "A"]


WORDS = st.integers(FIRST_WORD, SENTENCEPIECE.get_vocab_size() - 1).map(lambda n: [n])
CHARACTERS = st.text("é日😀 a", min_size=1, max_size=3).map(lambda text: [FIRST_BYTE + byte for byte in text.encode()])
ORPHANS = st.sampled_from([[0xFF], [0xE6, 0x97], [0xF0, 0x9F, 0x98], [0x80, 0x80]]).flatmap(
    lambda run: st.just([*(FIRST_BYTE + byte for byte in run), FIRST_WORD])
)


@given(st.lists(WORDS | CHARACTERS.map(lambda run: [*run, FIRST_WORD]) | ORPHANS, max_size=8))
def test_byte_fallback_text_is_the_tokenizers_own(runs: list[list[int]]) -> None:
    ids = [token_id for run in runs for token_id in run]
    assert streamed(SENTENCEPIECE_PIECES, ids) == SENTENCEPIECE.decode(ids)


def test_a_complete_character_stays_where_its_run_of_bytes_turns_out_ill_formed() -> None:
    ids = [FIRST_BYTE + byte for byte in (*"日".encode(), 0xFF)]
    assert streamed(SENTENCEPIECE_PIECES, ids) == "日" + REPLACEMENT
    assert SENTENCEPIECE.decode(ids) == REPLACEMENT * 4


def test_a_continuation_keeps_its_leading_space_and_a_beginning_does_not() -> None:
    once, upon, bos = (SENTENCEPIECE.token_to_id(token) for token in ("▁Once", "▁upon", "<s>"))
    assert streamed(SENTENCEPIECE_PIECES, [upon], prompt=[bos, once]) == " upon"
    assert streamed(SENTENCEPIECE_PIECES, [upon], prompt=[bos]) == "upon"
    assert streamed(SENTENCEPIECE_PIECES, [bos, upon, upon]) == "upon upon"


@given(st.lists(WORDS, min_size=1, max_size=4), st.lists(WORDS, max_size=4), st.booleans())
def test_a_continuation_is_what_it_adds_to_the_prompt(
    prompt_runs: list[list[int]], runs: list[list[int]], ends_in_special: bool
) -> None:
    prompt = [n for run in prompt_runs for n in run] + [1] * ends_in_special
    ids = [n for run in runs for n in run]
    added = SENTENCEPIECE.decode(prompt + ids)[len(SENTENCEPIECE.decode(prompt)) :]
    assert streamed(SENTENCEPIECE_PIECES, ids, prompt) == added


@given(st.text("é日😀a", min_size=1, max_size=6), st.data())
def test_a_character_that_the_prompt_began_is_given_whole(text: str, data: st.DataObject) -> None:
    ids = [FIRST_BYTE + byte for byte in text.encode()]
    split = data.draw(st.integers(1, len(ids)))
    complete = text.encode()[:split].decode(errors="ignore")
    assert streamed(SENTENCEPIECE_PIECES, ids[split:], prompt=ids[:split]) == text[len(complete) :]


def test_special_tokens_are_silent_unless_asked_for() -> None:
    end = BYTE_LEVEL.token_to_id("<|end|>")
    ids = BYTE_LEVEL.encode("a b", add_special_tokens=False).ids
    assert streamed(BYTE_LEVEL_PIECES, [*ids, end, *ids]) == "a ba b"
    assert streamed(TokenPieces(BYTE_LEVEL, skip_special_tokens=False), [*ids, end]) == "a b<|end|>"


def test_an_added_token_outside_the_byte_alphabet_stands_for_itself() -> None:
    tokenizer = Tokenizer.from_file(str(STORIES))
    tokenizer.add_tokens([AddedToken("two words 日", special=False)])
    ids = [tokenizer.token_to_id("two words 日")]
    assert streamed(TokenPieces(tokenizer), ids) == tokenizer.decode(ids) == "two words 日"


@pytest.mark.parametrize(
    "tokenizer",
    [
        words_with(decoders.Metaspace(), ["▁a", "b", "▁c", "▁", "é"]),
        words_with(decoders.WordPiece(), ["a", "##b", "c", ".", "é"]),
        words_with(None, ["a", "b", "c", "d", "é"]),
    ],
    ids=["metaspace", "wordpiece", "none"],
)
@given(ids=st.lists(st.integers(0, 4), min_size=1, max_size=8))
def test_other_decoders_keep_their_own_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    pieces = TokenPieces(tokenizer)
    whole = tokenizer.decode(ids)
    assert streamed(pieces, ids) == whole
    for split in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:split])
        assert prompt + streamed(pieces, ids[split:], prompt=ids[:split]) == whole


@pytest.mark.parametrize(
    "decoder", [decoders.BPEDecoder(), decoders.CTC(), decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])]
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: decoders.Decoder) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer decoder .* expected ByteLevel alone"):
        TokenPieces(words_with(decoder, ["a"]))


@pytest.mark.parametrize("name", ["tinystories-656k", "stories260k", "qwen3-tokenizer"])
def test_real_tokenizers_stream_their_own_text(shared_models: Path, name: str) -> None:
    path = shared_models / name / "tokenizer.json"
    if not path.exists():
        pytest.skip(f"needs the tokenizer of {name}")
    tokenizer = Tokenizer.from_file(str(path))
    pieces = TokenPieces(tokenizer)
    special = {n for n, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def decode(ids: list[int]) -> str:
        # `tokenizers` forgets that a special token is special where the normalizer would change it.
        return tokenizer.decode([n for n in ids if n not in special])

    for text in AWKWARD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert streamed(pieces, ids) == decode(ids)
        for split in range(1, len(ids)):
            prompt = decode(ids[:split])
            if REPLACEMENT not in prompt:
                assert prompt + streamed(pieces, ids[split:], prompt=ids[:split]) == decode(ids)
