"""The crash recorder: when a step raises, a recording is written by itself.

Owns `CrashRecorder`. What always holds: until then it costs a few references a step; what it writes is a recording
like any other, with the live requests, their tokens, the last steps, the ledger, and where the error came from.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from slotwise.core.errors import SlotwiseError
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.engine.sequence import Sequence as Running
from slotwise.recording.file import Json, write_line
from slotwise.recording.lines import crash_line, decode_line, header_of, ledger_sums, prefill_line, request_line
from slotwise.slots.binding import Binding

STEPS = 32
"""Bindings that a crash recording ends with."""


class CrashRecorder(Observer):
    """Remembers what is under way; `path` is the file that it wrote, once a step has crashed.

    Files go to `folder`, or where the system keeps temporary ones. Only the first crash of an engine is written: what
    follows is its consequence.
    """

    is_in_step = False

    def __init__(self, engine: Engine, folders: Mapping[str, str | None], folder: str | Path | None = None) -> None:
        self._engine, self._folders, self._folder = engine, folders, folder
        self._live: dict[int, Running] = {}
        self._bindings: deque[Binding] = deque(maxlen=STEPS)
        self.path: Path | None = None

    def added(self, sequence: Running) -> None:
        """See `Observer`."""
        if len(self._live) >= 2 * self._engine.plan.options.max_sequences:
            self._live = {number: each for number, each in self._live.items() if each.state != "done"}
        self._live[sequence.id] = sequence

    def bound(self, binding: Binding) -> None:
        """See `Observer`."""
        self._bindings.append(binding)

    def crashed(self, epoch: int, error: Exception) -> None:
        """See `Observer`."""
        if self.path is not None:
            return
        try:
            descriptor, name = tempfile.mkstemp(".jsonl", "slotwise-crash-", self._folder)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                for line in self._lines(epoch, error):
                    file.write(write_line(line))
        except OSError:
            return  # The crash itself matters more than its recording.
        self.path = Path(name)
        note = f"a recording of this crash is in {name}; `slotwise replay {name}` runs it again"
        if isinstance(error, SlotwiseError):
            error.args = (f"{error}\n{note}", *error.args[1:])
        elif hasattr(error, "add_note"):
            error.add_note(note)

    def _lines(self, epoch: int, error: Exception) -> list[Json]:
        live = [each for each in self._live.values() if each.state != "done" or each.error is not None]
        steps: dict[int, Json] = {}
        for binding in self._bindings:
            line = steps.setdefault(binding.epoch, {"step": binding.epoch, "prefill": [], "decode": None})
            if binding.step.limits:
                line["decode"] = decode_line(binding)
            else:
                line["prefill"].append(prefill_line(binding))
        for line in steps.values():
            line |= {"tokens": [], "sequences": [], "ended": [], "after": {}, "ledger": ledger_sums(self._engine)}
        return [
            header_of(self._engine, self._folders, from_start=False),
            *(request_line(each, 0) for each in live),
            *steps.values(),
            crash_line(self._engine, epoch, error, live),
        ]
