"""Block sizes, warps and pipeline stages: the table, and how a call finds its entry.

Owns `Configuration` and `configure`. What always holds: the table is the file `configurations.toml` beside this module,
with the user's own file, which `slotwise tune` writes, asked first; an entry names only sizes that change neither
memory nor the order of a sum. Nothing is measured while tokens are generated.

A table is a kernel's name; in it, a list per GPU generation (`any` for those without their own, `interpreter` for the
CPU). The first entry whose `max_*` limits all hold is used; an entry without limits holds always.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli
import torch

from slotwise.core.errors import BackendError

GENERATIONS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
INTERPRETER = "interpreter"
ANY = "any"
TABLE = Path(__file__).with_name("configurations.toml")
_LIMIT = "max_"


@dataclass(frozen=True)
class Configuration:
    """One entry of the table `kernel`: compile-time constants by name, warps a program, pipeline stages."""

    kernel: str
    num_warps: int
    num_stages: int
    constants: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def block(self) -> Mapping[str, int]:
        """The constants, for those who compute a grid."""
        return self.constants

    def __str__(self) -> str:
        sizes = " ".join(f"{name.lower()}={value}" for name, value in self.constants.items())
        return " ".join(filter(None, (self.kernel, sizes, f"warps={self.num_warps} stages={self.num_stages}")))


@functools.cache
def generation_of(device: torch.device) -> str:
    """The newest of our generations that is not newer than `device`; raises BackendError below sm_80."""
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    found = [name for name in GENERATIONS if capability(name) <= 10 * major + minor]
    if not found:
        raise BackendError(f"{device} is sm_{major}{minor}; cuda_triton needs sm_80 (Ampere) or newer")
    return found[-1]


def capability(generation: str) -> int:
    """`sm_90` -> 90."""
    return int(generation.removeprefix("sm_"))


def user_file() -> Path:
    """Where the user's own entries are: `slotwise/cuda_triton.toml` in the folder for configuration files."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "slotwise" / "cuda_triton.toml"


def configure(kernel: str, generation: str, **facts: int) -> Configuration:
    """The entry of `kernel` for a call with these facts (rows, outputs, ...); raises BackendError when none fits."""
    for entry in entries(kernel, generation):
        if all(facts.get(name, 0) <= limit for name, limit in entry.limits.items()):
            return entry
    raise BackendError(f"{TABLE.name}: no entry of {kernel} for {generation} fits {facts}; add one without limits")


def entries(kernel: str, generation: str) -> tuple[Configuration, ...]:
    """Every entry that a call of `kernel` can choose on `generation`, the user's first."""
    table = load_table()
    if kernel not in table:
        raise BackendError(f"{TABLE.name}: no table for {kernel}; there are {', '.join(table)}")
    own = table[kernel]
    return (*_user_entries(kernel, generation), *own.get(generation, own.get(ANY, ())))


def choices(generation: str) -> frozenset[str]:
    """Every entry that some call can choose on `generation`, as text."""
    return frozenset(str(entry) for kernel in load_table() for entry in entries(kernel, generation))


@functools.cache
def load_table() -> Mapping[str, Mapping[str, tuple[Configuration, ...]]]:
    """The project's table: kernel -> generation -> entries."""
    return read_table(TABLE)


@functools.cache
def _user_table() -> Mapping[str, Mapping[str, tuple[Configuration, ...]]]:
    return read_table(user_file()) if user_file().is_file() else {}


def _user_entries(kernel: str, generation: str) -> tuple[Configuration, ...]:
    return () if generation == INTERPRETER else _user_table().get(kernel, {}).get(generation, ())


def read_table(path: Path) -> Mapping[str, Mapping[str, tuple[Configuration, ...]]]:
    """Read and check a table; raises BackendError that names the file, the entry and what is wrong."""
    try:
        raw = tomli.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as error:
        raise BackendError(f"{path} cannot be read as a table of configurations: {error}") from error
    found: dict[str, Mapping[str, tuple[Configuration, ...]]] = {}
    for kernel, generations in raw.items():
        if not isinstance(generations, dict):
            raise BackendError(f"{path}: {kernel} must be a table of GPU generations, is {generations!r:.60}")
        for generation in generations:
            if generation not in (*GENERATIONS, ANY, INTERPRETER):
                raise BackendError(
                    f"{path}: {kernel}.{generation} is no generation; expected {', '.join(GENERATIONS)}, "
                    "any or interpreter"
                )
        found[kernel] = {
            generation: tuple(_entries(path, kernel, generation, listed)) for generation, listed in generations.items()
        }
    return found


def _entries(path: Path, kernel: str, generation: str, listed: Any) -> Iterator[Configuration]:
    where = f"{kernel}.{generation}"
    for entry in listed if isinstance(listed, list) else [listed]:
        if not isinstance(entry, dict) or not all(type(value) is int and value > 0 for value in entry.values()):
            raise BackendError(f"{path}: {where} must list tables of whole numbers above 0, has {entry!r:.100}")
        sizes = {name.upper(): value for name, value in entry.items() if name.startswith("block")}
        limits = {name.removeprefix(_LIMIT): value for name, value in entry.items() if name.startswith(_LIMIT)}
        unknown = [n for n in entry if not n.startswith(("block", _LIMIT)) and n not in ("warps", "stages")]
        wrong = [name for name, value in (*sizes.items(), ("warps", entry.get("warps", 4))) if value & (value - 1)]
        if unknown or wrong:
            raise BackendError(
                f"{path}: {where} has "
                + (f"{', '.join(unknown)}; known are block*, max_*, warps and stages" if unknown else "")
                + (f"{', '.join(wrong)} that is no power of two" if wrong else "")
            )
        yield Configuration(kernel, entry.get("warps", 4), entry.get("stages", 2), sizes, limits)
