"""Amounts of memory, as people write and read them.

Owns `parse_size` and `size`. What always holds: a size that is accepted means one number of bytes; anything else is an
OptionError that names what was given and the forms that there are.
"""

from __future__ import annotations

import re
from fractions import Fraction

from slotwise.core.errors import OptionError, nearest

UNITS = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_MOST = 2**60
_FORM = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,12})?)(?: ?([A-Za-z]+))?")


def parse_size(value: int | str, name: str = "memory") -> int:
    """Bytes of `24GiB` (2**30 each), `24GB` (10**9 each), `1.5GiB`, or of a plain number; `name` is what errors say.

    Raises OptionError for anything else, a fraction of a byte included.
    """
    forms = f"a number of bytes, or one with a unit, as 24GiB, 24GB or 512MiB; units are {', '.join(UNITS)}"
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise OptionError(f"{name} must be {forms}; is {value!r:.80}")
    found = _FORM.fullmatch(str(value).strip())
    if found is None:
        raise OptionError(f"{name} must be {forms}; is {value!r:.80}")
    number, unit = found.groups()
    if unit is not None and unit not in UNITS:
        same = [known for known in UNITS if known.casefold() == unit.casefold()]
        hint = f" (did you mean {same[0]!r}?)" if same else nearest(unit, UNITS)
        raise OptionError(f"{name} {value!r:.80}: there is no unit {unit!r}{hint}; it must be {forms}")
    amount = Fraction(number) * UNITS[unit or "B"]
    if amount.denominator != 1 or not 1 <= amount <= _MOST:
        raise OptionError(f"{name} must be a whole number of bytes from 1 to {_MOST}, {value!r:.80} is {amount}")
    return int(amount)


def size(nbytes: int) -> str:
    """Bytes as people write them: `5.4 MiB`."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
