"""A checkpoint's chat template: where it is found, and how messages become the text that the model continues.

What always holds: a template is a stranger's program and runs in the sandbox of `template_sandbox.py`; it sees plain
JSON data alone; and rendering ends, with text or with an error: a `RequestError` where the messages are at fault, a
`CheckpointError` where the template is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateSyntaxError

from slotwise.core.errors import CheckpointError, RequestError
from slotwise.models.checkpoint import existing_folder
from slotwise.models.config import ConfigReader, read_bounded, read_json_object, shown
from slotwise.models.template_meter import MAX_TEXT, TemplateLimitError, TemplateRefusalError
from slotwise.models.template_sandbox import MeteredEnvironment

TEMPLATE_BYTES = 128 * 2**10
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template as found; `source` is None where the checkpoint has none.

    `origin` names the file in errors; `special_tokens` are the variables such as `bos_token` that templates write.
    The template is compiled when it first renders, so that a broken one does not stop plain generation.
    """

    source: str | None
    origin: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> ChatTemplate:
        """Find the template: chat_template.jinja, else chat_template.json, else in tokenizer_config.json."""
        root = existing_folder(folder)
        config_file = root / "tokenizer_config.json"
        config = read_json_object(config_file) if config_file.exists() else {}
        tokens = special_tokens(config)
        jinja_file, json_file = root / "chat_template.jinja", root / "chat_template.json"
        if jinja_file.exists():
            data = read_bounded(jinja_file, TEMPLATE_BYTES)
            try:
                return cls(data.decode("utf-8"), str(jinja_file), tokens)
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{jinja_file}: expected UTF-8, found a bad byte at {error.start}") from error
        if json_file.exists():
            reader = ConfigReader(read_json_object(json_file), str(json_file))
            return cls(_default_of(reader), str(json_file), tokens)
        return cls(_default_of(ConfigReader(config, str(config_file))), str(config_file), tokens)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a template."""
        return self.source is not None

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, object]] | None = None,
        **extra: object,
    ) -> str:
        """Return the text for `messages`, each a mapping with `role` and `content` (or `tool_calls`).

        `extra` are further variables of the template (`enable_thinking`, ...). Raises `RequestError` for messages that
        are malformed or that the template refuses, `CheckpointError` for a template that does not compile, reaches for
        what it must not, or asks for more work or text than any chat needs.
        """
        if self.source is None:
            raise RequestError(
                "this checkpoint has no chat template, so messages cannot be turned into a prompt; "
                "use `generate` with a prompt of your own, or put a chat_template.jinja into its folder"
            )
        variables: dict[str, object] = {
            **self.special_tokens,
            "documents": None,
            **{name: _plain(value, name) for name, value in extra.items()},
            "messages": _checked_messages(messages),
            "tools": None if tools is None else _plain(tools, "tools"),
            "add_generation_prompt": add_generation_prompt,
        }
        code = _compiled(self.source, self.origin)
        environment = MeteredEnvironment()
        try:
            text = Template.from_code(environment, code, environment.make_globals(None)).render(variables)
        except TemplateRefusalError as error:
            raise RequestError(f"the chat template refuses these messages: {str(error)[:500]}") from error
        except TemplateLimitError as error:
            raise CheckpointError(f"{self.origin}: {error}; do not use this template") from error
        except SecurityError as error:
            raise CheckpointError(f"{self.origin}: the template does what is not allowed: {error}") from error
        except (RecursionError, MemoryError) as error:
            raise CheckpointError(f"{self.origin}: the template recurses or grows without end") from error
        except Exception as error:  # a stranger's program may raise anything
            raise RequestError(
                f"the chat template of {self.origin} cannot render these messages: "
                f"{type(error).__name__}: {str(error)[:500]}; check their roles and contents"
            ) from error
        if len(text) > MAX_TEXT:
            raise CheckpointError(
                f"{self.origin}: the template wrote {len(text)} characters, expected {MAX_TEXT} at most"
            )
        return text


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """Return the entries of a tokenizer_config.json that name a token, such as `bos_token`, as text."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if key.endswith("_token"):
            content = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(content, str):
                found[key] = content
    return found


def _default_of(reader: ConfigReader) -> str | None:
    """The `chat_template` of a JSON file: a string, or a list of named templates of which one is `default`."""
    value = reader.fields.get("chat_template")
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if _is_named(entry)}
        if len(named) != len(value) or "default" not in named:
            raise CheckpointError(
                f"{reader.source}: 'chat_template' must be a list of distinct {{name, template}}, one of them named "
                f"'default', found {shown(value)}"
            )
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{reader.source}: 'chat_template' must be a string or a list, found {shown(value)}")
    if value is not None and len(value) > TEMPLATE_BYTES:
        raise CheckpointError(
            f"{reader.source}: 'chat_template' has {len(value)} characters, expected at most {TEMPLATE_BYTES}"
        )
    return value


def _is_named(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)


@lru_cache(maxsize=16)
def _compiled(source: str, origin: str) -> CodeType:
    if len(source) > TEMPLATE_BYTES:
        raise CheckpointError(f"{origin}: the template has {len(source)} characters, expected at most {TEMPLATE_BYTES}")
    try:
        return MeteredEnvironment().compile(source)
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{origin}: the chat template is broken at line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # nesting beyond what the parser or Python's own compiler takes
        raise CheckpointError(
            f"{origin}: the chat template cannot be compiled: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def _checked_messages(messages: object) -> list[object]:
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of mappings with 'role' and 'content', found {_kind(messages)}")
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where} must be a mapping with 'role' and 'content', found {_kind(message)}")
        if not isinstance(message.get("role"), str):
            raise RequestError(f"{where} must have a 'role' such as 'user', found {_kind(message.get('role'))}")
        if "content" not in message and "tool_calls" not in message:
            raise RequestError(f"{where} must have 'content', found only {', '.join(map(str, message))}")
        if not isinstance(message.get("content"), str | list | tuple | None):
            raise RequestError(
                f"{where}: 'content' must be text or a list of parts, found {_kind(message.get('content'))}"
            )
    return [_plain(message, f"messages[{position}]") for position, message in enumerate(messages)]


def _plain(value: object, where: str, depth: int = 0) -> object:
    """A copy of JSON-like data: what a template holds can then be neither changed nor a way out of the sandbox."""
    if depth > _MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {_MAX_DEPTH} deep; flatten it")
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        if not all(type(key) is str for key in value):
            raise RequestError(f"{where} has a key that is not a string; use JSON data")
        return {key: _plain(entry, f"{where}[{key!r}]", depth + 1) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry, f"{where}[{position}]", depth + 1) for position, entry in enumerate(value)]
    raise RequestError(f"{where} is {_kind(value)}; expected JSON data (text, numbers, lists, mappings)")


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
