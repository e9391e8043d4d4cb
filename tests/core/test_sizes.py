"""A size that is accepted means one number of bytes; anything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import OptionError
from slotwise.core.sizes import UNITS, parse_size, size

MEANT = {
    "24GiB": 24 * 2**30,
    "24GB": 24 * 10**9,
    "512MiB": 512 * 2**20,
    "1.5 KiB": 1536,
    "4096": 4096,
    4096: 4096,
    "7B": 7,
    "0.25KB": 250,
}
REFUSED = [
    ("24gib", "did you mean 'GiB'"),
    ("24G", "no unit 'G'"),
    ("24 GiB free", "is '24 GiB free'"),
    ("", "is ''"),
    ("-1GiB", "is '-1GiB'"),
    ("1e9", "is '1e9'"),
    ("0", "whole number of bytes from 1"),
    ("0.3B", "'0.3B' is 3/10"),
    ("9999999TiB", "from 1 to"),
    (0, "from 1"),
    (-5, "is -5"),
    (1.5, "is 1.5"),
    (True, "is True"),
    (None, "is None"),
    ("٣GiB", "is '٣GiB'"),
]


@pytest.mark.parametrize(("text", "meant"), MEANT.items())
def test_a_size_means_one_number_of_bytes(text: Any, meant: int) -> None:
    assert parse_size(text) == meant


@pytest.mark.parametrize(("value", "said"), REFUSED)
def test_what_is_no_size_is_refused_by_name(value: Any, said: str) -> None:
    with pytest.raises(OptionError, match=r"^budget ") as caught:
        parse_size(value, "budget")
    assert said in str(caught.value)
    assert "GiB" in str(caught.value) or "whole number of bytes" in str(caught.value)


@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_a_number_with_a_unit_is_that_many_of_it(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == parse_size(f"{number} {unit}") == number * UNITS[unit]


def test_bytes_are_printed_in_the_unit_that_people_use() -> None:
    assert [size(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 MiB",
        "3.00 GiB",
    ]
