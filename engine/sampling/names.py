"""Names of sampling fields: ours, and those by which other engines know them.

Owns `with_known_names` and the table of other names. What always holds: a keyword that `Sampling` has not is an
`OptionError` with the name that is meant, or with the reason why there is none.
"""

from __future__ import annotations

import functools
from typing import Any, Final, TypeVar

from slotwise.core.errors import OptionError, nearest

T = TypeVar("T")

SAID_FOR: Final = {
    "min_tokens": "min_new_tokens",
    "n_predict": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "repeat_penalty": "repetition_penalty",
    "token_repetition_penalty": "repetition_penalty",
    "token_frequency_penalty": "frequency_penalty",
    "token_presence_penalty": "presence_penalty",
    "bad_words_ids": "bad_words",
    "suppress_tokens": "banned_tokens",
    "stop_strings": "stop",
    "stop_conditions": "stop",
    "eos_token_id": "stop_token_ids",
    "forced_eos_token_id": "forced_eos_token_ids",
    "include_stop_str_in_output": "include_stop",
    "n_probs": "logprobs",
    "temp": "temperature",
}
"""Names of vLLM, llama.cpp, transformers, ExLlamaV2 and OpenAI's API, and ours."""

REFUSED: Final = {
    "best_of": "completions are not ranked here; take n of them with log-probabilities, and choose",
    "use_beam_search": "there is no beam search; sample with n",
    "num_beams": "there is no beam search; sample with n",
    "do_sample": "temperature=0 takes the most likely token, any other samples",
    "max_time": "a limit of time would not repeat; limit max_new_tokens, or cancel a stream",
}
"""What is not here, and what to do instead."""


def with_known_names(record: type[T]) -> type[T]:
    """`record`, a dataclass, which takes `max_tokens` for `max_new_tokens` and refuses unknown keywords by name."""
    made = record.__init__
    known = list(record.__dataclass_fields__)  # type: ignore[attr-defined]

    @functools.wraps(made)
    def init(self: T, **given: Any) -> None:
        if "max_tokens" in given:
            count = given.pop("max_tokens")
            if given.setdefault("max_new_tokens", count) != count:
                raise OptionError(
                    f"max_tokens and max_new_tokens mean the same, and differ: {count!r} and "
                    f"{given['max_new_tokens']!r}; give one of them"
                )
        for name in given:
            if name not in known:
                raise OptionError(_refusal(record.__name__, name, known))
        made(self, **given)

    setattr(record, "__init__", init)  # noqa: B010 (mypy takes no assignment to a method)
    return record


def _refusal(record: str, name: str, known: list[str]) -> str:
    if name in REFUSED:
        return f"{name}: {REFUSED[name]}"
    meant = f" (did you mean '{SAID_FOR[name]}'?)" if name in SAID_FOR else nearest(name, known)
    return f"{record} has no field {name!r}{meant}; there are {', '.join(known)}"
