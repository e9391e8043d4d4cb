"""How much a chat template may do: the budget of one render, and what is counted against it.

What always holds: steps only grow, and the first beyond the budget raises; a value is admitted only once its size,
its entries' sizes included, is within bounds. One render owns one `Meter`; nothing is shared between renders.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from itertools import chain
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.utils import Namespace

from slotwise.models.plain_data import WrittenMapping

MAX_STEPS = 2_000_000  # also the most entries that a list can have, since each one is a step
STEPS_PER_ENTRY = 20_000  # more, for each message, tool and document: gpt-oss looks at all later ones from each
MAX_TEXT = 10_000_000  # characters in one value, and in the output
MAX_BITS = 16_384  # of an integer: Python prints no more than 4300 digits
_CHARACTERS_PER_STEP = 256
_MAX_NAMESPACES = 16  # one in another


class TemplateLimitError(TemplateError):
    """A template asked for more work or memory than any chat needs."""


class TemplateRefusalError(TemplateError):
    """A template called `raise_exception`: it does not take these messages."""


class Meter:
    """Counts the work of one render.

    `entries` is how many messages, tools and documents the render is given: a caller's long conversation may take long.
    Sizes of lists and mappings are remembered where no namespace is in them: templates cannot change them.
    """

    def __init__(self, entries: int = 0) -> None:
        self.steps = 0
        self.most_steps = MAX_STEPS + STEPS_PER_ENTRY * entries
        self.emitted = 0
        self._sizes: dict[int, tuple[object, int]] = {}

    def spend(self, steps: int) -> None:
        """Count `steps`; raises `TemplateLimitError` beyond the budget."""
        self.steps += steps
        if self.steps > self.most_steps:
            raise TemplateLimitError(f"the template takes more than {self.most_steps} steps; it may loop without end")

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
        self.admit(value)
        text = str(value)
        self.emitted += len(text)
        if self.emitted > 2 * MAX_TEXT:  # text that a macro returns is written twice
            raise TemplateLimitError(f"the template writes more than {MAX_TEXT} characters")
        return text

    def size(self, value: object) -> int:
        """Return about how many characters a value prints as, its entries included; raises beyond `MAX_TEXT`."""
        return self._measured(value, ())[0]

    def _measured(self, value: object, inside: tuple[int, ...]) -> tuple[int, bool]:
        """The size of a value, and whether it stays so: what holds a namespace changes with it, and may hold itself.

        `inside` are the namespaces on the way to the value.
        """
        if isinstance(value, str | bytes):
            self.expect(len(value))
            return len(value), True
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TemplateLimitError(f"the template computes an integer of more than {MAX_BITS} bits")
            return 8, True
        if isinstance(value, range):
            self.spend(len(value) // 64)  # what is no number is looked for in all of it
            return 8, True
        fixed = not isinstance(value, Namespace)
        if isinstance(value, Namespace):
            if id(value) in inside:
                return 8, False
            if len(inside) >= _MAX_NAMESPACES:
                raise TemplateLimitError(f"the template builds namespaces more than {_MAX_NAMESPACES} deep")
            inside = (*inside, id(value))
            self.spend(4)  # its size is found anew each time
        elif not isinstance(value, list | tuple | Mapping | set | KeysView | ValuesView | ItemsView):
            return 8, True
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1], True
        held = value._Namespace__attrs if isinstance(value, Namespace) else value
        self.spend(1 + (2 if isinstance(held, Mapping) else 1) * len(held))
        entries: Iterable[object] = chain.from_iterable(held.items()) if isinstance(held, Mapping) else held
        total = 2 + (len(value.text) if isinstance(value, WrittenMapping) else 0)
        for entry in entries:
            size, stays = self._measured(entry, inside)
            total += 2 + size
            fixed = fixed and stays
            self.expect(total)
        if fixed:
            self._sizes[id(value)] = (value, total)
        return total, fixed

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
