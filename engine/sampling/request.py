"""What one request asks for: how tokens are chosen, when generation ends, what is reported.

Owns the `Sampling` record and the ranges of its fields. What always holds: a `Sampling` that exists is valid,
normalised (tuples, plain ints and floats), immutable and hashable; only the vocabulary is left to check, by
`validate_for_vocabulary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Final

from slotwise.core.errors import OptionError

MAX_COUNT: Final = 2**31 - 1
MAX_LOGPROBS: Final = 20
# Far beyond any useful bias, and small enough that a sum of edits stays finite in float32.
MAX_BIAS: Final = 10_000.0


class LogitBias(Mapping[int, float]):
    """Immutable, hashable map from token id to the number added to its logit; iterates in order of token id."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[int, float]) -> None:
        self._items = dict(sorted(items.items()))

    def __getitem__(self, token: int) -> float:
        return self._items[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to generate for one request.

    Logits are adjusted in the order: repetition penalty, frequency and presence penalty, bias, ban; then temperature,
    top-k, top-p, min-p. `OptionError` names the field, what was expected and what was found.
    """

    max_new_tokens: int = 128
    """At most this many tokens are generated; exactly this many unless a stop or the capacity comes first."""
    temperature: float = 0.0
    """0 takes the most likely token (greedy); else logits are divided by it: 1e-5 to 100."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches p; 0 < p <= 1, 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """CTRL's penalty on tokens of prompt and output; above 1 discourages; 0.01 to 100."""
    frequency_penalty: float = 0.0
    """Subtracted from a logit once per occurrence of the token in the output; -2 to 2."""
    presence_penalty: float = 0.0
    """Subtracted from a logit once if the token is in the output; -2 to 2."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> number added to its logit, within +-10000. To forbid a token, name it in `banned_tokens`."""
    banned_tokens: Sequence[int] = ()
    """Token ids that are never generated; kept as a sorted tuple without repeats."""
    stop: Sequence[str] = ()
    """A string or strings that end generation; the text ends before them. Kept as a tuple."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end generation, beside the model's own; kept as a sorted tuple without repeats."""
    ignore_eos: bool = False
    """Go on past the model's end-of-sequence tokens (`stop_token_ids` still stop)."""
    seed: int | None = None
    """0 <= seed < 2**64 makes the output repeatable; None lets the engine draw one."""
    logprobs: int | None = None
    """None reports none; n reports each chosen token's log-probability and those of the n most likely, n <= 20."""

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("max_new_tokens", _integer("max_new_tokens", self.max_new_tokens, 1, MAX_COUNT))
        greedy = _is_real(self.temperature) and self.temperature == 0
        put(
            "temperature",
            0.0 if greedy else _real("temperature", self.temperature, 1e-5, 100, or_else="0 (greedy) or "),
        )
        put("top_k", _integer("top_k", self.top_k, 0, MAX_COUNT, note=" (0 keeps all tokens)"))
        put("top_p", _real("top_p", self.top_p, 0, 1, above=True))
        put("min_p", _real("min_p", self.min_p, 0, 1))
        put("repetition_penalty", _real("repetition_penalty", self.repetition_penalty, 0.01, 100))
        put("frequency_penalty", _real("frequency_penalty", self.frequency_penalty, -2, 2))
        put("presence_penalty", _real("presence_penalty", self.presence_penalty, -2, 2))
        put("logit_bias", _bias(self.logit_bias))
        put("banned_tokens", _token_ids("banned_tokens", self.banned_tokens))
        put("stop", _stop_strings(self.stop))
        put("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos: expected True or False, found {self.ignore_eos!r}")
        if self.seed is not None:
            put("seed", _integer("seed", self.seed, 0, 2**64 - 1, note=", or None to have one drawn"))
        if self.logprobs is not None:
            put("logprobs", _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS, note=", or None for none"))

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken, so that no noise is drawn."""
        return self.temperature == 0

    @property
    def adjusts_logits(self) -> bool:
        """Whether any penalty, bias or ban changes logits before temperature."""
        penalised = self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0
        return penalised or bool(self.logit_bias) or bool(self.banned_tokens)

    def validate_for_vocabulary(self, vocab_size: int) -> None:
        """Check every token id against a vocabulary of `vocab_size` ids.

        Raises `OptionError` for an id outside 0..vocab_size-1, and if the banned tokens leave none to generate.
        """
        for name, ids in (
            ("logit_bias", self.logit_bias),
            ("banned_tokens", self.banned_tokens),
            ("stop_token_ids", self.stop_token_ids),
        ):
            for token in ids:
                if token >= vocab_size:
                    raise OptionError(
                        f"{name}: token id {token} is not in the model's vocabulary, expected 0 to {vocab_size - 1}"
                        f" (vocabulary size {vocab_size}); take ids from this model's own tokenizer"
                    )
        if len(self.banned_tokens) >= vocab_size:
            raise OptionError(
                f"banned_tokens: all {vocab_size} tokens of the vocabulary are banned, expected at least one to be left"
            )


def _is_integral(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _found(value: object) -> str:
    return f"found {value!r}" + ("" if _is_real(value) else f" ({type(value).__name__})")


def _integer(name: str, value: int, low: int, high: int, *, note: str = "") -> int:
    if not (_is_integral(value) and low <= value <= high):
        raise OptionError(f"{name}: expected an integer from {low} to {high}{note}, {_found(value)}")
    return int(value)


def _real(name: str, value: float, low: float, high: float, *, above: bool = False, or_else: str = "") -> float:
    # A NaN fails every comparison, and an infinity every bound.
    if not (_is_real(value) and low <= value <= high) or (above and value == low):
        start = "above " if above else "from "
        raise OptionError(f"{name}: expected {or_else}a number {start}{low:g} to {high:g}, {_found(value)}")
    return float(value)


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise OptionError(f"{name}: expected a sequence of token ids, {_found(ids)}")
    return tuple(sorted({_integer(f"{name}, each id", token, 0, MAX_COUNT) for token in ids}))


def _bias(bias: object) -> LogitBias:
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias: expected a mapping from token id to number, {_found(bias)}")
    return LogitBias(
        {
            _integer("logit_bias, each token id", token, 0, MAX_COUNT): _real(
                f"logit_bias of token {token!r}", value, -MAX_BIAS, MAX_BIAS
            )
            for token, value in bias.items()
        }
    )


def _stop_strings(stop: object) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable):
        raise OptionError(f"stop: expected a string or a sequence of strings, {_found(stop)}")
    strings = tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"stop: expected strings of at least one character, {_found(string)}")
    return tuple(dict.fromkeys(strings))
