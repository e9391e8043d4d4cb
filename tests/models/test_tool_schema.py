"""A Python function given as a tool has the schema that transformers makes of it, or is refused where that raises."""

# ruff: noqa: UP006, UP007, UP045 (the old spellings of hints are what is tested)

import enum
import typing
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Annotated, Any, Literal, Optional, Union

import pytest
from packaging.version import Version

from slotwise.core.errors import RequestError
from slotwise.models.chat_template import ChatTemplate
from slotwise.models.tool_schema import function_schema


class Size(enum.Enum):
    SMALL = "s"
    LARGE = 2


class Colour(str, enum.Enum):
    RED = "red"


class Empty(enum.Enum):
    pass


class Odd(enum.Enum):
    A = (1, 2)


def plain(city: str, days: int, scale: float, dry: bool):
    """The weather of a city.

    Args:
        city: The city, as "Paris, France"
        days: How many days
        scale: A factor
        dry: Whether to leave out rain
    """


def defaults(city: str, unit: str = "C", n: int | None = None, *, deep: bool = False, **more: int) -> str:
    """The weather.

    Goes on: over lines, with words: like these.

    Args:
        city: A city
            that goes on here
          and here: with a colon
        unit: The unit (choices: ["C", "F "])
        n: (choices: [1, 2])
        deep:
            on a line of its own
        more: Others

    Returns:
        The weather
        in words: some.

    Raises:
        ValueError: if not
    """
    return city


def nothing():
    """Nothing."""


def no_arguments() -> dict[str, Any]:
    """What time it is.

    Returns:
        The time
    """
    return {}


def unions(a: Union[int, str], b: int | float | None, c: Optional[str], d: list[int] | str, e: None, f: list | tuple):
    """Unions.

    Args:
        a: a
        b: b
        c: c
        d: d
        e: e
        f: f
    """


def containers(
    a: list, b: list[str], c: dict, d: dict[str, list[int]], e: tuple[int, str], f: typing.List,
    g: typing.Dict[str, Any], h: tuple, i: typing.Tuple, j: list[dict[str, int | None]], k: Any,
):  # fmt: skip
    """Containers.

    Args:
        a: a
        b: b
        c: c
        d: d
        e: e
        f: f
        g: g
        h: h
        i: i
        j: j
        k: k
    """


def values(a: Literal["x", "y"], b: Literal[1, "x", None], c: Size, d: Colour, e: list[Size], f: Optional[Literal[1]]):
    """Values.

    Args:
        a: a
        b: b
        c: c
        d: d
        e: e
        f: f (Choices: [1])
    """


def annotated(a: Annotated[int, "meters"], b: "str", c: "Optional[list[int]]" = None) -> "object":
    """Annotated.
    Args:
      a: a
      b: b: c (d): e
      c: c

      after a gap
    Returns: none
    """


def untold_return(a: int) -> Callable[[], int]:
    """A return without a schema.

    Args:
        a: a
    """
    return lambda: a


def tabs(a: int, b: int):
    """Tabs.

    Args:
    \ta: first
    \t\tgoes on: here
    \tb: second
    """


def with_code(code: str):
    """Run code. Args are given. Returns nothing.

    Args:
        code: Such as {"a": 1}, <b>, "é", 'q', a\\b (like this)
    """


def more_described(a: int):
    """Describes what is not there.

    Args:
        a: a
        b: b
    """


def raises_only(a: int):
    """Has two sections.

    Args:
        a: a

    Raises:
        ValueError: never
    """


def sections_in_text(a: int):
    """See Args: below.

    Args:
        a: a
    """


class Station:
    def read(self, sensor: str, self_test: bool = False) -> float:
        """Read a sensor.

        Args:
            sensor: Its name
            self_test: Whether to test it
        """
        return 0.0

    @classmethod
    def made(cls, n: int):
        """Make some.

        Args:
            n: How many
        """

    @staticmethod
    def fixed(n: int):
        """Make it fixed.

        Args:
            n: How many
        """


GOOD = [
    plain, defaults, nothing, no_arguments, unions, containers, values, annotated, untold_return, tabs, with_code,
    more_described, raises_only, sections_in_text, Station().read, Station.read, Station.made, Station.fixed,
]  # fmt: skip


def undocumented(a: int):
    pass


def blank(a: int):
    """ """


def no_hint(a):
    """A.

    Args:
        a: a
    """


def no_description(a: int, b: int):
    """A.

    Args:
        a: a
    """


def custom(a: Station):
    """A.

    Args:
        a: a
    """


def one_entry(a: tuple[int]):
    """A.

    Args:
        a: a
    """


def any_number(a: tuple[int, ...]):
    """A.

    Args:
        a: a
    """


def callback(a: Callable[[], int]):
    """A.

    Args:
        a: a
    """


def empty_values(a: Empty):
    """A.

    Args:
        a: a
    """


def odd_values(a: Odd):
    """A.

    Args:
        a: a
    """


def bytes_literal(a: Literal[b"x"]):
    """A.

    Args:
        a: a
    """


def unknown_name(a: "Nowhere"):  # noqa: F821
    """A.

    Args:
        a: a
    """


def bad_choices(a: str):
    """A.

    Args:
        a: a (choices: [x, y])
    """


def rest(*args, **kwargs):
    """A.

    Args:
        args: a
        kwargs: b
    """


def hinted_self(self: int):
    """A.

    Args:
        other: a
    """


BAD = [
    undocumented, blank, no_hint, no_description, custom, one_entry, any_number, callback, empty_values, odd_values,
    bytes_literal, unknown_name, bad_choices, rest, hinted_self,
]  # fmt: skip


SINCE_5_23 = (values, annotated, untold_return, custom, empty_values, odd_values)
"""Where the rules were others before transformers 5.23."""


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
