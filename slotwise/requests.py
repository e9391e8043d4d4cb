"""What a caller hands in, as requests that the engine takes: prompts, token ids, samplings.

Owns `RequestMaker`, which `LLM` and `AsyncLLM` share. What always holds: what is no prompt, no token id or no sampling
is refused by name, before anything is queued; a tensor or an array of integers is as good as a list of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slotwise.core.errors import CheckpointError, OptionError, RequestError, SlotwiseError
from slotwise.engine.request import Completion, Request, Stats
from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.values import plain
from slotwise.models.generation_config import GenerationDefaults
from slotwise.models.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Samplings = Sampling | Sequence[Sampling] | None


@dataclass(frozen=True)
class RequestMaker:
    """Makes requests to one model; `eos_ids` are its ends, `defaults` what its generation_config says."""

    tokenizer: Tokenizer
    defaults: GenerationDefaults
    eos_ids: tuple[int, ...]

    @property
    def default_sampling(self) -> Sampling:
        """What samples where the caller gives nothing; see `default_sampling`."""
        return default_sampling(self.defaults, self.eos_ids)

    def asked(self, prompts: Any, sampling: Samplings) -> tuple[bool, list[tuple[Prompt, Sampling]]]:
        """Whether one prompt is meant, and each prompt with its sampling."""
        prompts = unpacked(prompts, "prompts must be text, a list of token ids, or a list of either")
        single = isinstance(prompts, str) or (bool(prompts) and not any(map(is_prompt, prompts)))
        each = [prompts] if single else list(prompts)
        return single, list(zip(each, self._samplings(sampling, len(each)), strict=True))

    def for_stream(self, sampling: Sampling | None) -> Sampling:
        """The sampling of a stream, which has one completion; raises OptionError for more."""
        (found,) = self._samplings(sampling, 1)
        if found.n != 1:
            raise OptionError(f"n: a stream has one completion, found {found.n}; use generate, or a stream for each")
        return found

    def request(self, prompt: Prompt, sampling: Sampling) -> Request:
        """One request; raises RequestError for what is no prompt."""
        prompt = unpacked(prompt, "a prompt must be text or a list of token ids")
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else integers(prompt)
        return Request(
            tuple(ids), spelled(sampling, lambda text: self.tokenizer.encode(text, add_special_tokens=False))
        )

    def _samplings(self, sampling: Samplings, count: int) -> list[Sampling]:
        return one_for_each(self.default_sampling if sampling is None else sampling, count)


def unpacked(value: Any, expected: str) -> Any:
    """`value`, as Python's own numbers and lists where it is a tensor or an array; refuses what is no sequence."""
    value = plain(value)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(f"{expected}, found a {type(value).__name__}")
    return value


def is_prompt(entry: object) -> bool:
    """Whether an entry of a list is a prompt of its own, rather than a token id."""
    return isinstance(entry, Sequence) or getattr(entry, "ndim", 0) == 1


def integers(values: Sequence[Any]) -> list[int]:
    """Token ids as Python's own integers, of anything integral.

    Raises RequestError for a number that is not whole, a truth value or text.
    """
    found = []
    for place, value in enumerate(values):
        number = plain(value)
        try:
            found.append(operator.index(number))
        except TypeError:
            number = True
        if isinstance(number, bool):
            raise RequestError(f"token ids must be integers, found {value!r:.80} at place {place}")
    return found


def one_for_each(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """A sampling for each of `count` prompts, of one for all or of a list with one for each."""
    if isinstance(sampling, Sampling):
        return [sampling] * count
    found = list(sampling) if isinstance(sampling, Sequence) else [sampling]
    for each in found:
        if not isinstance(each, Sampling):
            raise OptionError(f"sampling must be a slotwise.Sampling or a list of them, found {each!r:.80}")
    if len(found) != count:
        raise OptionError(f"there are {len(found)} samplings for {count} prompts; give one, or one for each prompt")
    return found


def default_sampling(defaults: GenerationDefaults, eos_ids: tuple[int, ...]) -> Sampling:
    """How a checkpoint's generation_config would sample; raises CheckpointError where its values make no sense."""
    try:
        return Sampling(**defaults.suggested(eos_ids))
    except OptionError as error:
        raise CheckpointError(f"{defaults.source}: {error}; correct the file, or give a Sampling") from error


def each_completion(asked: Sequence[tuple[Prompt, Sampling]]) -> list[tuple[Prompt, Sampling]]:
    """A prompt and a sampling for each completion: a prompt that wants n comes n times, each with a seed of its own."""
    found = []
    for prompt, sampling in asked:
        for i in range(sampling.n):
            seed = None if sampling.seed is None else (sampling.seed + i) % 2**64
            found.append((prompt, replace(sampling, n=1, seed=seed)))
    return found


def by_prompt(asked: Sequence[tuple[Prompt, Sampling]], completions: Sequence[Completion]) -> list[Completion]:
    """The reverse: each prompt's first completion, which has its others as `alternatives`."""
    found, start = [], 0
    for _, sampling in asked:
        first, *others = completions[start : start + sampling.n]
        found.append(replace(first, alternatives=tuple(others)) if others else first)
        start += sampling.n
    return found


def spelled(sampling: Sampling, encode: Callable[[str], Sequence[int]]) -> Sampling:
    """`sampling` with bad words that are text as token ids: each as it stands, and with a space before it."""
    if not any(isinstance(word, str) for word in sampling.bad_words):
        return sampling
    words: list[Sequence[int]] = []
    for word in sampling.bad_words:
        if isinstance(word, str):
            words += [tuple(encode(text)) for text in (word.strip(), f" {word.strip()}")]
        else:
            words.append(word)
    return replace(sampling, bad_words=words)


def refused(error: SlotwiseError, sampling: Sampling) -> Completion:
    """The completion of a request that could not be served."""
    stats = Stats(0, 0, sampling.max_new_tokens or 0, 0, sampling.seed or 0, 0, 0, 0, 0, 0, 0.0, 0.0, {})
    return Completion("", (), "error", None, stats, error)
