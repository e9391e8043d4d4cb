"""Where a checkpoint keeps its chat templates: one, or several by name.

What always holds: the files that transformers 5 reads are read, in its order: templates in files of their own
(chat_template.jinja is `default`, additional_chat_templates/NAME.jinja are others) replace those in a configuration
(chat_template.json, then tokenizer_config.json), where they are text, a list of {name, template} or a mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slotwise.core.errors import CheckpointError
from slotwise.models.config import ConfigReader, is_there, read_bounded, read_json_object, shown

TEMPLATE_BYTES = 128 * 2**10
DEFAULT = "default"
_MAX_TEMPLATES = 64


@dataclass(frozen=True)
class FoundTemplates:
    """Templates by name, and the file that names them in errors; a lone template is `default`."""

    by_name: Mapping[str, str]
    origin: str


def find_templates(root: Path, config: Mapping[str, object]) -> FoundTemplates:
    """The templates of the checkpoint `root`, whose tokenizer_config.json is `config`.

    Raises CheckpointError for a file that is no text, too large, or has templates of another kind.
    """
    config_file, jinja_file, json_file = (
        root / name for name in ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    )
    by_name = {DEFAULT: _text(jinja_file)} if is_there(jinja_file) else {}
    others = sorted((root / "additional_chat_templates").glob("*.jinja"))
    if len(others) > _MAX_TEMPLATES:
        raise CheckpointError(f"{root}: expected at most {_MAX_TEMPLATES} chat templates, found {len(others)}")
    by_name |= {file.name.removesuffix(".jinja"): _text(file) for file in others}
    if by_name:
        return FoundTemplates(by_name, str(jinja_file if DEFAULT in by_name else others[0].parent))
    if is_there(json_file):
        return FoundTemplates(_configured(ConfigReader(read_json_object(json_file), str(json_file))), str(json_file))
    return FoundTemplates(_configured(ConfigReader(config, str(config_file))), str(config_file))


def _text(file: Path) -> str:
    try:
        return read_bounded(file, TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{file}: expected UTF-8, found a bad byte at {error.start}") from error


def _configured(reader: ConfigReader) -> dict[str, str]:
    """The `chat_template` of a JSON file."""
    value = reader.fields.get("chat_template")
    if isinstance(value, list):
        by_name: dict[object, object] = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        if len(by_name) != len(value):
            raise CheckpointError(
                f"{reader.source}: 'chat_template' must be a list of distinct {{name, template}}, found {shown(value)}"
            )
    elif isinstance(value, Mapping):
        by_name = dict(value)
    else:
        by_name = {} if value is None else {DEFAULT: value}
    if len(by_name) > _MAX_TEMPLATES:
        raise CheckpointError(f"{reader.source}: expected at most {_MAX_TEMPLATES} templates, found {len(by_name)}")
    found: dict[str, str] = {}
    for name, template in by_name.items():
        if not isinstance(name, str) or not isinstance(template, str):
            raise CheckpointError(
                f"{reader.source}: 'chat_template' must be a string, or strings by name, found {shown(value)}"
            )
        if len(template) > TEMPLATE_BYTES:
            raise CheckpointError(
                f"{reader.source}: 'chat_template' has {len(template)} characters, expected at most {TEMPLATE_BYTES}"
            )
        found[name] = template
    return found
