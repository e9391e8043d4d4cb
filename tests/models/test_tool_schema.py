"""A Python function given as a tool has the schema that transformers makes of it, or is refused where that raises."""

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest
from packaging.version import Version

from slotwise.core.errors import RequestError
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.tool_schema import function_schema

from .tool_functions import BAD, GOOD, SINCE_5_23, Station, no_description, no_hint, nothing


def theirs(function: Any) -> Any:
    """The schema that the installed transformers makes."""
    old = Version(version("transformers")) < Version("5.23") if find_spec("transformers") else False
    if old and function in SINCE_5_23:
        pytest.skip("the installed transformers is older than the rules, which are those of 5.23")
    return pytest.importorskip("transformers.utils.chat_template_utils").get_json_schema(function)


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__qualname__)
def test_a_function_has_the_schema_that_transformers_makes(function: Any) -> None:
    ours, expected = function_schema(function), theirs(function)
    assert ours == expected
    rendered = ChatTemplate("{{ tools|tojson }}", "mine").render([{"role": "user", "content": "x"}], tools=[function])
    source = "{{ tools|tojson }}"
    compiled = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template(source)
    assert rendered == compiled.render(tools=[expected])  # the order of keys too


@pytest.mark.parametrize("function", BAD, ids=lambda function: function.__qualname__)
def test_a_function_without_a_schema_is_refused_by_name(function: Any) -> None:
    with pytest.raises(Exception):  # noqa: B017 (whatever the oracle raises)
        theirs(function)
    with pytest.raises(RequestError, match=f"the tool '{function.__name__}'"):
        function_schema(function)


def test_a_refusal_names_the_parameter_and_what_to_do() -> None:
    with pytest.raises(RequestError, match="'no_hint', parameter 'a': there is no type hint; add one, such as a: str"):
        function_schema(no_hint)
    with pytest.raises(
        RequestError, match="'no_description', parameter 'b': the docstring has no description; add 'b:"
    ):
        function_schema(no_description)


def test_a_schema_comes_out_as_it_went_in_beside_functions() -> None:
    schema = {"type": "function", "function": {"name": "f", "x": [1, None], "parameters": {}}}
    template = ChatTemplate("{% for t in tools %}{{ t|tojson }}\n{% endfor %}", "mine")
    rendered = template.render([{"role": "user", "content": "x"}], tools=[schema, nothing]).splitlines()
    assert rendered[0] == '{"type": "function", "function": {"name": "f", "x": [1, null], "parameters": {}}}'
    assert '"name": "nothing"' in rendered[1]


@pytest.mark.parametrize("tools", ["f", {"type": "function"}, [3], [None], ["f"], [Station], [len], 3])
def test_what_is_no_tool_is_refused(tools: Any) -> None:
    with pytest.raises(RequestError, match="tools"):
        ChatTemplate("x", "mine").render([{"role": "user", "content": "x"}], tools=tools)
