"""The parser of every command: wrong use in one sentence, with the nearest name.

Owns `Parser`. What always holds: wrong use ends with exit code 2 and one line on the error stream that names what was
not understood; parsing imports nothing but argparse and the names of errors, so that it takes no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from slotwise.core.errors import nearest


class Parser(argparse.ArgumentParser):
    """An argument parser that says what it does not know and what it may have meant."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See argparse; here nothing stays unknown."""
        self._words = list(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and one line."""
        if message.startswith("the following arguments are required"):
            # A mistyped option may be why something else is missing; it is the better thing to say.
            for word in self._words:
                if word.startswith("--") and len(word) > 2 and not self._get_option_tuples(word.partition("=")[0]):
                    self._refuse(word)
        self.exit(2, f"{self.prog}: error: {message}; `{self.prog} --help` says more\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            hint = nearest(str(value), known)
            raise argparse.ArgumentError(action, f"{value!r} is not known{hint}; there are {', '.join(known)}")

    def _refuse(self, word: str) -> NoReturn:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"{word!r} is one argument too many")
        self.error(f"there is no option {name}{nearest(name, self._option_string_actions)}")
