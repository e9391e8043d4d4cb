"""A last message that the model goes on writing: where in the prompt it ends.

What always holds: the prompt is cut behind the last message's text itself, found by a mark written after it, so that
neither the same text elsewhere nor a template that trims it leads astray. Source of the rules: `apply_chat_template`
of transformers 5.23 with `continue_final_message`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slotwise.core.errors import RequestError
from slotwise.models.messages import REASONING, Message

_MARK = "SLOTWISE_GOES_ON_HERE"


@dataclass(frozen=True)
class Continuation:
    """Messages whose last has a mark behind its `text`."""

    messages: Sequence[Message]
    text: str
    mark: str

    @classmethod
    def of(cls, messages: Sequence[Message], field: str, source: str) -> Continuation:
        """Mark the last of `messages` behind its `field`, for the template `source`.

        Raises RequestError where it has no text there, or the template never speaks of such a field.
        """
        *before, last = messages
        if field not in last:
            raise RequestError(f"continue_final_message: the last message has no {field!r} to go on with")
        fields = [name for name in REASONING if last.get(name) == last[field]] if field in REASONING else [field]
        if not any(name in source for name in fields):
            raise RequestError(f"continue_final_message: the chat template does not read {field!r} of a message")
        mark = _MARK
        while any(mark in str(message) for message in messages):
            mark += "_"
        content = last[field]
        if isinstance(content, list):
            position = next((i for i in reversed(range(len(content))) if _has_text(content[i])), None)
            if position is None:
                raise RequestError("continue_final_message: the last message has no text part to go on with")
            text = content[position]["text"]
            marked: object = list(content)
            marked[position] = {**content[position], "text": f"{text}{mark} "}  # type: ignore[index]
        elif isinstance(content, str):
            text, marked = content, f"{content}{mark} "
        else:
            raise RequestError(f"continue_final_message: {field!r} of the last message is not text")
        return cls([*before, {**last, **dict.fromkeys(fields, marked)}], text, mark)

    def cut(self, prompt: str) -> str:
        """The prompt up to the end of the last message's text; raises RequestError where the template left it out."""
        if self.mark not in prompt or self.text.strip() not in prompt:
            raise RequestError(
                "continue_final_message: the chat template does not write the last message as it stands, so there is "
                "nothing to go on with"
            )
        kept, _, behind = prompt.rpartition(self.mark)
        # The blank behind the mark is gone where a template trims, and then the text's own blanks are to go too.
        kept = kept if behind.startswith(" ") else kept.rstrip()
        # A template that writes the message twice leaves a mark in the first (transformers 5.23 leaves it there).
        return kept.replace(f"{self.mark} ", "").replace(self.mark, "")


def _has_text(part: object) -> bool:
    return isinstance(part, dict) and isinstance(part.get("text"), str)
