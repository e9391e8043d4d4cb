"""A last message that is gone on with ends where transformers ends it, whatever it says and however it is written."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import RequestError
from slotwise.models.chat_template import ChatTemplate

HELLO = {"role": "user", "content": "hi"}
TURN = "{% for m in messages %}<{{ m.role }}>X<end>{% endfor %}"
TEMPLATES = {
    "as it is": TURN.replace("X", "{{ m.content }}"),
    "trimmed": TURN.replace("X", "{{ m.content|trim }}"),
    "trimmed left": TURN.replace("X", "{{ m.content.lstrip() }}"),
    "a blank behind": TURN.replace("X", "{{ m.content|trim }} "),
    "twice": TURN.replace("X", "{{ m.content }}|{{ m.content }}"),
    "in what follows": TURN.replace("X", "{{ m.content }}") + "{{ messages[0].content }}<end>",
    "as JSON": TURN.replace("X", "{{ m.content|tojson }}"),
    "only when there": TURN.replace("X", "{% if m.content %}:{{ m.content }}{% endif %}"),
    "lower": TURN.replace("X", "{{ m.content|lower }}"),
    "left out": TURN.replace("X", "{% if not loop.last %}{{ m.content }}{% endif %}"),
    "cut": TURN.replace("X", "{{ m.content[:5] }}"),
    "parts": TURN.replace("X", "{% for p in m.content %}{{ p.text if p is mapping else p }}{% endfor %}"),
    "another field": TURN.replace("X", "{{ m.text }}"),
    "reasoning": TURN.replace("X", "{{ m.reasoning_content }}/{{ m.content }}"),
    "thinking": TURN.replace("X", "{{ m.thinking }}/{{ m.content }}"),
}


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """A tokenizer of transformers, for its way with messages: it is asked for text."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    )


def both(source: str, messages: list[dict[str, Any]], go_on: bool | str) -> tuple[str | None, str | None]:
    """What we and transformers make of it, None where that refuses."""
    ours: str | None
    theirs: str | None
    try:
        ours = ChatTemplate(source, "mine").render(messages, continue_final_message=go_on)
    except RequestError:
        ours = None
    try:
        theirs = tokenizer().apply_chat_template(
            messages, chat_template=source, tokenize=False, continue_final_message=go_on
        )
        assert isinstance(theirs, str)
        # Where a template writes the message twice, the oracle leaves its mark in the first.
        theirs = theirs.replace("CONTINUE_FINAL_MESSAGE_TAG ", "").replace("CONTINUE_FINAL_MESSAGE_TAG", "")
    except Exception:  # whatever the oracle raises
        theirs = None
    return ours, theirs


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from(["", " ", "hi", "Sure", " Sure, ", "Sure\n", "<end>", "\n\n", "<assistant>", "é'\"\\"])
        | st.text(max_size=6),
        min_size=1,
        max_size=3,
    )
)
def test_the_prompt_ends_where_transformers_ends_it(name: str, texts: list[str]) -> None:
    messages = [{"role": "assistant", "content": text} for text in texts]
    ours, theirs = both(TEMPLATES[name], messages, True)
    assert ours == theirs


def test_the_text_alone_does_not_say_where_it_ends() -> None:
    messages = [{"role": "user", "content": "<end>"}, {"role": "assistant", "content": "<end>"}]
    rendered = ChatTemplate(TEMPLATES["in what follows"], "mine").render(messages, continue_final_message=True)
    assert rendered == "<user><end><end><assistant><end>"


def test_a_template_that_trims_ends_the_prompt_without_blanks() -> None:
    messages = [HELLO, {"role": "assistant", "content": "  Sure, \n"}]
    assert ChatTemplate(TEMPLATES["trimmed"], "mine").render(messages, continue_final_message=True).endswith(">Sure,")
    assert ChatTemplate(TEMPLATES["as it is"], "mine").render(messages, continue_final_message=True).endswith("e, \n")


@pytest.mark.parametrize("said", ["SLOTWISE_GOES_ON_HERE", "SLOTWISE_GOES_ON_HERE_ SLOTWISE_GOES_ON_HERE"])
def test_a_message_may_say_what_marks_its_end(said: str) -> None:
    messages = [{"role": "user", "content": said}, {"role": "assistant", "content": said}]
    rendered = ChatTemplate(TEMPLATES["in what follows"], "mine").render(messages, continue_final_message=True)
    assert rendered == f"<user>{said}<end><assistant>{said}"


def test_parts_are_gone_on_with_behind_the_last_text() -> None:
    parts = [{"type": "text", "text": "Sure, "}, {"type": "text", "text": "it is"}]
    ours, theirs = both(TEMPLATES["parts"], [HELLO, {"role": "assistant", "content": parts}], True)
    assert ours == theirs == "<user>hi<end><assistant>Sure, it is"
    flat = ChatTemplate(TEMPLATES["as it is"], "mine").render(
        [HELLO, {"role": "assistant", "content": parts}], continue_final_message=True
    )
    assert flat == "<user>hi<end><assistant>Sure, it is"


@pytest.mark.parametrize("name", ["reasoning", "thinking"])
@pytest.mark.parametrize("given_as", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("go_on", ["reasoning_content", "thinking"])
def test_reasoning_is_gone_on_with_under_any_of_its_names(name: str, given_as: str, go_on: str) -> None:
    message = {"role": "assistant", "content": "", given_as: "why "}
    template = ChatTemplate(TEMPLATES[name], "mine")
    assert template.render([HELLO, message], continue_final_message=go_on).endswith("<assistant>why ")


@pytest.mark.parametrize(
    ("message", "go_on", "error"),
    [
        ({"role": "assistant", "content": None, "tool_calls": []}, True, "has no 'content' to go on with"),
        ({"role": "assistant", "content": "x"}, "reasoning_content", "has no 'reasoning_content' to go on with"),
        ({"role": "assistant", "content": "x", "mood": "y"}, "mood", "does not read 'mood' of a message"),
        ({"role": "assistant", "content": "x", "role_content": 3}, "role_content", "does not read 'role_content'"),
        ({"role": "tool", "content": {"a": 1}}, True, "'content' of the last message is not text"),
        ({"role": "tool", "content": [1]}, True, "has no text part to go on with"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(message: Any, go_on: Any, error: str) -> None:
    with pytest.raises(RequestError, match=error):
        ChatTemplate(TEMPLATES["as it is"], "mine").render([HELLO, message], continue_final_message=go_on)


def test_a_template_that_leaves_the_message_out_is_refused() -> None:
    for name in ("left out", "cut", "lower"):
        with pytest.raises(RequestError, match="does not write the last message as it stands"):
            ChatTemplate(TEMPLATES[name], "mine").render(
                [HELLO, {"role": "assistant", "content": "Sure, it is"}], continue_final_message=True
            )
