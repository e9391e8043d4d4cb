"""How much a chat template may do: the budget of one render, and what is counted against it.

What always holds: steps only grow, and the first beyond `MAX_STEPS` raises; a value is admitted only once its size,
its entries' sizes included, is within bounds. One render owns one `Meter`; nothing is shared between renders.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from itertools import chain
from typing import Any

from jinja2.exceptions import SecurityError, TemplateError
from jinja2.utils import Namespace

MAX_STEPS = 2_000_000  # also the most entries that a list can have, since each one is a step
MAX_TEXT = 10_000_000  # characters in one value, and in the output
MAX_BITS = 16_384  # of an integer: Python prints no more than 4300 digits
_CHARACTERS_PER_STEP = 256


class TemplateLimitError(TemplateError):
    """A template asked for more work or memory than any chat needs."""


class TemplateRefusalError(TemplateError):
    """A template called `raise_exception`: it does not take these messages."""


class Meter:
    """Counts the work of one render. Sizes of lists and mappings are remembered: templates cannot change them."""

    def __init__(self) -> None:
        self.steps = 0
        self.emitted = 0
        self._sizes: dict[int, tuple[object, int]] = {}

    def spend(self, steps: int) -> None:
        """Count `steps`; raises `TemplateLimitError` beyond the budget."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TemplateLimitError(f"the template takes more than {MAX_STEPS} steps; it may loop without end")

    def expect(self, size: int) -> None:
        """Refuse a value of more than `MAX_TEXT` characters before it is made."""
        if size > MAX_TEXT:
            raise TemplateLimitError(f"the template builds a value of more than {MAX_TEXT} characters")

    def admit(self, value: Any) -> Any:
        """Return `value` once its size is within bounds and paid for."""
        self.spend(1 + self.size(value) // _CHARACTERS_PER_STEP)
        return value

    def emit(self, value: object) -> str:
        """Return the text that a value prints as, counted towards what the template may write in all."""
        if isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be printed")
        self.admit(value)
        text = str(value)
        self.emitted += len(text)
        if self.emitted > 2 * MAX_TEXT:  # text that a macro returns is written twice
            raise TemplateLimitError(f"the template writes more than {MAX_TEXT} characters")
        return text

    def size(self, value: object) -> int:
        """Return about how many characters a value prints as, its entries included; raises beyond `MAX_TEXT`."""
        if isinstance(value, str | bytes):
            self.expect(len(value))
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TemplateLimitError(f"the template computes an integer of more than {MAX_BITS} bits")
            return 8
        if not isinstance(value, list | tuple | Mapping | set | KeysView | ValuesView | ItemsView):
            return 8
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        self.spend(1 + len(value))
        entries: Iterable[object] = chain.from_iterable(value.items()) if isinstance(value, Mapping) else value
        total = 2
        for entry in entries:
            if isinstance(entry, Namespace):
                raise SecurityError("a namespace cannot be put into a list or mapping")
            total += 2 + self.size(entry)
            self.expect(total)
        self._sizes[id(value)] = (value, total)
        return total

    def items(self, value: Any) -> Any:
        """Return an iterable whose entries are paid for: at once where it has a length, else as they come."""
        if isinstance(value, Iterator):
            return self._counted(value)
        if isinstance(value, str | list | tuple | Mapping | range | KeysView | ValuesView | ItemsView | set):
            self.spend(1 + len(value))
        return value

    def _counted(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(1)
            yield value
