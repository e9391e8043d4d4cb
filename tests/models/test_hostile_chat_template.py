"""Whatever a chat template does, it ends soon, in little memory, and reaches nothing but its data."""

from __future__ import annotations

import contextlib
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import TEMPLATE_BYTES, ChatTemplate
from slotwise.models.template_meter import MAX_STEPS, MAX_TEXT
from slotwise.models.template_sandbox import MeteredEnvironment

HELLO = [{"role": "user", "content": "hi"}]
MEGABYTE = "{% set x = 'a' * 1000000 %}"
ENDLESS = {
    "words broken": MEGABYTE + "{{ x|wordwrap(1) }}",
    "a word to link": "{% set x = ')' * 100000 %}{{ (x ~ 'x)')|urlize }}",
    "brackets": "{% set x = '<' * 1000000 %}{{ (x ~ '>')|striptags }}",
    "comments": "{% set x = '<!---->' * 100000 %}{{ (x|safe).striptags() }}",
    "what no range has": "{% for a in range(99999) %}{% if 'a' in range(99999) %}{% endif %}{% endfor %}",
    "what no range counts": "{% for a in range(99999) %}{% set y = range(99999).count('a') %}{% endfor %}",
    "lists added": "{% for a in range(99) %}{% set y = ([[1] * 9] * 9999)|sum(start=[]) %}{% endfor %}",
    "keys": "{% for a in range(999) %}{% set y = dict.fromkeys(range(99999)) %}{% endfor %}",
    "keys of a mapping": "{% for a in range(999) %}{% set y = {}.fromkeys(range(99999)) %}{% endfor %}",
    "a namespace that doubles": "{% set n = namespace(x='aaaa') %}"
    + "{% set n = namespace(x=[n, n]) %}" * 60
    + "{{ n }}",
    "a chain of namespaces": "{% set n = namespace(x=1) %}{% for a in range(99999) %}{% set n.x = namespace(x=n.x) %}"
    "{% endfor %}{{ n }}",
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
    "center": "{{ 'a'.center(10000000000) }}",
    "center filter": "{{ 'a'|center(10000000000) }}",
    "center by map": "{{ ['a']|map('center', 10000000000)|list }}",
    "center by attr": "{{ ('a'|attr('center'))(10000000000) }}",
    "center of bytes": "{{ 'a'.encode().center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ '\t'.expandtabs(1000000000) }}",
    "to_bytes": "{{ (5).to_bytes(1000000000) }}",
    "to_bytes by name": "{{ (5).to_bytes(length=1000000000) }}",
    "lipsum": "{{ lipsum(n=1000000) }}",
    "long lipsum": "{{ lipsum(n=1, min=1, max=100000000) }}",
    "translate": MEGABYTE + "{{ x.translate({97: 'b' * 1000}) }}",
    "bytes times number": "{{ 'a'.encode() * 10000000000 }}",
    "bytes percent": "{{ 'a%1000000000d'.encode() % 1 }}",
    "batch": "{{ [1]|batch(1000000000, 'x')|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "wordwrap": MEGABYTE + "{{ x|wordwrap(1, wrapstring=x) }}",
    "urlencode": MEGABYTE + "{{ x|urlencode }}",
    "urlize": "{% set x = 'http://a.bc ' * 100000 %}{{ x|urlize(rel='a' * 1000) }}",
    "pprint": "{% set n = namespace(x=['a' * 100000]) %}{% for i in range(200) %}{% set n.x = [n.x] %}{% endfor %}"
    "{{ n.x|pprint }}",
    "a list that grows behind its back": MEGABYTE + "{% set n = namespace(x=1) %}{% set l = [n] * 999 %}{{ l }}"
    "{% set n.x = x %}{{ l }}",
    "a namespace concatenated": MEGABYTE + "{% set n = namespace(x=1) %}{% set l = [n] * 999 %}{{ l ~ '' }}"
    "{% set n.x = x %}{{ l ~ '' }}",
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
    "class by format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "globals of a method": "{{ namespace.__self__.meter }}",
    "frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "mutation": "{{ messages.append(1) }}",
    "mutation of a message": "{{ messages[0].update({'a': 1}) }}",
    "underscored namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "underscored namespace made": "{% set n = namespace(__class__=1) %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}",
    "from": "{% from '/etc/passwd' import x %}",
    "extends": "{% extends '/etc/passwd' %}",
    "autoescape": "{% autoescape true %}{% endautoescape %}",
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
    source = "{{ ''['__class__'] }}{{ ''|attr('__class__') }}{{ dict._meter }}"
    source += "{{ raise_exception.__globals__ }}{{ range.__self__ }}{{ messages.__class__ }}"
    assert ChatTemplate(source, "mine").render(HELLO) == ""


def test_the_limits_leave_room_for_long_chats() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% if m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "{% endif %}{% endfor %}{% for m in messages %}{% if loop.index0 < messages|length %}{{ m.role ~ m.content }}"
        "{% endif %}{% endfor %}{{ ns.n }}"
    )
    long = [{"role": "user", "content": "x" * 1000}] * 2000
    assert len(ChatTemplate(source, "mine").render(long)) == 2000 * 1004 + 4


def test_a_long_conversation_may_be_looked_through_from_each_of_its_messages() -> None:
    source = (
        "{% for m in messages %}{% for n in messages[loop.index:] %}{% if n.role == 'tool' and n.content == m.role %}"
        "{{ n.content }}{% endif %}{% endfor %}{% endfor %}done"
    )
    assert ChatTemplate(source, "mine").render([{"role": "user", "content": "x"}] * 600) == "done"
    alone = source.replace("messages", "range(600)").replace("[loop.index:]", "")
    with pytest.raises(CheckpointError, match="may loop without end"):
        ChatTemplate(alone, "mine").render(HELLO)


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
