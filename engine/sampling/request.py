"""What one request asks for: how tokens are chosen, when generation ends, what is reported.

Owns the `Sampling` record and what each of its fields means. What always holds: a `Sampling` that exists is valid,
normalised (tuples, plain ints and floats), immutable and hashable; only the vocabulary is left to check, by
`validate_for_vocabulary`, and words given as text to be made into token ids. A keyword that it has not is refused by
name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from slotwise.core.errors import OptionError
from slotwise.engine.sampling import values
from slotwise.engine.sampling.names import with_known_names
from slotwise.engine.sampling.values import MAX_COUNT

GREEDY_BELOW: Final = 1e-5
"""A temperature below this is greedy, as in vLLM: logits divided by it would leave float32's range."""


@with_known_names
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate for one request; `max_tokens` may be said for `max_new_tokens`.

    Logits are adjusted in the order: biases; repetition penalty; frequency and presence penalty; growth of ends; bans;
    then temperature, top-k, top-p, min-p. `OptionError` names the field, what was expected and what was found.
    """

    max_new_tokens: int | None = 128
    """At most this many tokens are generated; exactly this many unless a stop or the capacity comes first. None: as
    many as `max_length` and the capacity leave."""
    max_length: int | None = None
    """At most this many tokens, the prompt's included; None for no such limit."""
    min_new_tokens: int = 0
    """Nothing ends the output before it has this many tokens, unless the budget does."""
    min_length: int = 0
    """The same, the prompt's tokens included."""
    n: int = 1
    """How many completions of one prompt. Completion i has `seed + i`; without a seed each draws its own."""
    temperature: float = 0.0
    """0, or below 1e-5, takes the most likely token (greedy); else logits are divided by it."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p (within 2**-20), of equals the lower ids
    first, at least one; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """CTRL's penalty on tokens of prompt and output; above 1 discourages; above 0."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once per occurrence of the token in the output."""
    presence_penalty: float = 0.0
    """Subtracted from a logit once if the token is in the output."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens comes twice in prompt and output; 0 for no such ban."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit; minus infinity bans it."""
    sequence_bias: Sequence[tuple[Sequence[int], float]] = ()
    """(token ids, number): added to the last token's logit where the others stand before it. Those of one token become
    a `logit_bias`. A mapping from tuples of ids will do."""
    bad_words: Sequence[str | Sequence[int]] = ()
    """Words that never come: text, with and without a space before it, or token ids. The prompt may hold their
    beginning."""
    banned_tokens: Sequence[int] = ()
    """Token ids that are never generated; kept as a sorted tuple without repeats."""
    begin_suppress_tokens: Sequence[int] = ()
    """Token ids that are never the first of the output."""
    allowed_token_ids: Sequence[int] | None = None
    """The only token ids to choose from; None for all."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """(start, factor): n tokens after the first `start`, an end's logit z grows by `abs(z) * (factor ** n - 1)`."""
    forced_bos_token_id: int | None = None
    """The token that follows a prompt of one token."""
    forced_eos_token_ids: Sequence[int] = ()
    """The last token that the budget leaves is one of these."""
    stop: Sequence[str] | None = ()
    """A string or strings that end generation; the text ends before them. Kept as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end generation, beside the model's own; kept as a sorted tuple without repeats."""
    include_stop: bool = False
    """The text ends after the stop string, or the stop token's text, instead of before it."""
    skip_special_tokens: bool = True
    """Special tokens add nothing to the text; False shows them."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens (`stop_token_ids` still stop)."""
    seed: int | None = None
    """0 <= seed < 2**64 makes the output repeatable; None, or -1, lets the engine draw one."""
    logprobs: int | None = None
    """None reports none; n reports each chosen token's log-probability and those of the n most likely; -1 of all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt, the first left out, for nothing stands before it."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("max_new_tokens", "max_length"):
            if getattr(self, name) is not None:
                note = ", or None for what the capacity leaves"
                put(name, values.integer(name, getattr(self, name), 1, MAX_COUNT, note=note))
        for name in ("min_new_tokens", "min_length", "no_repeat_ngram_size"):
            put(name, values.integer(name, getattr(self, name), 0, MAX_COUNT))
        put("n", values.integer("n", self.n, 1, values.MAX_COMPLETIONS))
        temperature = values.real("temperature", self.temperature, 0)
        put("temperature", 0.0 if temperature < GREEDY_BELOW else temperature)
        put("top_k", max(values.integer("top_k", self.top_k, -1, MAX_COUNT, note=" (0 or -1 keeps all tokens)"), 0))
        for name in ("top_p", "min_p"):
            put(name, values.real(name, getattr(self, name), 0, 1))
        put("repetition_penalty", values.real("repetition_penalty", self.repetition_penalty, values.SMALLEST))
        for name in ("frequency_penalty", "presence_penalty"):
            put(name, values.real(name, getattr(self, name), -values.LARGEST))
        biased, sequences = dict(values.bias(self.logit_bias)), values.sequence_bias(self.sequence_bias)
        for ids, value in sequences:
            if len(ids) == 1:
                biased[ids[0]] = biased.get(ids[0], 0.0) + value
        put("logit_bias", values.LogitBias(biased))
        put("sequence_bias", tuple((ids, value) for ids, value in sequences if len(ids) > 1))
        put("bad_words", values.bad_words(self.bad_words))
        for name in ("banned_tokens", "begin_suppress_tokens", "stop_token_ids", "forced_eos_token_ids"):
            put(name, values.token_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            put("allowed_token_ids", values.token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise OptionError("allowed_token_ids: expected at least one id, or None for all, found none")
        if self.exponential_decay_length_penalty is not None:
            put("exponential_decay_length_penalty", values.decay(self.exponential_decay_length_penalty))
        if self.forced_bos_token_id is not None:
            put("forced_bos_token_id", values.integer("forced_bos_token_id", self.forced_bos_token_id, 0, MAX_COUNT))
        put("stop", values.stop_strings(self.stop))
        for name in ("include_stop", "skip_special_tokens", "ignore_eos"):
            put(name, values.truth(name, getattr(self, name)))
        if self.seed is not None:
            seed = values.integer("seed", self.seed, -1, 2**64 - 1, note=" (-1, or None, has one drawn)")
            put("seed", None if seed == -1 else seed)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                note = " (-1 for all tokens), or None for none"
                put(name, values.integer(name, getattr(self, name), -1, MAX_COUNT, note=note))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, so that no noise is drawn."""
        return self.temperature == 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether anything changes logits before temperature, at any token."""
        return any(getattr(self, name) != value for name, value in _LEAVES_LOGITS.items())

    @property
    def bad_word_ids(self) -> tuple[tuple[int, ...], ...]:
        """Those of the bad words that are token ids."""
        return tuple(tuple(word) for word in self.bad_words if not isinstance(word, str))

    def ends(self, eos_ids: Iterable[int]) -> frozenset[int]:
        """The token ids that end a sequence, where `eos_ids` are the model's own."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_ids))

    def budget(self, prompt_length: int) -> int | None:
        """How many tokens are asked for after a prompt; None for as many as the capacity leaves."""
        limits = [] if self.max_new_tokens is None else [self.max_new_tokens]
        if self.max_length is not None:
            limits.append(max(self.max_length - prompt_length, 0))
        return min(limits, default=None)

    def validate_for_vocabulary(self, vocab_size: int) -> None:
        """Check every token id against a vocabulary of `vocab_size` ids.

        Raises `OptionError` for an id outside 0..vocab_size-1, if nothing is left to generate, and for bad words that
        are still text.
        """
        for name, ids in self._ids_by_field():
            for token in ids:
                if token >= vocab_size:
                    raise OptionError(
                        f"{name}: token id {token} is not in the model's vocabulary, expected 0 to {vocab_size - 1}"
                        f" (vocabulary size {vocab_size}); take ids from this model's own tokenizer"
                    )
        for word in self.bad_words:
            if isinstance(word, str):
                raise OptionError(f"bad_words: {word!r} is text, and there is no tokenizer here; give its token ids")
        banned = {*self.banned_tokens, *(word[0] for word in self.bad_word_ids if len(word) == 1)}
        banned |= {token for token, bias in self.logit_bias.items() if bias == float("-inf")}
        if self.allowed_token_ids is not None and banned.issuperset(self.allowed_token_ids):
            raise OptionError("allowed_token_ids: all of them are banned, expected at least one to be left")
        if len(banned) >= vocab_size:
            by = ", ".join(name for name in ("banned_tokens", "bad_words", "logit_bias") if getattr(self, name))
            raise OptionError(
                f"{by}: all {vocab_size} tokens of the vocabulary are banned, expected at least one to be left"
            )

    def _ids_by_field(self) -> Iterable[tuple[str, Iterable[int]]]:
        for name in ("logit_bias", "banned_tokens", "begin_suppress_tokens", "stop_token_ids", "forced_eos_token_ids"):
            yield name, getattr(self, name)
        yield "allowed_token_ids", self.allowed_token_ids or ()
        yield "forced_bos_token_id", () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        yield "sequence_bias", (token for ids, _ in self.sequence_bias for token in ids)
        yield "bad_words", (token for ids in self.bad_word_ids for token in ids)


_LEAVES_LOGITS: Final[Mapping[str, object]] = {
    "min_new_tokens": 0,
    "min_length": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "no_repeat_ngram_size": 0,
    "logit_bias": {},
    "sequence_bias": (),
    "bad_words": (),
    "banned_tokens": (),
    "begin_suppress_tokens": (),
    "allowed_token_ids": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_ids": (),
}
"""The fields that change logits, and the values at which they don't."""
