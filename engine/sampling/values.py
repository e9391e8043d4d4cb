"""Values of sampling fields: what each may be, and the form in which it is kept.

Owns `LogitBias` and the functions that check. What always holds: what they return is plain (ints, floats, tuples) and
immutable, of scalars and arrays of numpy and PyTorch too; what they refuse is an `OptionError` that names the field,
what was expected and what was found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from numbers import Integral, Real
from typing import Any, Final

from slotwise.core.errors import OptionError

MAX_COUNT: Final = 2**31 - 1
MAX_COMPLETIONS: Final = 16384
"""The most completions of one prompt, as in vLLM: each is a request of its own, queued at once."""
LARGEST: Final = 3.4028234663852886e38
"""The greatest float32: what kernels and edits of logits compute with."""
SMALLEST: Final = 1.1754943508222875e-38
"""The least float32 above zero that is held in full; a divisor below it would be rounded, to zero in the end."""


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


def is_real(value: object) -> bool:
    """Whether a value is a real number, truth values left out."""
    return isinstance(value, Real) and not isinstance(value, bool)


def found(value: object) -> str:
    """What was found, as an error says it."""
    return f"found {value!r:.200}" + ("" if is_real(value) else f" ({type(value).__name__})")


def plain(value: object) -> Any:
    """`value`, or Python's own number or list where it is a scalar or an array."""
    return value.tolist() if hasattr(value, "tolist") else value


def integer(name: str, value: object, low: int, high: int, *, note: str = "") -> int:
    """A whole number from `low` to `high`."""
    value = plain(value)
    if not (isinstance(value, Integral) and not isinstance(value, bool) and low <= int(value) <= high):
        raise OptionError(f"{name}: expected an integer from {low} to {high}{note}, {found(value)}")
    return int(value)


def real(name: str, value: object, low: float, high: float = LARGEST, *, above: bool = False) -> float:
    """A number from `low`, or `above` it, to `high`."""
    # A NaN fails every comparison, and an infinity every bound; a plain number, for Python's are without limits.
    number = plain(value)
    if not (is_real(number) and low <= number <= high) or (above and number == low):
        start = "above" if above else "from"
        raise OptionError(f"{name}: expected a number {start} {low:g} to {high:g}, {found(number)}")
    return float(number)


def truth(name: str, value: object) -> bool:
    """True or False and nothing else."""
    value = plain(value)
    if not isinstance(value, bool):
        raise OptionError(f"{name}: expected True or False, {found(value)}")
    return value


def token_ids(name: str, ids: object) -> tuple[int, ...]:
    """Token ids, sorted, without repeats."""
    return tuple(sorted(set(_ids(name, ids))))


def id_sequence(name: str, ids: object) -> tuple[int, ...]:
    """One sequence of token ids, in its order; at least one."""
    sequence = _ids(name, _ordered(name, ids))
    if not sequence:
        raise OptionError(f"{name}: expected at least one token id, {found(ids)}")
    return sequence


def _ordered(name: str, value: object) -> Any:
    """`value` unless it is a set, whose order is chance."""
    if isinstance(value, Set):
        raise OptionError(f"{name}: expected an order, {found(value)}; give a list")
    return value


def _ids(name: str, ids: object) -> tuple[int, ...]:
    ids = plain(ids)
    if isinstance(ids, (str, bytes, Mapping)) or not isinstance(ids, Iterable):
        raise OptionError(f"{name}: expected a sequence of token ids, {found(ids)}")
    return tuple(integer(f"{name}, each id", token, 0, MAX_COUNT) for token in ids)


def bias_value(name: str, value: object) -> float:
    """A finite number, or minus infinity, which bans."""
    value = plain(value)
    if is_real(value) and value == float("-inf"):
        return float("-inf")
    return real(name, value, -LARGEST)


def bias(value: object) -> LogitBias:
    """A mapping from token id to number."""
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias: expected a mapping from token id to number, {found(value)}")
    return LogitBias(
        {
            integer("logit_bias, each token id", token, 0, MAX_COUNT): bias_value(
                f"logit_bias of token {token!r}", each
            )
            for token, each in value.items()
        }
    )


def sequence_bias(value: object) -> tuple[tuple[tuple[int, ...], float], ...]:
    """(token ids, number) pairs, of a mapping from tuples or of a list of pairs, as transformers has either."""
    pairs = value.items() if isinstance(value, Mapping) else plain(value)
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise OptionError(
            f"sequence_bias: expected a mapping from token ids to number, or pairs of them, {found(value)}"
        )
    known: dict[tuple[int, ...], float] = {}
    for pair in pairs:
        pair = plain(pair)
        entry = (
            tuple(_ordered("sequence_bias", pair))
            if isinstance(pair, Iterable) and not isinstance(pair, (str, bytes))
            else ()
        )
        if len(entry) != 2:
            raise OptionError(f"sequence_bias: expected pairs of token ids and a number, {found(pair)}")
        ids = id_sequence("sequence_bias", entry[0])
        known[ids] = bias_value(f"sequence_bias of {list(ids)}", entry[1])
    return tuple(known.items())


def bad_words(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Words: text, or sequences of token ids; kept in order, without repeats."""
    value = (value,) if isinstance(value, str) else plain(value)
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise OptionError(f"bad_words: expected a sequence of texts or of token id sequences, {found(value)}")
    words: list[str | tuple[int, ...]] = []
    for each in value:
        word = plain(each)
        if isinstance(word, str):
            if not word.strip():
                raise OptionError(
                    f"bad_words: expected text that is more than spaces, {found(word)}; give such a word's token ids"
                )
            if any("\ud800" <= character <= "\udfff" for character in word):
                raise OptionError(f"bad_words: {word!r} has half of a surrogate pair, so it never comes; remove it")
            words.append(word)
        elif isinstance(word, Integral):
            raise OptionError(
                f"bad_words: expected texts or sequences of token ids, {found(word)}; a single token is [{word}]"
            )
        else:
            words.append(id_sequence("bad_words", word))
    return tuple(dict.fromkeys(words))


def stop_strings(stop: object) -> tuple[str, ...]:
    """Strings that stop, in order, without repeats; None is none."""
    if stop is None:
        return ()
    stop = (stop,) if isinstance(stop, str) else plain(stop)
    if isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable):
        raise OptionError(f"stop: expected a string or a sequence of strings, {found(stop)}")
    strings = tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise OptionError(f"stop: expected strings of at least one character, {found(string)}")
    return tuple(dict.fromkeys(strings))


def decay(value: object) -> tuple[int, float]:
    """(start, factor) of `exponential_decay_length_penalty`."""
    name = "exponential_decay_length_penalty"
    value = _ordered(name, plain(value))
    pair = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else ()
    if len(pair) != 2:
        raise OptionError(f"{name}: expected a start and a factor, {found(value)}")
    return integer(f"{name}, the start", pair[0], 0, MAX_COUNT), real(f"{name}, the factor", pair[1], 0, above=True)
