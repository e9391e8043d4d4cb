"""The parameters of transformers' `apply_chat_template`, and what became of each here.

What always holds: each parameter of the installed transformers has its line in `PARAMETERS` (a test compares them), and
a keyword that no line says to act is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from slotwise.core.errors import OptionError, nearest

Fate = Literal["acts", "refused", "no meaning"]


@dataclass(frozen=True)
class ChatParameter:
    """One parameter: what becomes of it, and what it does here or what to use instead."""

    name: str
    fate: Fate
    says: str


PARAMETERS = (
    ChatParameter("conversation", "acts", "is `messages`, the first argument: one conversation a call"),
    ChatParameter("tools", "acts", "schemas or Python functions that the model may call"),
    ChatParameter("documents", "acts", "texts to answer from, mappings with `title` and `text`"),
    ChatParameter("chat_template", "acts", "another template: its text, or the name of one of the checkpoint's"),
    ChatParameter(
        "add_generation_prompt", "acts", "open the assistant's turn; left out, true unless a message is gone on with"
    ),
    ChatParameter(
        "continue_final_message", "acts", "leave the last message open; text names the field, as `reasoning_content`"
    ),
    ChatParameter(
        "sanitize_control_tokens",
        "refused",
        "special tokens written out in messages become those tokens; take them out of strangers' text first",
    ),
    ChatParameter(
        "truncation", "refused", "a prompt is never cut; one that is too long is refused, so drop old messages first"
    ),
    ChatParameter("max_length", "refused", "the most tokens of a sequence are `LLM(capacity=...)`"),
    ChatParameter(
        "tokenizer_kwargs", "refused", "prompts are encoded in one way; `llm.tokenizer.encode` takes text of your own"
    ),
    ChatParameter("tokenize", "no meaning", "a model is fed ids; `chat_prompt` returns them, decoded they are text"),
    ChatParameter("padding", "no meaning", "sequences run together without padding"),
    ChatParameter("return_tensors", "no meaning", "`chat_prompt` returns a list of ids"),
    ChatParameter("return_dict", "no meaning", "`chat_prompt` returns a list of ids"),
    ChatParameter("return_assistant_tokens_mask", "no meaning", "a mask of what to train on"),
)
"""Every parameter of `PreTrainedTokenizerBase.apply_chat_template` of transformers 5 but its `**kwargs`, which are
`template_variables` here."""

KEYWORDS = (*[each.name for each in PARAMETERS if each.fate == "acts"][1:], "template_variables")
"""The keywords of `chat`, `stream_chat` and `chat_prompt`."""

_BY_NAME = {each.name: each for each in PARAMETERS}


def is_parameter(name: str) -> bool:
    """Whether `apply_chat_template` has a parameter of that name."""
    return name in _BY_NAME


def refuse_unknown(names: Iterable[str]) -> None:
    """Raise OptionError for the first of `names`, which no chat takes."""
    for name in names:
        known = _BY_NAME.get(name)
        if known is not None and known.fate == "acts":
            raise OptionError(f"chat: {name!r} {known.says}")
        if known is not None:
            why = "has no meaning when generating" if known.fate == "no meaning" else "is not offered"
            raise OptionError(f"chat: {name!r} {why}: {known.says}; leave it out")
        hint = nearest(name, KEYWORDS)
        raise OptionError(
            f"chat has no keyword {name!r}{hint}; a variable of the chat template goes into "
            f"template_variables={{{name!r}: ...}}"
        )


def refuse_parameters(names: Iterable[str]) -> None:
    """Raise OptionError for a template variable that is a parameter of its own."""
    for name in names:
        if name in _BY_NAME and name not in KEYWORDS:
            refuse_unknown([name])
        if name in _BY_NAME or name == "messages":
            raise OptionError(f"template_variables: {name!r} is no variable; give {name!r} by itself")
