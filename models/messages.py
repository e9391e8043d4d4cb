"""Messages as callers write them, brought into the one form that every chat template is given.

What always holds: this happens once, before any template; messages without a content that is null, reasoning under a
second name, content parts or arguments in JSON text come out as they went in. Sources: the messages of OpenAI's chat
completions, and `apply_chat_template` of transformers 5.23, which drops null keys and copies reasoning too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence

from slotwise.core.errors import RequestError
from slotwise.models.plain_data import WrittenMapping, as_mapping, kind, plain

REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names under which a turn's reasoning is handed in, first come first."""

_SPEAKERS = ("system", "developer", "user", "assistant")
"""Roles whose content is text or parts; what others hand over (a tool's result) may be any mapping or list."""

_TEXTS = ("text", "input_text", "output_text")
"""The types of a text part, those of OpenAI's responses too; a template knows the first."""

_PARTS = (*_TEXTS, "image", "image_url", "audio", "input_audio", "audio_url", "video", "video_url", "file")

Message = dict[str, object]


def normalised(messages: object, takes_parts: Callable[[str], bool], named: Collection[str]) -> list[Message]:
    """`messages` as a template is given them.

    `takes_parts(role)` says whether the template reads the text parts of such a message; elsewhere parts become their
    texts, one after another. `named` are the names that the template mentions: it gets reasoning under `reasoning` only
    where it asks for it. Raises RequestError for what is no list of messages.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f"messages must be a list of mappings with 'role' and 'content', found {kind(messages)}")
    if not messages:
        raise RequestError("messages must have one message at least, such as {'role': 'user', 'content': 'Hello'}")
    return [
        _with_reasoning(_message(message, f"messages[{position}]", takes_parts), named)
        for position, message in enumerate(messages)
    ]


def _message(given: object, where: str, takes_parts: Callable[[str], bool]) -> Message:
    fields = as_mapping(given)
    if fields is None:
        raise RequestError(f"{where} must be a mapping with 'role' and 'content', found {kind(given)}")
    if "content" not in fields and all(fields.get(name) is None for name in ("tool_calls", *REASONING)):
        raise RequestError(f"{where} must have 'content', found only {', '.join(map(str, fields))}")
    copied = plain(fields, where)
    assert isinstance(copied, dict)
    message = {name: value for name, value in copied.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where} must have a 'role' such as 'user', found {kind(role)}")
    if "content" in message:
        message["content"] = _content(message["content"], f"{where}['content']", role, takes_parts)
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{where}['tool_calls']")
    return message


def _content(content: object, where: str, role: str, takes_parts: Callable[[str], bool]) -> object:
    """Text; or parts, where the template reads them; or what a tool handed over."""
    if isinstance(content, str):
        return content
    handed_over = role not in _SPEAKERS
    if isinstance(content, Mapping) and handed_over:
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} must be text or a list of parts, found {kind(content)}")
    # An empty list is what a tool found: nothing.
    if handed_over and not (content and all(isinstance(p, Mapping) and p.get("type") in _PARTS for p in content)):
        return content
    parts = [_part(part, f"{where}[{position}]") for position, part in enumerate(content)]
    return parts if takes_parts(role) else "".join(str(part["text"]) for part in parts)


def _part(part: object, where: str) -> Message:
    """One part of a content, which must be text: the models here read nothing else."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict):
        raise RequestError(f"{where} must be a part such as {{'type': 'text', 'text': 'Hello'}}, found {kind(part)}")
    sort = part.get("type", "text")
    if sort not in _TEXTS:
        raise RequestError(f"{where} is a part of type {sort!r}; models here read text alone, so leave it out")
    if not isinstance(part.get("text"), str):
        raise RequestError(f"{where} must have text under 'text', found {kind(part.get('text'))}")
    return {"type": "text", **part} | {"type": "text"}


def _calls(calls: object, where: str) -> object:
    """Tool calls with mappings for arguments, whichever way those were written."""
    if not isinstance(calls, list | tuple):
        raise RequestError(f"{where} must be a list of calls, found {kind(calls)}")
    found = []
    for position, call in enumerate(calls):
        if not isinstance(call, dict):
            raise RequestError(f"{where}[{position}] must be a mapping with 'function', found {kind(call)}")
        function = call.get("function")
        if isinstance(function, dict):
            arguments = _with_arguments(function, f"{where}[{position}]['function']")
            found.append({**call, "function": arguments})
        else:
            found.append(_with_arguments(call, f"{where}[{position}]"))
    return found


def _with_arguments(call: Message, where: str) -> Message:
    given = call.get("arguments", {})
    if isinstance(given, Mapping):
        return call
    if given is not None and not isinstance(given, str):
        raise RequestError(f"{where}['arguments'] must be a mapping or its JSON text, found {kind(given)}")
    text = given if given and given.strip() else "{}"  # a call without arguments, as some servers write it
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}['arguments'] must be a mapping or its JSON text: {error}") from error
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}['arguments'] must be a mapping, found the JSON text of {kind(arguments)}")
    plain(arguments, f"{where}['arguments']")
    return {**call, "arguments": WrittenMapping(arguments, text)}


def _with_reasoning(message: Message, named: Collection[str]) -> Message:
    """`message` with its reasoning under every name: what is given under two names stays under both."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return {"reasoning": reasoning, **message} if "reasoning" in named else message
