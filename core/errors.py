"""Every error that Slotwise raises on purpose.

Owns the exception tree. What always holds: each error derives from `SlotwiseError`, and its message names the object,
what was expected, what was found and what to do. A `SlotwiseError` that reaches a user is a sentence, not a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlotwiseError(Exception):
    """Base of all errors of this project; catch it to catch every one of them."""


class CheckpointError(SlotwiseError):
    """A checkpoint folder is missing something, damaged, hostile or not supported."""


class HubError(SlotwiseError):
    """A model cannot be had from a hub: it is not there, not given, or the way to it or to the disk is cut."""


class GraphError(SlotwiseError):
    """A graph breaks a rule of the IR; the message carries the lines around the fault."""


class ContractError(SlotwiseError):
    """An op was declared or used against its contract."""


class KernelSelectionError(SlotwiseError):
    """No chosen backend can run an op; the message lists every backend asked and its reason."""


class BackendError(SlotwiseError):
    """A backend is unknown or cannot be loaded on this machine."""


class PlanError(SlotwiseError):
    """A plan cannot be compiled, read or trusted."""


class VerificationError(PlanError):
    """The verifier found that a plan or a binding breaks a named rule; `rule` is that name."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule = rule


class LedgerError(SlotwiseError):
    """Slot accounting does not balance; the message names the step and prints the ledger."""


class OutOfPages(SlotwiseError):
    """The page pool cannot give what was asked; nothing was changed by the attempt."""


class RecordingError(SlotwiseError):
    """A recording cannot be read, is damaged, or was made by another version or for another checkpoint."""


class OutputError(SlotwiseError):
    """A file cannot be written where it was asked for."""


class OptionError(SlotwiseError, ValueError):
    """An option, preset key or argument has a value that makes no sense."""


class RequestError(SlotwiseError, ValueError):
    """One request cannot be served as asked; other requests are not touched by it."""


class SequenceFault(SlotwiseError):
    """A running sequence failed (NaN logits, a kernel that raised, a drafter that lied); it alone ends."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, None where none is close."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)), None)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = nearest_name(name, known)
    return "" if close is None else f" (did you mean '{close}'?)"
