"""Tools that a model may call: as JSON schemas, or as Python functions from which schemas are made.

What always holds: a schema comes out as it went in; a function's says what its signature and its docstring say, under
the rules of `get_json_schema` of transformers 5.23 (Google's docstring format); what has no schema is refused with the
function's and the parameter's names.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from slotwise.core.errors import RequestError
from slotwise.models.plain_data import as_mapping, kind, plain

ToolFunction = Callable[..., object]
Schema = dict[str, Any]

_NAMES: Mapping[object, Schema] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_SCALARS = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}


def tool_schemas(tools: object) -> list[object]:
    """The schemas of `tools`, each a schema or a Python function; raises RequestError for anything else."""
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise RequestError(f"tools must be a list of schemas or functions, found {kind(tools)}")
    found = []
    for position, tool in enumerate(tools):
        if inspect.isfunction(tool) or inspect.ismethod(tool):
            found.append(plain(function_schema(tool), f"tools[{position}]"))
        elif as_mapping(tool) is not None:
            found.append(plain(tool, f"tools[{position}]"))
        else:
            raise RequestError(f"tools[{position}] must be a schema (a mapping) or a function, found {kind(tool)}")
    return found


def function_schema(function: ToolFunction) -> Schema:
    """The schema of a function with type hints and a docstring in Google's format.

    The docstring describes the function and, under `Args:`, each parameter; `(choices: ["a", "b"])` at the end of a
    description lists its values, and `Returns:` describes what comes back. Raises RequestError where a parameter has no
    hint or no description, or a hint has no counterpart in JSON.
    """
    name = getattr(function, "__name__", "operation")
    where = f"the tool {name!r}"
    document = (inspect.getdoc(function) or "").strip()
    if not document:
        raise RequestError(f"{where} has no docstring; describe it and, under 'Args:', each parameter")
    described = _described(document)
    properties: dict[str, Schema] = {}
    required = []
    hints = _hints(function, where)
    for parameter in _parameters(function):
        place = f"{where}, parameter {parameter.name!r}"
        if parameter.annotation is inspect.Parameter.empty:
            raise RequestError(f"{place}: there is no type hint; add one, such as {parameter.name}: str")
        if parameter.name not in described.parameters:
            raise RequestError(f"{place}: the docstring has no description; add '{parameter.name}: ...' under 'Args:'")
        if parameter.default is inspect.Parameter.empty:
            required.append(parameter.name)
        schema = _of_hint(hints[parameter.name], place)
        properties[parameter.name] = _with_choices(schema, described.parameters[parameter.name], place)
    parameters: Schema = {"type": "object", "properties": properties, **({"required": required} if required else {})}
    schema = {"name": name, "description": described.function, "parameters": parameters}
    returned = _of_return(hints)
    if returned is not None:
        schema["return"] = returned if described.returned is None else {**returned, "description": described.returned}
    return {"type": "function", "function": schema}


class _Described(typing.NamedTuple):
    """What a docstring says."""

    function: str
    parameters: Mapping[str, str]
    returned: str | None


def _described(document: str) -> _Described:
    """The parts of a docstring: the text before the first section, `Args:`, and `Returns:`."""
    heading = re.search(r"\s*(?:Args:|Returns:|Raises:)", document)
    section = r"\n\s*{}:\n(.*?)\s*(?:{}|\Z)"
    arguments = re.search(section.format("Args", "Returns:|Raises:"), document, re.DOTALL)
    returned = re.search(section.format("Returns", "Raises:"), document, re.DOTALL)
    return _Described(
        (document[: heading.start()] if heading else document).strip(),
        _entries(arguments.group(1)) if arguments else {},
        returned.group(1).strip() if returned else None,
    )


def _entries(section: str) -> dict[str, str]:
    """The `name: description` entries of a section; a line that is indented deeper goes on with the one before."""
    found: dict[str, list[str]] = {}
    name, depth = "", ""
    for line in filter(str.strip, section.split("\n")):
        entry = re.match(r"([ \t]*)(\w+):\s*(.*)", line)
        deeper = bool(name) and re.match(re.escape(depth) + r"[ \t]", line) is not None
        if entry and not deeper:
            depth, name = entry[1], entry[2]
            found[name] = [entry[3].strip()]
        elif name:
            found[name].append(line.strip())
    return {name: " ".join(filter(None, lines)) for name, lines in found.items()}


def _parameters(function: ToolFunction) -> list[inspect.Parameter]:
    """The parameters but a method's own object, which has no hint."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and parameters[0].name in ("self", "cls") and parameters[0].annotation is inspect.Parameter.empty:
        return parameters[1:]
    return parameters


def _hints(function: ToolFunction, where: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except Exception as error:  # a hint in text is evaluated, and may be anything
        raise RequestError(f"{where}: its type hints cannot be read: {error}") from error


def _with_choices(schema: Schema, description: str, where: str) -> Schema:
    choices = re.search(r"\(choices:\s*(.*?)\)\s*$", description, re.IGNORECASE)
    if choices is None:
        return {**schema, "description": description}
    try:
        values = json.loads(choices.group(1))
    except ValueError as error:
        raise RequestError(f"{where}: its choices are no JSON list: {error}") from error
    values = [value.strip() if isinstance(value, str) else value for value in values]
    return {**schema, "enum": values, "description": description[: choices.start()].strip()}


def _of_return(hints: Mapping[str, Any]) -> Schema | None:
    """The schema of what comes back: left out where it has none, for the model never writes it."""
    try:
        return _of_hint(hints["return"], "") if "return" in hints else None
    except RequestError:
        return None


def _of_hint(hint: Any, where: str) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return _of_values([member.value for member in hint], where)
        known = _NAMES.get(hint)
        if known is None:
            raise RequestError(
                f"{where}: {hint!r} has no counterpart in JSON; use int, float, str, bool, an Enum, Literal, list, "
                f"tuple, dict or unions of these, or write the tool's schema by hand"
            )
        return dict(known)
    if origin is Union or origin is types.UnionType:
        return _of_union(arguments, where)
    if origin is Literal:
        return _of_values(list(arguments), where)
    if origin in (list, tuple, dict) and not arguments:  # typing's own names, as in `List`
        return dict(_NAMES[origin])
    if origin is list:
        return {"type": "array", "items": _of_hint(arguments[0], where)}
    if origin is tuple:
        if len(arguments) == 1 or ... in arguments:
            raise RequestError(f"{where}: {hint!r} is a tuple of one entry or of any number; use list[...]")
        return {"type": "array", "prefixItems": [_of_hint(argument, where) for argument in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of_hint(arguments[1], where)}
    raise RequestError(f"{where}: {hint!r} has no counterpart in JSON; write the tool's schema by hand")


def _of_union(arguments: Sequence[Any], where: str) -> Schema:
    schemas = [_of_hint(argument, where) for argument in arguments if argument is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(each.keys() == {"type"} and isinstance(each["type"], str) for each in schemas):
        names = sorted({each["type"] for each in schemas})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": schemas}
    return {**schema, "nullable": True} if type(None) in arguments else schema


def _of_values(values: list[Any], where: str) -> Schema:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise RequestError(f"{where}: expected values that JSON has (text, numbers, true, false, null), found {values}")
    names = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}
