"""What a chat template is written with is what it has in transformers: each filter, test, global and method."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b <i>&amp;</i>\n c"}]
DATA: dict[str, Any] = {
    "text": "Hello, <b>wörld</b> & 'all'\tof you\nhttp://a.bc/d?e=f (see me@x.org)",
    "words": ["b", "A", "c", "a", "b"],
    "numbers": [3, 1, 2.5, -4, True],
    "pairs": {"b": 1, "a": [2, None], "c": {"d": "é"}},
    "people": [{"name": "Jo", "age": 3, "x": {"y": 1}}, {"name": "Al", "age": 2, "x": {"y": 2}}],
    "nothing": None,
}
FILTERS: dict[str, str] = {
    "abs": "-3|abs",
    "attr": "text|attr('upper') is defined ~ (pairs|attr('b') is defined) ~ (text|attr('__class__') is defined)",
    "batch": "words|batch(2)|list ~ words|batch(3, 'x')|list",
    "capitalize": "text|capitalize",
    "center": "'a'|center(9) ~ ('b'|center|length)",
    "count": "words|count",
    "d": "missing|d('x') ~ ''|d('y', true)",
    "default": "missing|default('x') ~ nothing|default('y') ~ nothing|default('z', true)",
    "dictsort": "pairs|dictsort ~ "
    "{'b': 1, 'A': 3}|dictsort(true) ~ {'b': 1, 'a': 3}|dictsort(by='value', reverse=true)",
    "e": "text|e",
    "escape": "text|escape ~ ('<'|safe|escape)",
    "filesizeformat": "123456|filesizeformat ~ 99|filesizeformat ~ 123456789|filesizeformat(true)",
    "first": "words|first ~ []|first",
    "float": "'3.5'|float ~ 'x'|float(2.0)",
    "forceescape": "('<'|safe)|forceescape",
    "format": "'%s-%03d'|format('a', 7) ~ '%(a)s'|format(a=1) ~ ('<%s>'|safe)|format('<')",
    "groupby": "people|groupby('age') ~ people|groupby('z', default=1)|list ~ people|groupby('x.y')|map('first')|list",
    "indent": "text|indent ~ text|indent(2, true, true) ~ text|indent('> ')",
    "int": "'7'|int ~ 'x'|int(3) ~ 'ff'|int(base=16) ~ 3.9|int",
    "items": "pairs|items|list ~ missing|items|list",
    "join": "words|join ~ words|join('<') ~ people|join(', ', attribute='name') ~ [1, none]|join('-')",
    "last": "words|last",
    "length": "pairs|length",
    "list": "'abc'|list ~ pairs|list",
    "lower": "text|lower",
    "map": "words|map('upper')|list ~ people|map(attribute='name')|list ~ people|map(attribute='q', default=0)|list",
    "max": "numbers|max ~ words|max ~ words|max(case_sensitive=true) ~ people|max(attribute='age')",
    "min": "numbers|min ~ words|min",
    "pprint": "pairs|pprint ~ ([text] * 3)|pprint ~ text|pprint ~ [[[words * 9]]]|pprint",
    "random": "words|random ~ words|random ~ text|random",
    "reject": "numbers|reject('odd')|list ~ ['', 'a']|reject|list",
    "rejectattr": "people|rejectattr('age', 'eq', 2)|list",
    "replace": "text|replace('l', 'LL') ~ text|replace('l', '', 1) ~ 12|replace(1, 2) ~ ('<'|safe)|replace('<', '>')",
    "reverse": "'abc'|reverse ~ words|reverse|list",
    "round": "2.567|round ~ 2.567|round(2) ~ 2.1|round(0, 'ceil') ~ 2.9|round(method='floor') ~ 55|round(-1)",
    "safe": "'<'|safe ~ ('<'|safe + '<')",
    "select": "numbers|select('odd')|list ~ numbers|select('>', 2)|list ~ [0, 1]|select|list",
    "selectattr": "people|selectattr('age', '>', 2)|list ~ people|selectattr('x.y')|list",
    "slice": "words|slice(2)|list ~ words|slice(3, 'x')|list",
    "sort": "words|sort ~ words|sort(true, true) ~ people|sort(attribute='age') ~ people|sort(attribute='x.y,age')",
    "string": "3|string ~ pairs|string",
    "striptags": "text|striptags ~ ('<a>b<!-- c --> d'|safe)|striptags",
    "sum": "numbers|sum ~ people|sum('age') ~ people|sum(attribute='age', start=4) ~ [[1], [2]]|sum(start=[])",
    "title": 'text|title ~ "it\'s a-b (c"|title',
    "tojson": "pairs|tojson ~ pairs|tojson(indent=2) ~ pairs|tojson(ensure_ascii=true, sort_keys=true) ~ "
    "pairs|tojson(separators=(',', ':')) ~ text|tojson ~ pairs|tojson(true, '--', [';', '=']) ~ (1, 2)|tojson",
    "trim": "'  a '|trim ~ 'xxaxx'|trim('x')",
    "truncate": "text|truncate(12) ~ text|truncate(12, true, '!', 0) ~ 'abcd'|truncate(3, leeway=0)",
    "unique": "words|unique|list ~ words|unique(true)|list ~ people|unique(attribute='age')|list",
    "upper": "text|upper",
    "urlencode": "text|urlencode ~ {'a b': 'é&'}|urlencode ~ [['a', 1]]|urlencode",
    "urlize": "text|urlize ~ text|urlize(8, true, '_blank', 'x') ~ 'ftp://a'|urlize(extra_schemes=['ftp://'])",
    "wordcount": "text|wordcount ~ ''|wordcount",
    "wordwrap": "text|wordwrap(9) ~ text|wordwrap(5, false) ~ text|wordwrap(4, true, '|', false) ~ text|wordwrap",
    "xmlattr": "{'a': 1, 'b': none, 'c': '<'}|xmlattr ~ {'a': missing}|xmlattr(false)",
}
TESTS: dict[str, str] = {
    "boolean": "[true is boolean, 1 is boolean]",
    "callable": "[text.upper is callable, 1 is callable, range is callable]",
    "defined": "[text is defined, missing is defined, text.foo is defined]",
    "divisibleby": "[6 is divisibleby 3, 6 is divisibleby(4)]",
    "escaped": "['a'|safe is escaped, 'a' is escaped]",
    "even": "[2 is even, 3 is even]",
    "false": "[false is false, 0 is false]",
    "filter": "['upper' is filter, 'shout' is filter]",
    "float": "[1.5 is float, 1 is float]",
    "in": "[1 is in [1], 'x' is in 'y', 'b' is in pairs]",
    "integer": "[1 is integer, true is integer, 1.0 is integer]",
    "iterable": "[text is iterable, 1 is iterable, pairs is iterable]",
    "lower": "['a' is lower, 'A' is lower]",
    "mapping": "[pairs is mapping, words is mapping]",
    "none": "[nothing is none, 0 is none]",
    "number": "[1 is number, '1' is number, true is number]",
    "odd": "[3 is odd, 2 is odd]",
    "sameas": "[true is sameas true, 1 is sameas 1.0]",
    "sequence": "[text is sequence, 1 is sequence, pairs is sequence]",
    "string": "[text is string, 1 is string, ('a'|safe) is string]",
    "test": "['odd' is test, 'queer' is test]",
    "true": "[true is true, 1 is true]",
    "undefined": "[missing is undefined, text is undefined]",
    "upper": "['A' is upper, 'a' is upper]",
    **{name: f"[2 is {name} 1, 1 is {name} 1, 'a' is {name}('b')]" for name in (
        "eq", "equalto", "ge", "greaterthan", "gt", "le", "lessthan", "lt", "ne",
    )},
    **{name: f"[[1, 2]|select('{name}', 2)|list, words|select('{name}', 'b')|list]" for name in (
        "==", "!=", "<", "<=", ">", ">=",
    )},
}  # fmt: skip
GLOBALS: dict[str, str] = {
    "range": "range(3)|list ~ range(2, 9, 3)|list ~ range(4) ~ range(5).index(3) ~ range(5).count(9) ~ range(5).stop",
    "dict": "dict(a=1) ~ dict({'b': 2}, c=3) ~ dict([('d', 4)]) ~ dict.fromkeys(['a', 'b'], 1) ~ dict.fromkeys('xy')",
    "namespace": "namespace(a=1) ~ namespace({'b': 2}, c=3).b ~ [namespace(x=[namespace()])] ~ namespace(self=1).self",
    "cycler": "[cycler('a', 'b')]|map(attribute='items')|list ~ cycler('a').next() ~ cycler('a', 'b').current",
    "joiner": "joiner()() ~ '|' ~ joiner('-').sep",
    "lipsum": "lipsum() ~ lipsum(2, false, 3, 5) ~ lipsum(n=1, min=2, max=4)",
    "raise_exception": "1 if text else raise_exception('no')",
    "strftime_now": "strftime_now('%Y-%m-%d') ~ strftime_now('%d %b %Y')",
}
METHODS: dict[type, dict[str, str]] = {
    str: {
        "capitalize": "text.capitalize()",
        "casefold": "'Straße'.casefold()",
        "center": "'a'.center(7, '*')",
        "count": "text.count('l') ~ text.count('l', 3)",
        "encode": "'é'.encode() ~ 'é'.encode('utf-16-le')",
        "endswith": "text.endswith(')') ~ text.endswith(('x', ')'))",
        "expandtabs": "text.expandtabs() ~ 'a\\tb'.expandtabs(tabsize=3)",
        "find": "text.find('w') ~ text.find('q')",
        "format": "'{0} {1} {a!r:>5}'.format(1, 2, a='x')",
        "format_map": "'{a}{b[0]}'.format_map({'a': 1, 'b': [2]})",
        "index": "text.index('w')",
        "join": "'-'.join(words) ~ ', '.join(pairs) ~ ('<'|safe).join(['<', '>'|safe])",
        "ljust": "'a'.ljust(5, '.')",
        "lstrip": "'xxa'.lstrip('x') ~ ' a'.lstrip()",
        "maketrans": "'abc'.maketrans('ab', 'xy', 'c') ~ ''.maketrans({'a': 'long'})",
        "partition": "text.partition(' ')",
        "removeprefix": "text.removeprefix('Hello')",
        "removesuffix": "text.removesuffix(')')",
        "replace": "text.replace('l', 'LL') ~ text.replace('l', '', 1) ~ ('a'|safe).replace('a', '<')",
        "rfind": "text.rfind('l')",
        "rindex": "text.rindex('l')",
        "rjust": "'a'.rjust(5)",
        "rpartition": "text.rpartition(' ')",
        "rsplit": "text.rsplit(' ', 1) ~ text.rsplit() ~ text.rsplit(sep=',', maxsplit=1)",
        "rstrip": "'a  '.rstrip() ~ 'abb'.rstrip('b')",
        "split": "text.split() ~ text.split('l') ~ text.split(maxsplit=1) ~ text.split(sep='l')",
        "splitlines": "text.splitlines() ~ text.splitlines(true) ~ text.splitlines(keepends=true)",
        "startswith": "text.startswith('He') ~ text.startswith('lo', 3)",
        "strip": "'xax'.strip('x')",
        "swapcase": "text.swapcase()",
        "title": "text.title()",
        "translate": "'abc'.translate({97: 'long', 98: none}) ~ 'abc'.translate('abc'.maketrans('a', 'z'))",
        "zfill": "'-7'.zfill(5)",
        **{name: f"text.{name}() ~ 'ab'.{name}() ~ '12'.{name}() ~ ' '.{name}()" for name in (
            "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric",
            "isprintable", "isspace", "istitle", "isupper", "lower", "upper",
        )},
    },
    list: {"copy": "words.copy()", "count": "words.count('b')", "index": "words.index('c') ~ words.index('b', 1)"},
    tuple: {"count": "(1, 2, 1).count(1)", "index": "(1, 2).index(2)"},
    dict: {
        "copy": "pairs.copy()",
        "fromkeys": "{}.fromkeys(words, 1) ~ pairs.fromkeys('ab')",
        "get": "pairs.get('b') ~ pairs.get('z') ~ pairs.get('z', 3)",
        "items": "pairs.items() ~ pairs.items()|list",
        "keys": "pairs.keys() ~ pairs.keys().isdisjoint(['b']) ~ pairs.keys()|first",
        "values": "pairs.values()|list",
    },
    int: {
        "as_integer_ratio": "(6).as_integer_ratio()",
        "bit_count": "(6).bit_count()",
        "bit_length": "(6).bit_length()",
        "conjugate": "(6).conjugate()",
        "denominator": "(6).denominator",
        "from_bytes": "(0).from_bytes('a'.encode(), 'big')",
        "imag": "(6).imag",
        "is_integer": "(6).is_integer()",
        "numerator": "(6).numerator",
        "real": "(6).real",
        "to_bytes": "(6).to_bytes(2, 'big') ~ (6).to_bytes(length=3, byteorder='little')",
    },
    float: {
        "as_integer_ratio": "(1.5).as_integer_ratio()",
        "conjugate": "(1.5).conjugate()",
        "from_number": "(1.5).from_number(2)",
        "fromhex": "(0.5).fromhex('0x1.8p0')",
        "hex": "(1.5).hex()",
        "imag": "(1.5).imag",
        "is_integer": "(1.5).is_integer() ~ (2.0).is_integer()",
        "real": "(1.5).real",
    },
    bytes: {
        "count": "raw.count('b'.encode())",
        "decode": "raw.decode() ~ raw.decode('latin-1')",
        "endswith": "raw.endswith('c'.encode())",
        "expandtabs": "raw.expandtabs(2)",
        "find": "raw.find('b'.encode())",
        "fromhex": "raw.fromhex('6162')",
        "hex": "raw.hex() ~ raw.hex('-', 2)",
        "index": "raw.index('b'.encode())",
        "join": "raw.join(['x'.encode(), 'y'.encode()])",
        "maketrans": "raw.maketrans('a'.encode(), 'b'.encode())|length",
        "partition": "raw.partition('b'.encode())",
        "removeprefix": "raw.removeprefix('a'.encode())",
        "removesuffix": "raw.removesuffix('c'.encode())",
        "replace": "raw.replace('b'.encode(), 'xyz'.encode())",
        "rfind": "raw.rfind('b'.encode())",
        "rindex": "raw.rindex('b'.encode())",
        "rpartition": "raw.rpartition('b'.encode())",
        "startswith": "raw.startswith('a'.encode())",
        "translate": "raw.translate(raw.maketrans('a'.encode(), 'z'.encode()))",
        "zfill": "raw.zfill(9)",
        **{name: f"raw.{name}(9)" for name in ("center", "ljust", "rjust")},
        **{name: f"raw.{name}()" for name in (
            "capitalize", "isalnum", "isalpha", "isascii", "isdigit", "islower", "isspace", "istitle", "isupper",
            "lower", "lstrip", "rsplit", "rstrip", "split", "splitlines", "strip", "swapcase", "title", "upper",
        )},
    },
    range: {"count": "range(9).count(3)", "index": "range(9).index(3)", "start": "range(9).start",
            "step": "range(9).step", "stop": "range(9).stop"},
}  # fmt: skip
STATEMENTS = {
    "break and continue": "{% for a in range(9) %}{% if a == 2 %}{% continue %}{% endif %}{% if a > 4 %}{% break %}"
    "{% endif %}{{ a }}{% endfor %}",
    "generation": "{% generation %}{% set inner = 1 %}said{{ text }}{% endgeneration %}{{ inner is defined }}",
    "loop": "{% for w in words %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}"
    "{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.depth }}"
    "{{ loop.depth0 }}{{ loop.cycle('x', 'y') }}{{ loop.changed(w|lower) }}{% endfor %}",
    "a cycler": "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{{ c.next() }}{{ c.reset() }}"
    "{{ c.current }}{{ c.pos }}",
    "a joiner": "{% set j = joiner('; ') %}{% for w in words %}{{ j() }}{{ w }}{% endfor %}",
    "namespaces in a list": "{% set all = namespace(of=[]) %}{% for w in words %}{% set all.of = all.of + "
    "[namespace(word=w, n=loop.index)] %}{% endfor %}{% for one in all.of %}{% set one.n = one.n * 2 %}{% endfor %}"
    "{% for one in all.of %}{{ one.word }}{{ one.n }}{% endfor %}{{ all.of|map(attribute='n')|list }}"
    "{{ all.of|length }}",
    "namespaces in a mapping": "{% set by = {'a': namespace(n=1)} %}{% set one = by['a'] %}{% set one.n = 5 %}"
    "{{ by.a.n }}{{ by }}",
    "a namespace in itself": "{% set one = namespace(n=1) %}{% set one.self = one %}{{ one.self.self.n }}"
    "{% set one.all = [one] %}{{ one.all[0].n }}",
    "a namespace that changes in a list": "{% set one = namespace(n='a') %}{% set all = [one] %}{{ all }}"
    "{% set one.n = 'longer' %}{{ all }}{{ one }}{{ all ~ one }}",
    "a filter block": "{% filter upper|replace('A', 'b') %}{{ text }}{% endfilter %}",
    "a call block": "{% macro m(x) %}[{{ caller(x) }}]{% endmacro %}{% call(y) m(3) %}{{ y }}{% endcall %}",
    "bytes": "{{ 'a'.encode() + 'b'.encode() }}{{ 'ab'.encode() * 2 }}{{ 'a%s'.encode() % 'b'.encode() }}",
    "operators": "{{ 7 // 2 }}{{ 7 / 2 }}{{ 7 % 4 }}{{ 2 ** 9 }}{{ -3 }}{{ +3 }}{{ 'ab' * 2 }}{{ [1] * 2 }}"
    "{{ (1,) * 2 }}"
    "{{ 1 ~ 'a' }}{{ '%s' % text }}{{ [1] + [2] }}{{ (1,) + (2,) }}{{ 1 in [1] }}{{ 1 not in [1] }}{{ not 1 }}",
    "slices": "{{ words[1:] }}{{ words[::-1] }}{{ text[-3:] }}{{ words[-1] }}{{ text[1] }}{{ (1, 2, 3)[:2] }}",
    "tests of messages": "{{ messages[0] is mapping }}{{ messages is sequence }}{{ messages[1].content is string }}",
}  # fmt: skip
EXAMPLES = {list: [], tuple: (), dict: {}, int: 1, float: 1.0, bytes: b"", str: "", range: range(1)}


def theirs() -> ImmutableSandboxedEnvironment:
    """The environment of the installed transformers."""
    module = pytest.importorskip("transformers.utils.chat_template_utils")
    environment = module._compile_jinja_template("x").environment
    assert isinstance(environment, ImmutableSandboxedEnvironment)
    return environment


def check(source: str) -> str:
    """Both render `source` to the same text, which is returned."""
    whole = "{% set raw = 'abc'.encode() %}" + source
    random.seed(7)
    expected = theirs().from_string(whole).render(messages=MESSAGES, **DATA)
    random.seed(7)
    rendered = ChatTemplate(whole, "mine").render(MESSAGES, add_generation_prompt=False, template_variables=DATA)
    assert rendered == expected
    return rendered


def offered(kind: type) -> set[str]:
    """The attributes of a plain value that the sandbox of transformers lets a template use."""
    environment, value = theirs(), EXAMPLES[kind]
    names = {name for name in dir(kind) if not name.startswith("_")}
    return {name for name in names if environment.is_safe_attribute(value, name, getattr(value, name))}


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_means_what_it_means_in_transformers(name: str) -> None:
    for part in FILTERS[name].split(" ~ "):
        check(f"{{{{ {part} }}}}")


@pytest.mark.parametrize("name", TESTS)
def test_each_test_means_what_it_means_in_transformers(name: str) -> None:
    check(f"{{{{ {TESTS[name]} }}}}")


@pytest.mark.parametrize("name", GLOBALS)
def test_each_global_means_what_it_means_in_transformers(name: str) -> None:
    for part in GLOBALS[name].split(" ~ "):
        check(f"{{{{ {part} }}}}")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in METHODS for name in METHODS[kind]])
def test_each_method_means_what_it_means_in_transformers(kind: type, name: str) -> None:
    if not hasattr(kind, name):
        pytest.skip(f"this Python's {kind.__name__} has no {name}")
    for part in METHODS[kind][name].split(" ~ "):
        check(f"{{{{ {part} }}}}")


@pytest.mark.parametrize("name", STATEMENTS)
def test_each_statement_means_what_it_means_in_transformers(name: str) -> None:
    assert check(STATEMENTS[name])


def test_nothing_that_transformers_offers_is_left_out() -> None:
    environment = theirs()
    assert set(environment.filters) == set(FILTERS)
    assert set(environment.tests) == set(TESTS)
    assert set(environment.globals) == set(GLOBALS)
    assert {kind: offered(kind) - set(METHODS[kind]) for kind in METHODS} == {kind: set() for kind in METHODS}


def texts(cases: Iterable[str]) -> list[str]:
    return [f"{{{{ {case} }}}}" for case in cases]


@pytest.mark.parametrize(
    "source",
    texts([
        "','.join([1])", "text|format(1, a=2)", "['a']|sum(start='')", "['a', 1]|sum", "text.center()", "1|join",
        "text.replace('a')", "text|center('x')", "words|batch(2)|nope", "words|slice(0)|list", "text|wordwrap(0)",
        "'a'.to_bytes()", "words.append(1)", "pairs.update({})", "pairs.pop('a')", "words.sort()", "text.__class__.x",
        "text|attr('__class__')|length == 3 or missing.x.y", "'x'.join(3)", "pairs|xmlattr(3, 4)", "{'a b': 1}|xmlattr",
        "[namespace()]|tojson", "missing|tojson", "text.nope()", "3|items|list", "text % 3 % 'x'",
        "cycler()", "range(100001)|list", "namespace(1)", "words.index('zz')", "text|replace", "text|nope",
    ]),
)  # fmt: skip
def test_what_transformers_refuses_is_refused(source: str) -> None:
    with pytest.raises(Exception):  # noqa: B017 (whatever the oracle raises)
        theirs().from_string(source).render(messages=MESSAGES, **DATA)
    with pytest.raises((CheckpointError, RequestError)):
        ChatTemplate(source, "mine").render(MESSAGES, template_variables=DATA)
