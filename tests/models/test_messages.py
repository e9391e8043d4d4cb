"""Messages in any of their spellings reach a template in one form, and what is no message is refused by place."""

from __future__ import annotations

import copy
import enum
import json
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.messages import normalised

HELLO = {"role": "user", "content": "hi"}
AS_JSON = "{% for m in messages %}{{ m|tojson }}\n{% endfor %}"


def seen(*messages: Any, source: str = AS_JSON) -> list[Any]:
    """The messages as a template sees them."""
    return [json.loads(line) for line in ChatTemplate(source, "mine").render(messages).splitlines()]


class Role(str, enum.Enum):
    USER = "user"


@dataclass
class Record:
    role: str
    content: Any
    name: str | None = None


class Dumped:
    """What Pydantic's models have."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def model_dump(self) -> dict[str, Any]:
        return self._fields


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"role": "user", "content": "hi", "name": None, "tool_calls": None}, HELLO),
        ({"role": Role.USER, "content": "hi"}, HELLO),
        (Record("user", "hi"), HELLO),
        (Dumped(role="user", content="hi", refusal=None), HELLO),
        ({"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, HELLO),
        ({"role": "user", "content": ["h", {"text": "i"}]}, HELLO),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "assistant", "content": None}, {"role": "assistant"}),
        ({"role": "user", "content": "hi", "n": numpy.float64(2.5), "b": numpy.bool_(False), "t": (1, 2)},
         {**HELLO, "n": 2.5, "b": False, "t": [1, 2]}),
        ({"role": "tool", "content": {"a": [1]}}, {"role": "tool", "content": {"a": [1]}}),
        ({"role": "tool", "content": [{"a": 1}, 2]}, {"role": "tool", "content": [{"a": 1}, 2]}),
        ({"role": "tool", "content": [{"type": "event"}]}, {"role": "tool", "content": [{"type": "event"}]}),
        ({"role": "tool", "content": [{"type": "text", "text": "hi"}]}, {"role": "tool", "content": "hi"}),
    ],
)  # fmt: skip
def test_a_message_is_seen_in_one_form(message: Any, expected: Any) -> None:
    assert seen(message) == [expected]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_seen_under_the_names_that_templates_ask_for(name: str) -> None:
    message = {"role": "assistant", "content": "x", name: "why"}
    for asked in ("reasoning_content", "thinking", "reasoning"):
        source = "{{ messages[0].NAME }}|{{ messages[0]['NAME'] }}".replace("NAME", asked)
        assert ChatTemplate(source, "mine").render([message]) == "why|why"
    expected = {"role": "assistant", "content": "x", "reasoning_content": "why", "thinking": "why", name: "why"}
    assert seen(message) == [expected]
    assert seen({"role": "assistant", name: "why"})[0]["thinking"] == "why"


def test_reasoning_under_two_names_stays_under_both() -> None:
    message = {"role": "assistant", "content": "x", "thinking": "a", "reasoning_content": "b"}
    assert seen(message) == [message]


CALLING = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a":  "é"}'}}]}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ a|tojson }}", '{"a": "é"}'),
        ("{{ a if a is string else a|tojson }}", '{"a": "é"}'),
        ("{% for k, v in a|items %}{{ k }}={{ v }}{% endfor %}", "a=é"),
        ("{% for k, v in a.items() %}{{ k }}={{ v }}{% endfor %}", "a=é"),
        ("{{ a.a }}{{ a['a'] }}{{ a is mapping }}", "ééTrue"),
        ("{{ messages[0].tool_calls[0].function|tojson }}", '{"name": "f", "arguments": {"a": "é"}}'),
        ("{{ a }}", '{"a":  "é"}'),
        ("{{ '<' + a + '>' }}", '<{"a":  "é"}>'),
        ("{{ '<' ~ a ~ '>' }}", '<{"a":  "é"}>'),
        ("{{ '<%s>' % a }}{{ a|string }}{{ a|trim }}", '<{"a":  "é"}>' + '{"a":  "é"}' * 2),
    ],
)
def test_arguments_as_json_text_are_a_mapping_that_prints_as_the_text(source: str, expected: str) -> None:
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}" + source
    assert ChatTemplate(source, "mine").render([CALLING]) == expected


def test_a_text_that_is_longer_than_its_mapping_is_paid_for() -> None:
    call = {"function": {"name": "f", "arguments": "{" + " " * 1_000_000 + "}"}}
    source = "{% set a = messages[0].tool_calls[0].function.arguments %}{{ [a] * 11 }}"
    with pytest.raises(CheckpointError, match="more than 10000000 characters"):
        ChatTemplate(source, "mine").render([{"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize("written", [None, "", "  ", "{}"])
def test_a_call_without_arguments_has_an_empty_mapping(written: Any) -> None:
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": written}]}
    assert seen(message)[0]["tool_calls"][0]["arguments"] == {}


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, r"\['content'\]\[0\] is a part of type "
         "'image_url'; models here read text alone"),
        ({"role": "user", "content": ["a", {"type": "input_audio"}]}, r"\['content'\]\[1\] is a part of type 'input_a"),
        ({"role": "tool", "content": [{"type": "image"}]}, "is a part of type 'image'"),
        ({"role": "user", "content": [{"type": "text"}]}, "must have text under 'text', found nothing"),
        ({"role": "user", "content": [{"type": "text", "text": 3}]}, "must have text under 'text', found a int"),
        ({"role": "user", "content": [3]}, "must be a part such as"),
        ({"role": "user", "content": {"type": "text", "text": "a"}}, "must be text or a list of parts, found a dict"),
        ({"role": None, "content": "x"}, "must have a 'role' such as 'user', found nothing"),
        ({"role": "user", "contents": "x"}, "must have 'content', found only role, contents"),
        ({"role": "user", "content": None, "text": {1}}, r"\['text'\] is a set; expected JSON data"),
        ({"role": "assistant", "tool_calls": "f()"}, r"\['tool_calls'\] must be a list of calls"),
        ({"role": "assistant", "tool_calls": ["f()"]}, r"\['tool_calls'\]\[0\] must be a mapping with 'function'"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}, r"\['function'\]\['arguments'\] must "
         "be a mapping or its JSON text"),
        ({"role": "assistant", "tool_calls": [{"arguments": "[1]"}]}, "found the JSON text of a list"),
        ({"role": "assistant", "tool_calls": [{"arguments": 5}]}, r"\['arguments'\] must be a mapping or its JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": [1]}}]}, "its JSON text, found a list"),
        ({"role": "assistant", "tool_calls": [{"arguments": "[" * 99999}]}, "must be a mapping or its JSON text"),
        ({"role": "assistant", "tool_calls": [{"arguments": '{"a":' * 90 + "1" + "}" * 90}]}, "nested more than 64"),
        ([HELLO], "must be a mapping with 'role' and 'content', found a list"),
    ],
)  # fmt: skip
def test_what_is_no_message_is_refused_by_place(message: Any, error: str) -> None:
    with pytest.raises(RequestError, match=r"messages\[1\].*" + error):
        ChatTemplate(AS_JSON, "mine").render([HELLO, message])


PART = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("source", "kept"),
    [
        ("{% for p in messages[0].content %}{{ p.text }}{% endfor %}", True),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
         "{% for p in messages[0].content %}{{ p['text'] }},{% endfor %}{% endif %}", True),
        ("{% macro shown(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ shown(messages[0].content) }}",
         True),
        ("{% set c = messages[0].content %}{{ c|map(attribute='text')|join }}", True),
        ("{{ messages[0].content }}", False),
        ("{{ 'a' + messages[0].content }}", False),
        ("{{ messages[0].content|tojson }}", False),
        ("{% for p in messages[0].content %}{{ p }}{% endfor %}", False),
        ("{% if messages[0].content is string %}{{ messages[0].content }}{% endif %}", False),
        ("{{ raise_exception('no') }}", False),
    ],
)  # fmt: skip
def test_parts_are_kept_where_the_template_writes_their_text(source: str, kept: bool) -> None:
    template = ChatTemplate(source + "{# #}{% if add_generation_prompt %}{{ messages|tojson }}{% endif %}", "mine")
    message = {"role": "user", "content": [PART]}
    try:
        text = template.render([message])
    except RequestError:
        assert not kept
        return
    content = json.loads(text[text.index('[{"role"') :])[0]["content"]
    assert content == ([PART] if kept else "hi")


@pytest.mark.parametrize("role", ["user", "assistant", "tool"])
@pytest.mark.parametrize("sort", ["input_text", "output_text"])
def test_text_parts_of_responses_are_text_parts(role: str, sort: str) -> None:
    message = {"role": role, "content": [{"type": sort, "text": "h", "annotations": []}, {"type": "text", "text": "i"}]}
    assert seen(message) == [{"role": role, "content": "hi"}]
    source = "{% for p in m.content %}{{ p.type }}:{{ p.text }};{% endfor %}"
    source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}" + source
    source += "{% endif %}{% endfor %}"
    assert ChatTemplate(source, "mine").render([message]) == "text:h;text:i;"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(
    extra=st.dictionaries(st.text(max_size=8), JSON, max_size=4), arguments=st.dictionaries(st.text(max_size=5), JSON)
)
def test_what_needs_no_other_form_is_left_as_it_is_and_nothing_is_changed_in_place(extra: Any, arguments: Any) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    kept = {name: value for name, value in extra.items() if value is not None}
    given_message = {**extra, "role": "user", "content": "x", "tool_calls": calls}
    before = copy.deepcopy(given_message)
    (once,) = normalised([given_message], lambda role: True, ())
    assert given_message == before
    assert once == {**kept, "role": "user", "content": "x", "tool_calls": calls}
    as_text = {**given_message, "tool_calls": [{"function": {"name": "f", "arguments": json.dumps(arguments)}}]}
    (other,) = normalised([as_text], lambda role: True, ())
    assert other == once
    assert normalised([other], lambda role: True, ()) == [once]
