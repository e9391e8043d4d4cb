"""What the stop rules promise: where a sequence ends, and that shown text never has to be taken back."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import OptionError
from slotwise.engine.sampling import Sampling
from slotwise.engine.stop_marks import StopMarks
from slotwise.engine.stops import StopChecker, StopStrings

EOS = 99
TEXTS = st.text("ab", max_size=30)
STRINGS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def cut_by_definition(text: str, strings: list[str]) -> str | None:
    """The text before the stop string that is complete first, the longest of those; None where there is none."""
    for end in range(len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@given(TEXTS, STRINGS, st.lists(st.integers(0, 30), max_size=8))
def test_the_cut_depends_on_the_text_alone(text: str, strings: list[str], cuts: list[int]) -> None:
    matcher = StopStrings(strings)
    shown, stopped = "", False
    for piece in pieces_of(text, cuts):
        more, stopped = matcher.push(piece)
        shown += more
        if stopped:
            break
    expected = cut_by_definition(text, strings)
    assert stopped == (expected is not None)
    assert shown + matcher.release() == (text if expected is None else expected)


@given(TEXTS, STRINGS)
def test_what_is_held_back_is_the_longest_possible_beginning_and_no_more(text: str, strings: list[str]) -> None:
    matcher = StopStrings(strings)
    shown = ""
    for end, character in enumerate(text, 1):
        more, stopped = matcher.push(character)
        shown += more
        if stopped:
            return
        beginnings = {s[:length] for s in strings for length in range(len(s))}
        held = max((b for b in beginnings if text[:end].endswith(b)), key=len, default="")
        assert shown + held == text[:end]


def run(checker: StopChecker, tokens: list[tuple[int, str]]) -> tuple[str, int, str | None]:
    text = ""
    for kept, (token_id, piece) in enumerate(tokens, 1):
        verdict = checker.push(token_id, piece)
        text += verdict.text
        if verdict.reason:
            return text, kept, verdict.reason
    return text, len(tokens), None


def words(*pieces: str) -> list[tuple[int, str]]:
    return list(enumerate(pieces))


def test_a_stop_string_spans_tokens_and_may_end_inside_one() -> None:
    tokens = words("one", " E", "N", "D of", " it")
    assert run(StopChecker(Sampling(stop="END"), [EOS]), tokens) == ("one ", 4, "stop")


def test_the_token_that_completes_a_stop_string_is_the_last_one_kept() -> None:
    assert run(StopChecker(Sampling(stop="a"), []), words("x", "ya", "z")) == ("xy", 2, "stop")


def test_text_that_only_looked_like_a_stop_string_is_released() -> None:
    checker = StopChecker(Sampling(stop=["<end>"]), [])
    assert checker.push(0, "a <en").text == "a "
    assert checker.push(1, "try").text == "<entry"
    assert checker.push(2, "<").text == ""
    assert checker.release() == "<"


def test_held_back_text_is_released_at_the_end() -> None:
    assert run(StopChecker(Sampling(stop="<end>", max_new_tokens=2), []), words("a", "<en", "d>")) == (
        "a<en",
        2,
        "length",
    )
    assert run(StopChecker(Sampling(stop="<end>"), [EOS]), [(0, "a<en"), (EOS, "d>")]) == ("a<en", 2, "stop")


def test_a_stop_token_is_kept_and_its_text_is_not() -> None:
    assert run(StopChecker(Sampling(), [EOS]), [(1, "a"), (EOS, "</s>"), (2, "b")]) == ("a", 2, "stop")
    assert run(StopChecker(Sampling(stop_token_ids=[7]), [EOS]), [(1, "a"), (7, "b"), (2, "c")]) == ("a", 2, "stop")


def test_ignore_eos_goes_on_past_eos_and_still_heeds_other_stop_tokens() -> None:
    sampling = Sampling(ignore_eos=True, stop_token_ids=[7])
    assert run(StopChecker(sampling, [EOS]), [(EOS, ""), (1, "a"), (7, "b")]) == ("a", 3, "stop")


@pytest.mark.parametrize(("max_new", "budget", "kept"), [(1, None, 1), (3, None, 3), (3, 2, 2), (2, 3, 2)])
def test_the_budget_counts_exactly(max_new: int, budget: int | None, kept: int) -> None:
    checker = StopChecker(Sampling(max_new_tokens=max_new), [EOS], budget=budget)
    assert run(checker, words("a", "b", "c", "d")) == ("abcd"[:kept], kept, "length")


def test_a_stop_wins_over_the_budget() -> None:
    assert run(StopChecker(Sampling(max_new_tokens=1), [EOS]), [(EOS, "")])[2] == "stop"
    assert run(StopChecker(Sampling(max_new_tokens=1, stop="a"), []), words("a"))[2] == "stop"


def test_nothing_may_be_pushed_after_the_end() -> None:
    checker = StopChecker(Sampling(max_new_tokens=1), [])
    checker.push(0, "a")
    with pytest.raises(ValueError, match="token 5 was pushed after the sequence had ended"):
        checker.push(5, "b")


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(OptionError, match=r"budget: .*found 0"):
        StopChecker(Sampling(), [], budget=0)


SILENT = {"<end>": 7, "<end>>": 8, "<turn>": 9}
NAMES = {number: text for text, number in SILENT.items()}
OUTPUTS = st.lists(st.sampled_from(["a", "b", "ab", "ba<end>", 7, 7, 9]), max_size=12)
NAMING = st.lists(
    st.lists(st.sampled_from(["a", "b", "<end>", "<end>", "<turn>"]), min_size=1, max_size=3).map("".join),
    min_size=1,
    max_size=4,
)


def cut_with_tokens_by_definition(output: list[str | int], strings: list[str]) -> tuple[str, int] | None:
    """The text shown before the first stop, and how many pieces it takes; a stop is a suffix of text, or of tokens."""
    elements = [[*piece] if isinstance(piece, str) else [piece] for piece in output]
    flat = [element for piece in elements for element in piece]
    ends = [number for number, piece in enumerate(elements, 1) for _ in piece]
    for end in range(1, len(flat) + 1):
        seen = flat[:end]
        shown = [at for at, element in enumerate(seen) if isinstance(element, str)]
        starts = []
        for string in strings:
            text = "".join(seen[at] for at in shown)  # type: ignore[misc]
            if isinstance(seen[-1], str) and text.endswith(string):
                starts.append(shown[len(shown) - len(string)])
            spelled = [NAMES.get(element, element) for element in seen]  # type: ignore[arg-type]
            for at in range(len(seen)):
                whole = "".join(map(str, spelled[at:])) == string
                named = sum(map(string.count, ("<end>", "<turn>")))
                if whole and named and sum(isinstance(element, int) for element in seen[at:]) == named:
                    starts.append(at)
        if starts:
            return "".join(element for element in flat[: min(starts)] if isinstance(element, str)), ends[end - 1]
    return None


@settings(max_examples=400)
@given(OUTPUTS, NAMING)
def test_a_stop_string_that_names_tokens_ends_at_them(output: list[str | int], strings: list[str]) -> None:
    checker = StopChecker(Sampling(stop=strings, max_new_tokens=50), [], silent=SILENT)
    tokens = [(0, piece) if isinstance(piece, str) else (piece, "") for piece in output]
    shown, kept, reason = run(checker, tokens)
    expected = cut_with_tokens_by_definition(output, strings)
    if expected is None:
        assert reason is None
        assert shown + checker.release() == "".join(piece for piece in output if isinstance(piece, str))
    else:
        assert (shown, kept, reason) == (*expected, "stop")


@pytest.mark.parametrize(
    ("stop", "tokens", "text"),
    [
        ("<end>", [(1, "a"), (7, "")], "a"),
        ("bye<end>", [(1, "a b"), (2, "ye"), (7, "")], "a "),
        ("<turn>user", [(1, "a"), (9, ""), (2, "us"), (3, "er")], "a"),
        ("x<end><turn>y", [(1, "ax"), (7, ""), (9, ""), (3, "yz")], "a"),
        ("<end>>", [(1, "a"), (8, "")], "a"),
        ("<end>", [(1, "a<e"), (2, "nd>")], "a"),
        ("ab", [(1, "ca"), (7, ""), (2, "b")], "c"),
    ],
)
def test_a_stop_string_acts_at_a_token_whose_text_is_never_shown(
    stop: str, tokens: list[tuple[int, str]], text: str
) -> None:
    assert run(StopChecker(Sampling(stop=stop), [], silent=SILENT), tokens) == (text, len(tokens), "stop")


def test_text_before_a_token_that_may_complete_a_stop_is_held_back() -> None:
    checker = StopChecker(Sampling(stop="bye<end>"), [], silent=SILENT)
    assert [checker.push(1, "good").text, checker.push(2, "bye").text, checker.push(9, "").text] == ["good", "", ""]
    assert checker.push(3, "!").text == "bye!"


def test_tokens_that_no_stop_string_names_leave_no_trace() -> None:
    checker = StopChecker(Sampling(stop="<end>"), [], silent=SILENT)
    assert [checker.push(9, "").text, checker.push(1, "a").text] == ["", "a"]
    assert StopMarks.of(["plain"], SILENT).by_id == {}


def test_a_stop_string_that_can_never_match_is_refused() -> None:
    with pytest.raises(OptionError, match="half of a surrogate pair at position 1, so it can never match"):
        StopChecker(Sampling(stop="a\ud800"), [])


def test_nothing_stops_before_the_least_length_and_something_does_right_after() -> None:
    for least in ({"min_new_tokens": 2}, {"min_length": 5}):
        checker = StopChecker(Sampling(stop=["b"], **least), (), prompt_length=3)  # type: ignore[arg-type]
        assert run(checker, words("b", "b", "b", "c")) == ("bb", 3, "stop")


def test_a_stop_tokens_own_text_is_kept_where_it_is_asked_for() -> None:
    assert run(StopChecker(Sampling(include_stop=True), (7,)), [(1, "a"), (7, "!")]) == ("a!", 2, "stop")
