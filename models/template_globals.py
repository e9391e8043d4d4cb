"""Functions that a chat template has at hand, as in the environment of transformers.

What always holds: they make nothing whose size their operands do not bound without paying for it first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace, generate_lorem_ipsum

from slotwise.models.template_meter import Meter, TemplateLimitError, TemplateRefusalError


class TemplateNamespace(Namespace):
    """What a template can set attributes of; none is underscored."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        Namespace.__init__(self, {})
        for name, value in dict(*given, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"the name {name!r} cannot be set on a namespace")
        super().__setitem__(name, value)


class Mappings:
    """The global `dict`: makes mappings, and has nothing else to reach for."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """What Python's `dict` makes."""
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        """A mapping from each of `keys` to `value`."""
        return dict.fromkeys(self._meter.items(keys), value)


def lorem_ipsum(meter: Meter, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
    """`n` paragraphs of `min` to `max` words that mean nothing."""
    words = n * max if n > 0 and max > 0 else 0
    meter.spend(words)
    meter.expect(16 * words)
    return generate_lorem_ipsum(n, html, min, max)


def raise_exception(message: object) -> None:
    """End the render; templates call it for messages that they do not take."""
    raise TemplateRefusalError(str(message))


def strftime_now(format: str) -> str:
    """Return the local time by a format without widths, which the C library would honour to any size."""
    if len(format) > 256 or re.search(r"%[^a-zA-Z%]*\d", format):
        raise TemplateLimitError("the template asks for a date format that is too long or has a width")
    return datetime.now().strftime(format)
