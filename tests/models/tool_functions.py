"""Functions as callers may hand them in for tools: `GOOD` have a schema, `BAD` have none."""

# ruff: noqa: UP006, UP007, UP045 (the old spellings of hints are what is tested)

import enum
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, Optional, Union


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
