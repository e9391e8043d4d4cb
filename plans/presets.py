"""Presets: options in TOML files.

Owns the reading of `plans/presets/*.toml` and of a user's own files. What always holds: a preset's keys are the fields
of `PlanOptions`; an unknown key or preset is an error that suggests the nearest; a preset never runs code.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from slotwise.core.errors import OptionError, nearest

if TYPE_CHECKING:  # options know every op, and so PyTorch, which a list of names should not wait for
    from slotwise.plans.options import PlanOptions

try:
    import tomli
except ModuleNotFoundError:  # Python 3.11 and later carry the same parser as tomllib.
    import tomllib as tomli  # type: ignore[no-redef, unused-ignore]

_FOLDER = Path(__file__).parent / "presets"


def preset_names() -> tuple[str, ...]:
    """The presets that come with Slotwise."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def read_preset(name_or_path: str | Path) -> dict[str, Any]:
    """The keys and values of a preset, by name or by path (anything with a `/` or ending in `.toml`).

    Raises OptionError for an unknown name, an unreadable file, bad TOML or an unknown key.
    """
    text = str(name_or_path)
    if "/" in text or "\\" in text or text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            raise OptionError(f"preset file {path} does not exist; give a path to a TOML file or one of {_listed()}")
    else:
        if text not in preset_names():
            raise OptionError(f"preset {text!r} is not known{nearest(text, preset_names())}; there are {_listed()}")
        path = _FOLDER / f"{text}.toml"
    try:
        values = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise OptionError(f"preset {path} cannot be read as TOML: {error}") from error
    values.pop("description", None)
    return values


def apply_preset(options: PlanOptions, name_or_path: str | Path) -> PlanOptions:
    """`options` with the preset's values; raises OptionError naming the preset when one of them makes no sense."""
    try:
        return options.with_changes(**read_preset(name_or_path))
    except OptionError as error:
        raise OptionError(f"preset {name_or_path}: {error}") from error


def _listed() -> str:
    return ", ".join(preset_names())
