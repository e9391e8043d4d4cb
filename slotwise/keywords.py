"""Keywords that nothing here has, refused with the nearest that it has.

Owns `known_keywords`. What always holds: a function so marked keeps its signature and its types; a keyword that it does
not know is an OptionError before any of it runs, and one that a Sampling knows is sent there; what a chat does not
know is answered by the table of its parameters.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import ParamSpec, TypeVar

from slotwise.core.errors import OptionError, nearest, nearest_name
from slotwise.engine.sampling import Sampling
from slotwise.models.chat_parameters import KEYWORDS, is_parameter, refuse_unknown

P = ParamSpec("P")
R = TypeVar("R")


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which answers an unknown keyword with an OptionError instead of Python's TypeError."""
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    known = [name for name in known if name != "self"]
    if any(each.kind is each.VAR_KEYWORD for each in parameters):  # what goes on to a chat
        known += KEYWORDS

    @functools.wraps(function)
    def checked(*arguments: P.args, **keywords: P.kwargs) -> R:
        for name in keywords:
            if name not in known:
                raise OptionError(_refusal(function, name, known))
        return function(*arguments, **keywords)

    return checked


def _refusal(function: Callable[..., object], name: str, known: list[str]) -> str:
    called = function.__qualname__.removesuffix(".__init__")
    if "template_variables" in known and is_parameter(name):
        refuse_unknown([name])
    asked = [each.name for each in fields(Sampling)]
    field = nearest_name(name, asked)
    if "sampling" in known and field is not None and nearest_name(name, known) is None:
        return f"{called} has no keyword {name!r}: what is sampled goes into sampling=slotwise.Sampling({field}=...)"
    if "template_variables" in known:
        refuse_unknown([name])
    if called == "LLM" and (name in asked or name == "max_tokens"):
        return f"{called} has no keyword {name!r}: it is said with a prompt, as slotwise.Sampling({name}=...)"
    return f"{called} has no keyword {name!r}{nearest(name, known)}; there are {', '.join(known)}"
