"""Strict reading of a checkpoint's JSON files, and typed, bounded access to their fields.

What always holds: a file is read only after its kind and size were checked; JSON with duplicate keys, NaN, Infinity,
absurdly long numbers or bottomless nesting is refused; and a field that reaches an architecture has the type it asked
for and lies within bounds. Every refusal is a `CheckpointError` that names the file, the key, what was expected and
what was found.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slotwise.core.errors import CheckpointError, nearest

CONFIG_BYTES = 10 * 2**20
_NUMBER_DIGITS = 64

# Far above every published model, far below what would overflow a size computation or fill a machine.
UPPER_BOUNDS: Mapping[str, int] = {
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**31,
    "original_max_position_embeddings": 2**31,
    "sliding_window": 2**31,
}
_ANY_INT = 2**31


def is_there(path: Path) -> bool:
    """Whether a folder has a file of this name; one that points to nothing is there, and cannot be read."""
    return os.path.lexists(path)


def read_bounded(path: Path, at_most: int) -> bytes:
    """Return the bytes of a regular file of no more than `at_most` bytes; anything else is a `CheckpointError`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: expected a regular file, found something else; replace it with the file")
        if found.st_size > at_most:
            raise CheckpointError(
                f"{path}: expected at most {at_most} bytes, found {found.st_size}; the file is not what its name says"
            )
        with path.open("rb") as file:
            return file.read(at_most)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check that it exists and is readable") from (
            error
        )


def parse_json_object(data: bytes, source: object) -> dict[str, object]:
    """Parse UTF-8 JSON whose top level is an object; `source` names the data in errors.

    Duplicate keys, NaN, Infinity, numbers of more than 64 characters and nesting that exhausts the stack are errors.
    """

    def whole(text: str) -> int:
        if len(text) > _NUMBER_DIGITS:
            raise ValueError(f"a number of {len(text)} digits")
        return int(text)

    def fraction(text: str) -> float:
        value = float(text) if len(text) <= _NUMBER_DIGITS else math.inf
        if not math.isfinite(value):
            raise ValueError(f"the number {text[:_NUMBER_DIGITS]}, which is not finite or too long")
        return value

    def constant(text: str) -> float:
        raise ValueError(f"{text}, which is not JSON")

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {shown(twice)} twice in one object")
        return result

    try:
        parsed = json.loads(
            data.decode("utf-8"),
            parse_int=whole,
            parse_float=fraction,
            parse_constant=constant,
            object_pairs_hook=pairs,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: expected UTF-8 text, found a bad byte at {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{source}: expected JSON, found {error.msg} at line {error.lineno} column {error.colno}"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{source}: expected JSON, found {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{source}: expected JSON, found nesting too deep to read") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {shown(parsed)}")
    return parsed


def read_json_object(path: Path, at_most: int = CONFIG_BYTES) -> dict[str, object]:
    """Read and parse a JSON file of at most `at_most` bytes; see `parse_json_object`."""
    return parse_json_object(read_bounded(path, at_most), path)


def shown(value: object) -> str:
    """Return a short text for a value found in a hostile file, fit for an error message."""
    if isinstance(value, Mapping):
        return f"an object of {len(value)} keys"
    if isinstance(value, list):
        return f"a list of {len(value)}" if len(value) > 8 else "[" + ", ".join(shown(v) for v in value[:8])[:80] + "]"
    text = json.dumps(value) if value is None or isinstance(value, bool | str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


@dataclass(frozen=True)
class ConfigReader:
    """Typed access to the fields of one JSON object.

    `source` names the file in errors. A field that is `null` counts as absent; an absent field without a default is
    an error. Every method raises `CheckpointError` and nothing else.
    """

    fields: Mapping[str, object]
    source: str

    def has(self, key: str) -> bool:
        """Return whether the key is present and not null."""
        return self.fields.get(key) is not None

    def _get(self, key: str, expected: str) -> object:
        value = self.fields.get(key)
        if value is None:
            raise CheckpointError(
                f"{self.source}: '{key}' is missing; expected {expected}{nearest(key, self.fields)}; add it to the file"
            )
        return value

    def _refuse(self, key: str, expected: str, found: object) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: '{key}' must be {expected}, found {shown(found)}; correct the file or fetch it again"
        )

    def integer(self, key: str, *, default: int | None = None, at_least: int, at_most: int) -> int:
        """Return an integer within [at_least, at_most]; a bool or a float is not one."""
        if default is not None and not self.has(key):
            return default
        expected = f"an integer from {at_least} to {at_most}"
        value = self._get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value <= at_most:
            raise self._refuse(key, expected, value)
        return value

    def positive_int(self, key: str, *, default: int | None = None, at_most: int | None = None) -> int:
        """Return an integer of at least 1; `at_most` defaults to the key's entry in `UPPER_BOUNDS`, else 2**31."""
        top = UPPER_BOUNDS.get(key, _ANY_INT) if at_most is None else at_most
        return self.integer(key, default=default, at_least=1, at_most=top)

    def optional_positive_int(self, key: str, *, at_most: int | None = None) -> int | None:
        """Return as `positive_int` does, or None where the key is absent or null."""
        return self.positive_int(key, at_most=at_most) if self.has(key) else None

    def number(
        self, key: str, *, default: float | None = None, at_least: float = -math.inf, at_most: float = math.inf
    ) -> float:
        """Return a finite number within [at_least, at_most] as a float."""
        if default is not None and not self.has(key):
            return default
        expected = f"a number from {at_least:g} to {at_most:g}"
        value = self._get(key, expected)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._refuse(key, expected, value)
        if not math.isfinite(value) or not at_least <= value <= at_most:
            raise self._refuse(key, expected, value)
        return float(value)

    def optional_number(self, key: str, *, at_least: float = -math.inf, at_most: float = math.inf) -> float | None:
        """Return as `number` does, or None where the key is absent or null."""
        return self.number(key, at_least=at_least, at_most=at_most) if self.has(key) else None

    def boolean(self, key: str, *, default: bool | None = None) -> bool:
        """Return true or false; 0, 1 and strings are neither."""
        if default is not None and not self.has(key):
            return default
        value = self._get(key, "true or false")
        if not isinstance(value, bool):
            raise self._refuse(key, "true or false", value)
        return value

    def string(self, key: str, *, default: str | None = None) -> str:
        """Return a string."""
        if default is not None and not self.has(key):
            return default
        value = self._get(key, "a string")
        if not isinstance(value, str):
            raise self._refuse(key, "a string", value)
        return value

    def choice(self, key: str, options: Sequence[str], *, default: str | None = None) -> str:
        """Return a string that is one of `options`."""
        value = self.string(key, default=default)
        if value not in options:
            raise self._refuse(key, f"one of {', '.join(options)}{nearest(value[:80], options)}", value)
        return value

    def mapping(self, key: str) -> ConfigReader:
        """Return a reader over a nested object; its errors name the path to it."""
        value = self._get(key, "an object")
        if not isinstance(value, dict):
            raise self._refuse(key, "an object", value)
        return ConfigReader(value, f"{self.source}, in '{key}'")

    def optional_mapping(self, key: str) -> ConfigReader | None:
        """Return as `mapping` does, or None where the key is absent or null."""
        return self.mapping(key) if self.has(key) else None

    def int_list(self, key: str, *, at_least: int, at_most: int, length: int | None = None) -> tuple[int, ...]:
        """Return a list of integers within [at_least, at_most], of exactly `length` entries if that is given."""
        size = "" if length is None else f"{length} "
        expected = f"a list of {size}integers from {at_least} to {at_most}"
        value = self._get(key, expected)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self._refuse(key, expected, value)
        for entry in value:
            if isinstance(entry, bool) or not isinstance(entry, int) or not at_least <= entry <= at_most:
                raise self._refuse(key, f"{expected} (one entry is {shown(entry)})", value)
        return tuple(value)

    def number_list(self, key: str, *, length: int | None = None) -> tuple[float, ...]:
        """Return a list of finite numbers, of exactly `length` entries if that is given."""
        expected = "a list of numbers" if length is None else f"a list of {length} numbers"
        value = self._get(key, expected)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self._refuse(key, expected, value)
        for entry in value:
            if isinstance(entry, bool) or not isinstance(entry, int | float) or not math.isfinite(entry):
                raise self._refuse(key, f"{expected} (one entry is {shown(entry)})", value)
        return tuple(float(entry) for entry in value)

    def str_list(self, key: str, *, options: Sequence[str] | None = None, length: int | None = None) -> tuple[str, ...]:
        """Return a list of strings, each one of `options` and exactly `length` of them if those are given."""
        expected = "a list of strings" if length is None else f"a list of {length} strings"
        if options is not None:
            expected += f", each one of {', '.join(options)}"
        value = self._get(key, expected)
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise self._refuse(key, expected, value)
        for entry in value:
            if not isinstance(entry, str) or (options is not None and entry not in options):
                raise self._refuse(key, f"{expected} (one entry is {shown(entry)})", value)
        return tuple(value)
