"""A chat template renders as transformers renders it; where it or its messages are wrong, the error says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import TEMPLATE_BYTES, ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hi"}]
TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "<think>x</think>\n\nb"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "e🙂"},
]


def both(
    source: str, messages: list[dict[str, Any]], *, tools: Any = None, add_generation_prompt: bool = True, **extra: Any
) -> tuple[str | None, str | None]:
    """What we render and what transformers renders; None where that raised (ours: a `RequestError`)."""
    compiled = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template(source)
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    ours: str | None
    theirs: str | None
    try:
        ours = ChatTemplate(source, "template", SPECIAL).render(messages, template_variables=extra, **options)
    except RequestError:
        ours = None
    try:
        theirs = compiled.render(messages=messages, documents=None, **SPECIAL, **options, **extra)
    except Exception:  # whatever the oracle raises
        theirs = None
    return ours, theirs


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}\n  {% if loop.first %}\nA{% endif %}\n{{ m.role }}{{ loop.index }}{% endfor %}\n",
        "{% for a in range(9) %}{% if a == 2 %}{% continue %}{% endif %}{% if a > 4 %}{% break %}{% endif %}{{ a }}"
        "{% endfor %}",
        "{% for a in range(9) if a is odd %}{{ a }}{% else %}none{% endfor %}",
        "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
        "{% macro m(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ m(1) }}"
        "{% call m(2) %}z{% endcall %}",
        "{% set ns = namespace(n=0, l=[]) %}{% for a in 'abc' %}{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [a] %}"
        "{% endfor %}{{ ns.n }}{{ ns.l }}",
        "{% set x %}a{{ 1 }}{% endset %}{{ x ~ 2 ~ none ~ x }}{{ x[1:] }}{{ x[0] }}{{ 'é'|tojson }}"
        "{{ '<'|tojson|safe }}",
        "{{ {'b': [1, none, true], 'a': '<&>'}|tojson }}{{ {'b': 1, 'a': 2}|tojson(indent=2, sort_keys=true) }}",
        "{{ ['b', 'a']|sort|join('-') }}{{ messages|map(attribute='role')|list }}{{ [1, 2]|sum }}{{ [3, 1]|max }}",
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ {'b': 1, 'a': 2}|dictsort }}",
        "{{ 'a b c'.split(' ', 1) }}{{ ' x '.strip() }}{{ 'aXa'.replace('a', 'bb') }}{{ 'a,b'|replace(',', ';') }}",
        "{{ '%s-%03d' % ('a', 7) }}{{ '%s'|format(3) }}{{ '{}:{:>4}'.format(1, 2) }}{{ 'a\nb'|indent(2) }}",
        "{{ 2 ** 10 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ 7 % 4 }}{{ -3 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 3.14159|round(2) }}",
        "{% generation %}{% set inner = 1 %}said{% endgeneration %}{{ inner is defined }}{{ nothing }}"
        "{{ nothing.x is defined }}",
        "{{ dict(a=1).items()|list }}{{ {'a': 1}.get('b', 2) }}{{ 'x' in 'xy' }}{{ 1 in [1] }}{{ 'A'|lower }}"
        "{{ 'a'|title }}",
        "{{ raise_exception('no') }}",
        "{{ nothing.x.y }}",
        "{{ 1 + 'a' }}",
        "{{ '<'|e + '<' }}{{ ('<'|safe) ~ '<' }}",
        "{{ bos_token }}{{ documents }}{{ tools }}{{ add_generation_prompt }}",
    ],
)  # fmt: skip
def test_what_templates_are_written_with_means_what_it_means_in_transformers(source: str) -> None:
    ours, theirs = both(source, TURNS)
    assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(st.text(max_size=20), min_size=1, max_size=5), prompt=st.booleans())
def test_any_contents_render_as_in_transformers(contents: list[str], prompt: bool) -> None:
    source = (
        "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>\\n' }}{{ m.content|trim }}{{ m|tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    ours, theirs = both(source, messages, add_generation_prompt=prompt)
    assert ours is not None
    assert ours == theirs


def test_a_broken_template_is_named_with_its_line() -> None:
    with pytest.raises(CheckpointError, match="mine: the chat template is broken at line 3: "):
        ChatTemplate("a\nb\n{% if %}", "mine").render(HELLO)
    with pytest.raises(CheckpointError, match=r"line 2: No filter named 'frob'"):
        ChatTemplate("\n{{ 1|frob }}", "mine").render(HELLO)


def test_a_refusal_of_the_template_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="refuses these messages: only users here"):
        ChatTemplate("{{ raise_exception('only users here') }}", "mine").render(HELLO)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list of mappings"),
        ([], "must have one message at least"),
        (HELLO[0], "must be a list of mappings"),
        (None, "must be a list of mappings"),
        (["hi"], r"messages\[0\] must be a mapping"),
        ([*HELLO, {"content": "x"}], r"messages\[1\] must have a 'role'"),
        ([{"role": 3, "content": "x"}], "must have a 'role'"),
        ([{"role": "user"}], "must have 'content'"),
        ([{"role": "user", "content": 3}], "must be text or a list of parts"),
        ([{"role": "user", "content": [object()]}], r"messages\[0\]\['content'\]\[0\] is a object; expected JSON"),
        ([{"role": "user", "content": "x", 3: 4}], "a key that is not a string"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        ChatTemplate("{{ messages }}", "mine").render(messages)


def test_data_nested_without_end_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(RequestError, match="nested more than"):
        ChatTemplate("x", "mine").render([{"role": "user", "content": loop}])
    with pytest.raises(RequestError, match="tools"):
        ChatTemplate("x", "mine").render(HELLO, tools=[{"f": object()}])
    with pytest.raises(RequestError, match=r"template_variables\['now'\] is a object"):
        ChatTemplate("x", "mine").render(HELLO, template_variables={"now": object()})


def test_templates_are_found_where_checkpoints_keep_them(tmp_path: Path) -> None:
    assert not ChatTemplate.load(tmp_path).has_chat_template
    with pytest.raises(RequestError, match="has no chat template"):
        ChatTemplate.load(tmp_path).render(HELLO)

    def config(template: object) -> None:
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(
                {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None, "chat_template": template}
            )
        )

    config("{{ bos_token }}inline{{ eos_token }}")
    assert ChatTemplate.load(tmp_path).render(HELLO) == "<s>inline</s>"
    config([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}])
    assert ChatTemplate.load(tmp_path).render(HELLO) == "default"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json{{ bos_token }}"}')
    assert ChatTemplate.load(tmp_path).render(HELLO) == "json<s>"
    (tmp_path / "chat_template.jinja").write_text("jinja{{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path).render(HELLO) == "jinjahi"
    assert ChatTemplate.load(tmp_path).origin.endswith("chat_template.jinja")


@pytest.mark.parametrize(
    "template",
    [3, {"default": 3}, [{"name": "a", "template": "x"}] * 2, [{"name": "default"}], ["x"], [[]], "x" * 200_000],
)
def test_a_template_of_another_kind_is_refused(tmp_path: Path, template: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: 'chat_template' (must be|has 200000)"):
        ChatTemplate.load(tmp_path)


def test_a_template_file_must_be_small_utf8_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(CheckpointError, match="expected UTF-8, found a bad byte at 1"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"a" * (TEMPLATE_BYTES + 1))
    with pytest.raises(CheckpointError, match="expected at most"):
        ChatTemplate.load(tmp_path)
