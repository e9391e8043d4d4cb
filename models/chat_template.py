"""A checkpoint's chat template: which one is meant, and how messages become the text that the model continues.

What always holds: a template is a stranger's program and runs in the sandbox of `template_sandbox.py`; it sees plain
JSON data alone, messages as `messages.py` writes them; and rendering ends, with text or with an error: a `RequestError`
where the messages are at fault, a `CheckpointError` where the template is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError, UndefinedError

from slotwise.core.errors import CheckpointError, OptionError, RequestError, SlotwiseError, nearest
from slotwise.models.chat_parameters import refuse_parameters, refuse_unknown
from slotwise.models.config import is_there, read_json_object
from slotwise.models.continuation import Continuation
from slotwise.models.declared_tokens import DeclaredTokens
from slotwise.models.folder import existing_folder
from slotwise.models.messages import Message, normalised
from slotwise.models.plain_data import kind, plain
from slotwise.models.template_files import DEFAULT, TEMPLATE_BYTES, find_templates
from slotwise.models.template_meter import MAX_TEXT, TemplateLimitError, TemplateRefusalError
from slotwise.models.template_sandbox import MeteredEnvironment
from slotwise.models.tool_schema import ToolFunction, tool_schemas

Tools = Sequence[Mapping[str, object] | ToolFunction]


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat templates as found.

    `source` is the one named `default`, None where there is none; `named` are the others by name. `origin` names the
    file in errors; `special_tokens` are the variables such as `bos_token` that templates write. A template is compiled
    when it first renders, so that a broken one does not stop plain generation.
    """

    source: str | None
    origin: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """Find the templates of a checkpoint; raises CheckpointError where their files are no templates.

        `special_tokens` are those of its tokenizer; None takes what its files name, without a vocabulary to look in.
        """
        root = existing_folder(folder)
        config_file = root / "tokenizer_config.json"
        config = read_json_object(config_file) if is_there(config_file) else {}
        found = find_templates(root, config)
        if special_tokens is None:
            special_tokens = DeclaredTokens.load(root).variables
        others = {name: source for name, source in found.by_name.items() if name != DEFAULT}
        return cls(found.by_name.get(DEFAULT), found.origin, special_tokens, others)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint came with a template."""
        return self.source is not None or bool(self.named)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        template_variables: Mapping[str, object] | None = None,
        **unknown: object,
    ) -> str:
        """Return the text for `messages`, each a mapping with `role` and `content` (or `tool_calls`).

        The keywords mean what they mean for `apply_chat_template` of transformers 5 (`chat_parameters.py`);
        `add_generation_prompt` left out is true unless a message is gone on with. `template_variables` are further
        variables of the template (`enable_thinking`, ...).

        Raises `RequestError` for messages that are malformed or that the template refuses, `OptionError` for a keyword
        that there is not, `CheckpointError` for a template that does not compile, reaches for what it must not, or asks
        for more work or text than any chat needs.
        """
        refuse_unknown(unknown)
        if not isinstance(add_generation_prompt, bool | None):
            raise OptionError(f"add_generation_prompt must be true, false or None, is {add_generation_prompt!r:.80}")
        if not isinstance(continue_final_message, bool | str) or continue_final_message == "":
            raise OptionError(
                "continue_final_message must be true, false or the name of a message's field, such as "
                f"'reasoning_content', is {continue_final_message!r:.80}"
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt opens a new message and continue_final_message leaves the last one open; "
                "give one of them"
            )
        program = self._program(chat_template, tools)
        given = {} if template_variables is None else plain(template_variables, "template_variables")
        if not isinstance(given, dict):
            raise RequestError(f"template_variables must be a mapping of names to values, found {kind(given)}")
        refuse_parameters(given)
        variables = {
            **self.special_tokens,
            **given,
            "documents": None if documents is None else _documents(documents),
            "tools": None if tools is None else tool_schemas(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        takes_parts = self._reads_parts(program)
        said = normalised(messages, takes_parts, program.mentions)
        if not continue_final_message:
            return program.run(said, variables)
        spoken = continue_final_message if isinstance(continue_final_message, str) else "content"
        going_on = Continuation.of(said, spoken, program.source)
        return going_on.cut(program.run(going_on.messages, variables))

    def refuse_unread(self, names: Iterable[str], chat_template: str | None, tools: Tools | None) -> None:
        """Raise RequestError for the first of `names` that is no variable of the template meant by the other two.

        `render` leaves to the template what it reads, as transformers does; a caller who gives a variable means it.
        """
        program = self._program(chat_template, tools)
        for name in names:
            if name not in program.variables:
                raise RequestError(
                    f"the chat template of {program.origin} reads no variable {name!r}"
                    f"{nearest(name, program.variables)}, so it would change nothing; leave it out"
                )

    def _program(self, chat_template: str | None, tools: object) -> _Program:
        """The template that is meant: the one asked for; with tools, `tool_use` where there is one; else `default`."""
        if chat_template is None:
            source = self.named.get("tool_use", self.source) if tools is not None else self.source
            if source is not None:
                return _compiled(source, self.origin)
            if self.named:
                raise RequestError(
                    f"{self.origin}: the checkpoint has several chat templates and none named 'default'; choose one "
                    f"by chat_template=, of {', '.join(sorted(self.named))}"
                )
            raise RequestError(
                "this checkpoint has no chat template, so messages cannot be turned into a prompt; "
                "use `generate` with a prompt of your own, or put a chat_template.jinja into its folder"
            )
        if not isinstance(chat_template, str):
            raise RequestError(f"chat_template must be a template's text or its name, found {kind(chat_template)}")
        known = {**({} if self.source is None else {DEFAULT: self.source}), **self.named}
        if chat_template in known:
            return _compiled(known[chat_template], self.origin)
        if re.fullmatch(r"[\w.-]*", chat_template):
            raise RequestError(
                f"chat_template: the checkpoint has no template {chat_template!r}, only "
                f"{', '.join(sorted(known)) or 'none'}; give one of these, or a template's text"
            )
        try:
            return _compiled(chat_template, "chat_template")
        except CheckpointError as error:
            raise RequestError(str(error)) from error

    def _reads_parts(self, program: _Program) -> Callable[[str], bool]:
        tokens = tuple(sorted(self.special_tokens.items()))
        return lambda role: _writes_parts(program.source, program.origin, tokens, role)


@dataclass(frozen=True)
class _Program:
    """A compiled template: `variables` and `mentions` are the names that it reads and the words it speaks of."""

    source: str
    origin: str
    code: CodeType
    variables: frozenset[str]
    mentions: frozenset[str]

    def run(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        """The text for these messages.

        Where the template cannot do without a content that is not there (null beside tool calls), it is empty text.
        """
        try:
            return self._run(messages, variables)
        except RequestError as error:
            if not isinstance(error.__cause__, UndefinedError) or all("content" in message for message in messages):
                raise
        return self._run([{"content": "", **message} for message in messages], variables)

    def _run(self, messages: Sequence[Message], variables: Mapping[str, object]) -> str:
        given = [messages, *(variables[name] for name in ("tools", "documents") if name in variables)]
        environment = MeteredEnvironment(sum(len(each) for each in given if isinstance(each, Sequence)))
        template = Template.from_code(environment, self.code, environment.make_globals(None))
        try:
            text = template.render({**variables, "messages": list(messages)})
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


def _documents(documents: object) -> object:
    if isinstance(documents, str | Mapping) or not isinstance(documents, Sequence):
        raise RequestError(f"documents must be a list of mappings with 'title' and 'text', found {kind(documents)}")
    for position, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise RequestError(
                f"documents[{position}] must be a mapping with 'title' and 'text', found {kind(document)}"
            )
    return plain(documents, "documents")


@lru_cache(maxsize=16)
def _compiled(source: str, origin: str) -> _Program:
    if len(source) > TEMPLATE_BYTES:
        raise CheckpointError(f"{origin}: the template has {len(source)} characters, expected at most {TEMPLATE_BYTES}")
    environment = MeteredEnvironment()
    try:
        tree = environment.parse(source)
        variables = frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load")
        words = {node.attr for node in tree.find_all(nodes.Getattr)}
        words |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
        return _Program(source, origin, environment.compile(tree), variables, frozenset(words))
    except TemplateSyntaxError as error:
        raise CheckpointError(
            f"{origin}: the chat template is broken at line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # nesting beyond what the parser or Python's own compiler takes
        raise CheckpointError(
            f"{origin}: the chat template cannot be compiled: {type(error).__name__}: {str(error)[:200]}"
        ) from error


_PROBE = "ATEXTPARTREADASTEXT"
_ASKED: Message = {"role": "user", "content": "a"}
_CALLED: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}],
}


@lru_cache(maxsize=64)
def _writes_parts(source: str, origin: str, tokens: tuple[tuple[str, str], ...], role: str) -> bool:
    """Whether a template given a text part in a message of `role` writes its text, and not the part as data."""
    said: Message = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
    around = {"user": [said], "system": [said, _ASKED], "developer": [said, _ASKED], "assistant": [_ASKED, said]}
    handed_over = {**said, "name": "f", "tool_call_id": "abcdefghi"}
    variables = {**dict(tokens), "documents": None, "tools": None, "add_generation_prompt": False}
    try:
        text = _compiled(source, origin).run(around.get(role, [_ASKED, _CALLED, handed_over]), variables)
    except SlotwiseError:
        return False
    return _PROBE in text and not any(f"{quote}{_PROBE}{quote}" in text for quote in "'\"")
