"""Waivers: failures of kernels that are known and tolerated, each with its reason.

Owns `Waiver` and the reader of waiver files. What always holds: a waiver cites a reason; it excuses a failure that it
names and nothing else, and it turns a pass into a failure, so that none outlives what it was for.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, fields
from pathlib import Path

from slotwise.core.errors import OptionError, nearest

try:
    import tomli
except ModuleNotFoundError:  # Python 3.11 and later carry the same parser as tomllib.
    import tomllib as tomli  # type: ignore[no-redef, unused-ignore]

CHECKS = ("oracle", "rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """What may fail, and why. `kernel`, `dtype`, `case` and `check` are patterns as a shell's, `*` for any."""

    op: str
    backend: str
    reason: str
    kernel: str = "*"
    dtype: str = "*"
    case: str = "*"
    check: str = "*"

    def covers(self, *, op: str, backend: str, kernel: str, dtype: str, case: str, check: str) -> bool:
        """Whether this waiver speaks of that check."""
        pairs = (
            (op, self.op),
            (backend, self.backend),
            (kernel, self.kernel),
            (dtype, self.dtype),
            (case, self.case),
            (check, self.check),
        )
        return all(fnmatch.fnmatchcase(value, pattern) for value, pattern in pairs)

    def __str__(self) -> str:
        named = [f"{f.name} {getattr(self, f.name)}" for f in fields(self) if f.name != "reason"]
        return ", ".join(part for part in named if not part.endswith(" *"))


def read_waivers(path: str | Path) -> tuple[Waiver, ...]:
    """The `[[waiver]]` tables of a TOML file.

    Raises OptionError for a file that cannot be read, an unknown key, or a waiver without op, backend or reason.
    """
    try:
        data = tomli.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise OptionError(f"waiver file {path} cannot be read: {error}") from error
    entries = data.pop("waiver", [])
    if data or not isinstance(entries, list):
        raise OptionError(f"waiver file {path}: expected [[waiver]] tables alone, found {', '.join(data) or 'waiver'}")
    return tuple(_waiver(entry, f"waiver file {path}, waiver {number}") for number, entry in enumerate(entries, 1))


def _waiver(entry: object, where: str) -> Waiver:
    if not isinstance(entry, dict):
        raise OptionError(f"{where}: expected a table, found {entry!r}")
    known = [f.name for f in fields(Waiver)]
    for name, value in entry.items():
        if name not in known:
            raise OptionError(f"{where}: key {name!r} is not known{nearest(name, known)}; there are {', '.join(known)}")
        if not isinstance(value, str) or not value.strip():
            raise OptionError(f"{where}: {name} must be text, is {value!r}")
    missing = [name for name in ("op", "backend", "reason") if name not in entry]
    if missing:
        raise OptionError(
            f"{where}: {', '.join(missing)} is missing; say what may fail, and why (an issue's address, say)"
        )
    if entry.get("check", "*") not in (*CHECKS, "*"):
        raise OptionError(f"{where}: check must be one of {', '.join(CHECKS)}, is {entry['check']!r}")
    return Waiver(**entry)
