"""A chat template renders as transformers renders it, and a hostile one ends in an error of ours, soon."""

from __future__ import annotations

import contextlib
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import TEMPLATE_BYTES, ChatTemplate
from slotwise.models.template_meter import MAX_STEPS, MAX_TEXT
from slotwise.models.template_sandbox import MeteredEnvironment

SHARED = Path(__file__).parents[2].parent / "shared" / "chat_templates"
NAMES = (
    "GLM-4.6", "HuggingFaceTB-SmolLM3-3B", "Qwen-Qwen2.5-7B-Instruct", "Qwen-Qwen3-0.6B", "Qwen3-Coder",
    "deepseek-ai-DeepSeek-V3.1", "google-gemma-2-2b-it", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407",
    "openai-gpt-oss-120b",
)  # fmt: skip
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "é"}, "n": {"type": "integer", "enum": [1, 2]}},
    "required": ["city"],
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": '<now> & "then"', "parameters": PARAMETERS}}
]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "P"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <there>\n"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi "}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>x</think>\n\nb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e🙂"},
    ],
    "tool call": [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "abcdefghi", "content": "sunny"},
        {"role": "user", "content": "ok"},
    ],
    "out of turn": [{"role": "assistant", "content": "x"}, {"role": "assistant", "content": "y"}],
}


def both(source: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str | None, str | None]:
    """What we render and what transformers renders; None where that raised (ours: a `RequestError`)."""
    compiled = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template(source)
    given_options = {"tools": None, "add_generation_prompt": True, **options}
    ours: str | None
    theirs: str | None
    try:
        ours = ChatTemplate(source, "template", SPECIAL).render(messages, **given_options)
    except RequestError:
        ours = None
    try:
        theirs = compiled.render(messages=messages, documents=None, **SPECIAL, **given_options)
    except Exception:  # whatever the oracle raises
        theirs = None
    return ours, theirs


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_real_templates_render_as_in_transformers(name: str, conversation: str) -> None:
    file = SHARED / f"{name}.jinja"
    if not file.exists():
        pytest.skip("the chat templates of real models are not beside this checkout")
    source, rendered = file.read_text("utf-8"), 0
    for options in (
        {},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"tools": TOOLS, "add_generation_prompt": False},
        {"enable_thinking": False},
    ):
        ours, theirs = both(source, CONVERSATIONS[conversation], **options)
        assert ours == theirs
        rendered += ours is not None
    assert rendered or conversation != "one"


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
    ours, theirs = both(source, CONVERSATIONS["turns"])
    assert ours == theirs


@settings(max_examples=100, deadline=None)
@given(contents=st.lists(st.text(max_size=20), max_size=5), prompt=st.booleans())
def test_any_contents_render_as_in_transformers(contents: list[str], prompt: bool) -> None:
    source = (
        "{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>\\n' }}{{ m.content|trim }}{{ m|tojson }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]
    ours, theirs = both(source, messages, add_generation_prompt=prompt)
    assert ours is not None
    assert ours == theirs


MEGABYTE = "{% set x = 'a' * 1000000 %}"
ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop that skips all": "{% for a in range(99999) %}{% for b in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "a loop over itself": "{% for a in range(9) recursive %}{{ loop(range(9)) if loop.depth < 12 }}{% endfor %}",
    "macros that double": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "endless recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "lists in a loop": "{% for i in range(999) %}{% set x = range(99999)|list %}{% endfor %}",
    "comparison": MEGABYTE + "{% for a in range(99999) %}{% if x ~ '' == x %}{% endif %}{% endfor %}",
    "equal test": MEGABYTE
    + "{% set y = x ~ '' %}{% for a in range(99999) %}{% if y is equalto x %}{% endif %}{% endfor %}",
    "membership": MEGABYTE + "{% for a in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "slices": MEGABYTE + "{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "methods": MEGABYTE + "{% for a in range(99999) %}{% set y = x.upper() %}{% endfor %}",
    "deep brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "deep ifs": "{% if a %}" * 2000 + "{% endif %}" * 2000,
    "deep loops": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "a long sum": "{{ " + " + ".join(["1"] * 5000) + " }}",
    "a long number": "{{ " + "9" * 5000 + " }}",
    "a long template": "x" * (TEMPLATE_BYTES + 1),
    "brief methods": MEGABYTE + "{% for a in range(99999) %}{% set y = x.count('b') %}{% endfor %}",
    "character test": MEGABYTE + "{% for a in range(99999) %}{% if x is lower %}{% endif %}{% endfor %}",
    "list doubling": "{% set x = [[1]] %}" + "{% set x = x + x %}" * 60,
}
HUGE = {
    "string times number": "{{ 'a' * 10000000000 }}",
    "number times string": "{{ 10000000000 * 'a' }}",
    "list times number": "{{ [1] * 10000000000 }}",
    "list of lists": "{{ ([[1] * 1000] * 1000000)|length }}",
    "power": "{{ 2 ** 5000000000 }}",
    "tower": "{{ (9 ** 999) ** 999 }}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "digits": MEGABYTE + "{{ x|int(base=16) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f'|format(1) }}",
    "percent many": MEGABYTE + "{{ ('%s' * 999) % (x,) }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format computed width": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format_map width": "{{ '{a:10000000000}'.format_map({'a': 1}) }}",
    "format many": MEGABYTE + "{{ ('{0}' * 999).format(x) }}",
    "concat doubling": "{% set x = 'aaaa' %}" + "{% set x = x ~ x %}" * 40,
    "plus doubling": "{% set x = 'aaaa' %}" + "{% set x = x + x %}" * 40,
    "nested doubling": "{% set x = [1] %}" + "{% set x = [x, x] %}" * 60,
    "mapping doubling": "{% set x = {'a': 1} %}" + "{% set x = {'a': x, 'b': x} %}" * 60,
    "varargs doubling": "{% set n = namespace(x=1) %}{% macro m() %}{% set n.x = varargs %}{% endmacro %}"
    + "{{ m(n.x, n.x) }}" * 60
    + "{{ n.x }}",
    "output": MEGABYTE + "{% for a in range(99999) %}{{ x }}{% endfor %}",
    "output of data": "{% for a in range(99999) %}" + "z" * 100_000 + "{% endfor %}",
    "a set block": MEGABYTE + "{% set y %}{% for a in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "a filter block": MEGABYTE + "{% filter upper %}{% for a in range(99999) %}{{ x }}{% endfor %}{% endfilter %}",
    "replace": MEGABYTE + "{{ x.replace('a', x) }}",
    "replace filter": MEGABYTE + "{{ x|replace('', x) }}",
    "join": MEGABYTE + "{{ x.join(['a'] * 999) }}",
    "join filter": MEGABYTE + "{{ (['a'] * 999)|join(x) }}",
    "sum of lists": "{{ ([[1] * 1000] * 1000)|sum(start=[]) }}",
    "indent": "{{ 'a\nb'|indent(1000000000) }}",
    "json indent": "{{ [1]|tojson(indent=1000000000) }}",
    "json separators": "{{ [1]|tojson(separators=('x' * 999, '')) }}",
    "split": "{% set x = 'a' * 9000000 %}{{ x.split('a') }}",
    "characters": "{% set x = 'a' * 9000000 %}{{ x|list }}",
    "round": "{{ 5|round(-1000000000) }}",
    "round up": "{{ 5|round(1000000000, 'ceil') }}",
    "date width": "{{ strftime_now('%1000000000d') }}",
    "date length": "{{ strftime_now('%A' * 1000) }}",
}
FORBIDDEN = {
    "class": "{{ ''.__class__.__mro__ }}",
    "class by key": "{{ ''['__class__']['__mro__'] }}",
    "class by filter": "{{ ''|attr('__class__') }}",
    "class by format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "globals of a method": "{{ namespace.__self__.meter }}",
    "frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a message": "{{ messages[0].update({'a': 1}) }}",
    "underscored namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "underscored namespace made": "{% set n = namespace(__class__=1) %}",
    "namespace in itself": "{% set n = namespace() %}{% set n.x = n %}",
    "namespace in a list": "{% set n = namespace() %}{% set n.x = [n] %}",
    "namespace printed": "{{ namespace(x=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from": "{% from '/etc/passwd' import x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "autoescape": "{% autoescape true %}{% endautoescape %}",
    "center": "{{ 'a'.center(10000000000) }}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "center by map": "{{ ['a']|map('center', 10000000000)|list }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000) }}",
    "encode": "{{ 'a'.encode() }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "cycler": "{{ cycler('a') }}",
    "the meter": "{{ 1|emit }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_would_not_end_is_stopped(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"^mine: the (chat )?template "):
        ChatTemplate(ENDLESS[name], "mine").render(HELLO)


@pytest.mark.parametrize("name", HUGE)
def test_a_value_that_would_not_fit_is_refused_before_it_is_made(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"the template (asks|builds|computes|formats|rounds|takes|writes)"):
            ChatTemplate(HUGE[name], "mine").render(HELLO)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_template_reaches_nothing_outside_its_data(name: str) -> None:
    with pytest.raises((CheckpointError, RequestError), match="template"):
        ChatTemplate(FORBIDDEN[name], "mine").render(HELLO)


def test_nothing_leaks_through_an_attribute_that_prints_as_nothing() -> None:
    source = "{{ ''['__class__'] }}{{ raise_exception.__globals__ }}{{ range.__self__ }}{{ messages.__class__ }}"
    assert ChatTemplate(source, "mine").render(HELLO) == ""


def test_the_limits_leave_room_for_long_chats() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% if loop.index0 < messages|length %}{{ m.role ~ m.content }}"
        "{% endif %}{% endfor %}{{ ns.n }}"
    )
    long = [{"role": "user", "content": "x" * 1000}] * 2000
    assert len(ChatTemplate(source, "mine").render(long)) == 2000 * 1004 + 4


@pytest.mark.parametrize(
    "body", ["{{ x }}", "z" * 10_000, "{% set y %}{{ x }}{% endset %}", "{% filter upper %}{{ x }}{% endfilter %}"]
)
def test_what_a_template_writes_is_bounded_apart_from_its_steps(body: str) -> None:
    source = "{% set x = 'z' * 10000 %}{% for a in range(9999) %}" + body + "{% endfor %}"
    with pytest.raises(CheckpointError, match="writes more than 10000000 characters"):
        ChatTemplate(source, "mine").render(HELLO)


def test_constants_are_not_computed_while_compiling() -> None:
    assert "bbbb" not in MeteredEnvironment().compile("{{ 'aaaa'|replace('a', 'b') }}", raw=True)


def test_one_render_spends_nothing_of_the_next() -> None:
    passes = MAX_STEPS // 5
    source = f"{{% for a in range(99) %}}{{% for b in range({passes // 99 // 2}) %}}{{% endfor %}}{{% endfor %}}done"
    template = ChatTemplate(source, "mine")
    assert [template.render(HELLO) for _ in range(5)] == ["done"] * 5


def test_work_is_counted_where_a_template_cannot_go_around_it() -> None:
    environment = MeteredEnvironment()
    source = "{% for a in range(10) %}{{ a }}{% endfor %}"
    assert environment.from_string(source).render() == "0123456789"
    first = environment.meter.steps
    assert environment.from_string(source).render() == "0123456789"
    assert environment.meter.steps == 2 * first > 20


STRINGS = st.sampled_from(
    ["x", "'ab'", "messages", "x * 99999", "x ~ x", "x[1:]", "[x, x]", "x|upper", "ns.v", "x + x"]
)
NODES = st.recursive(
    STRINGS.map(lambda e: f"{{{{ {e} }}}}") | STRINGS.map(lambda e: f"{{% set x = {e} %}}{{% set ns.v = x %}}"),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        inner.map(lambda body: f"{{% for i in range(99) %}}{body}{{% endfor %}}"),
        inner.map(lambda body: f"{{% if x %}}{body}{{% endif %}}"),
        inner.map(lambda body: f"{{% set y %}}{body}{{% endset %}}{{{{ y }}}}"),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(body=NODES)
def test_any_program_ends(body: str) -> None:
    try:
        text = ChatTemplate("{% set x = 'ab' %}{% set ns = namespace(v=x) %}" + body, "mine").render(HELLO)
    except (CheckpointError, RequestError):
        return
    assert len(text) <= MAX_TEXT


@settings(max_examples=200, deadline=None)
@given(
    source=st.text(max_size=60)
    | st.lists(
        st.sampled_from(["{{", "}}", "{%", "%}", "if", "for", "x", "in", "set", "endif", "|", "(", ")", "[", "'", "~"])
    ).map(" ".join)
)
def test_any_text_is_a_template_or_refused(source: str) -> None:
    with contextlib.suppress(CheckpointError, RequestError):
        assert isinstance(ChatTemplate(source, "mine").render(HELLO), str)


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
        ChatTemplate("x", "mine").render(HELLO, tools=[{"f": print}])
    with pytest.raises(RequestError, match="now is a object"):
        ChatTemplate("x", "mine").render(HELLO, now=object())


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
    "template", [3, {"default": "x"}, [{"name": "a", "template": "x"}], [{"name": "default"}], ["x"], "x" * 200_000]
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
