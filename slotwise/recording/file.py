"""Recordings: a file with everything that a run decided, one JSON object a line, each complete when it is written.

Owns `Recording`, its reader and the line format. What always holds: every line ends with a checksum of itself, so a
line that was damaged or edited is found and named; a file that ends in the middle of a line is a recording cut short,
good up to there; the plan in the first line has a digest of its own and is read by the reader of plans.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slotwise.core.errors import PlanError, RecordingError
from slotwise.engine.sampling import Sampling
from slotwise.plans.plan import Plan

SCHEMA = 1
"""Version of the lines; raised when a reader of the old form could misread the new one."""

KEY = "slotwise_recording"
_CHECKSUM = re.compile(r',"crc":(\d+)\}$')
KINDS = ("request", "cancel", "step", "crash", "end")

Json = dict[str, Any]


@dataclass(frozen=True)
class Recording:
    """A recording in memory.

    `header` is the first line; `events` all others in order: each has exactly one of the keys `request`, `cancel`,
    `step`, `crash` and `end`. `is_cut` says that the file stops before its end.
    """

    path: str
    header: Json
    plan: Plan
    events: tuple[Json, ...]
    is_cut: bool

    @property
    def steps(self) -> tuple[Json, ...]:
        """The steps, in order."""
        return tuple(event for event in self.events if "step" in event)

    @property
    def requests(self) -> dict[int, Json]:
        """Requests by sequence number."""
        return {event["request"]: event for event in self.events if "request" in event}

    @property
    def crash(self) -> Json | None:
        """What the run ended with, when it crashed."""
        return next((event for event in self.events if "crash" in event), None)

    @property
    def is_whole(self) -> bool:
        """Whether its steps begin with the engine's first; what a crash wrote by itself has only the last ones."""
        return bool(self.header["from_start"])

    @property
    def texts(self) -> dict[int, str]:
        """Tokens as text: all that the recording speaks of, if it was made with a tokenizer."""
        return {int(token): text for event in self.events for token, text in event.get("texts", ())}

    def tokens(self) -> dict[int, list[int]]:
        """The tokens that each sequence was given, by sequence number."""
        found: dict[int, list[int]] = {number: [] for number in self.requests}
        crash = self.crash
        if not self.is_whole and crash is not None:
            return found | {int(number): list(tokens) for number, tokens in crash["tokens"].items()}
        for step in self.steps:
            for number, tokens in step["tokens"]:
                found.setdefault(number, []).extend(tokens)
        return found


def write_line(entry: Json) -> str:
    """One object as a line with its checksum."""
    text = json.dumps(entry, separators=(",", ":"))
    return f'{text[:-1]},"crc":{zlib.crc32(text.encode())}}}\n'


def is_recording(path: str | Path) -> bool:
    """Whether a file begins as recordings do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(KEY) + 2) == f'{{"{KEY}'.encode()
    except OSError:
        return False


def read_recording(path: str | Path) -> Recording:
    """Read a recording.

    Raises RecordingError for a file that cannot be read, is no recording, is of another schema, or has a damaged line
    before its last; and for a plan inside that this version does not read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecordingError(
            f"recording {path} cannot be read: {error.strerror or error}; `slotwise generate --record FILE` makes one"
        ) from error
    except UnicodeDecodeError as error:
        raise RecordingError(f"recording {path} cannot be read: it is not UTF-8 text, so no recording") from error
    lines = text.split("\n")
    is_cut = lines[-1] != ""
    lines = [line for line in lines if line]
    entries: list[Json] = []
    for number, line in enumerate(lines, 1):
        entry = _read_line(line)
        if entry is None:
            if number == len(lines) and number > 1:
                is_cut = True
                break
            raise RecordingError(_about_bad_line(path, number, line))
        entries.append(entry)
    if not entries:
        raise RecordingError(f"{path} is empty; make a recording with `slotwise generate --record FILE`")
    header, events = entries[0], entries[1:]
    plan = _checked_header(path, header)
    for number, event in enumerate(events, 2):
        if sum(kind in event for kind in KINDS) != 1:
            raise RecordingError(
                f"recording {path}, line {number}: expected one of {', '.join(KINDS)}; nothing else is known"
            )
    is_cut = is_cut or not events or not ("end" in events[-1] or "crash" in events[-1])
    return Recording(str(path), header, plan, tuple(events), is_cut)


def _read_line(line: str) -> Json | None:
    """The object, or None when the line is not intact."""
    found = _CHECKSUM.search(line)
    if found is None or zlib.crc32((line[: found.start()] + "}").encode()) != int(found[1]):
        return None
    try:
        entry = json.loads(line[: found.start()] + "}")
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _about_bad_line(path: str | Path, number: int, line: str) -> str:
    if number > 1:
        return f"recording {path}, line {number}: damaged or edited: its checksum does not match; record the run again"
    if KEY not in line[:200]:
        return f"{path} is no recording: its first line has no {KEY!r}; make one with `slotwise generate --record FILE`"
    return f"recording {path}, line 1: damaged, edited or cut short before anything ran; record the run again"


def _checked_header(path: str | Path, header: Json) -> Plan:
    if KEY not in header:
        raise RecordingError(_about_bad_line(path, 1, ""))
    schema = header[KEY]
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "update Slotwise to read it" if newer else "record the run again with this version"
        raise RecordingError(
            f"recording {path} has schema {schema!r} (Slotwise {header.get('version', 'unknown')}), this version reads "
            f"schema {SCHEMA}; {advice}"
        )
    missing = [name for name in ("version", "plan", "folders", "from_start") if name not in header]
    if missing:
        raise RecordingError(f"recording {path}, line 1: {', '.join(missing)} is missing; record the run again")
    try:
        return Plan.from_json(json.dumps(header["plan"]))
    except PlanError as error:
        raise RecordingError(f"recording {path} (Slotwise {header['version']}): {error}") from error


def sampling_to_json(sampling: Sampling, seed: int) -> Json:
    """A request's sampling with the seed that was drawn for it."""
    found = dict(vars(sampling))
    # Minus infinity, which bans, is no number of JSON; as text it is one that `float` reads.
    found["logit_bias"] = [[token, _json_number(bias)] for token, bias in sampling.logit_bias.items()]
    found["sequence_bias"] = [[ids, _json_number(bias)] for ids, bias in sampling.sequence_bias]
    return {**found, "seed": seed}


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def sampling_from_json(data: Json) -> Sampling:
    """The reverse; raises RecordingError for fields that this version does not know."""
    try:
        biases = {int(token): float(bias) for token, bias in data["logit_bias"]}
        sequences = [(ids, float(bias)) for ids, bias in data.get("sequence_bias", ())]
        return Sampling(**{**data, "logit_bias": biases, "sequence_bias": sequences})
    except (TypeError, KeyError, ValueError) as error:
        raise RecordingError(f"a recorded request has a sampling that this version does not read: {error}") from error
