"""Replay: the real engine run again with a recording's requests, compared step by step.

Owns `replay` and `Replay`. What always holds: requests get their recorded seeds and come when they came; on the plan
that was recorded every step's binding, pages and tokens must be the same, and the first difference is named; on
another backend or plan the tokens are compared, and where they part it is said whether the two were all but equally
likely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slotwise.core.errors import RecordingError, SlotwiseError
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence as Running
from slotwise.inspect.near_tie import Parting, judge_parting
from slotwise.llm import LLM
from slotwise.planning import DRAFTING
from slotwise.plans.options import BackendChoice
from slotwise.recording.file import Json, Recording, read_recording, sampling_from_json
from slotwise.recording.recorder import Recorder

IGNORED = ("t", "s", "crc", "texts")
"""Keys of a step that say when it ran or what tokens look like, not what it did."""

AHEAD = 100_000
"""Steps after which a replay that does not end is given up."""


@dataclass(frozen=True)
class Replay:
    """What a replay found.

    `steps` is how many steps were compared (0 where only tokens were), `difference` the first difference of a step,
    `partings` where tokens part, by sequence; `crash` what the replay itself raised, None when it ran through.
    """

    recording: Recording
    same_plan: bool
    steps: int
    difference: str | None
    partings: tuple[Parting, ...]
    crash: str | None

    @property
    def is_same(self) -> bool:
        """Whether the run was the recorded one: tokens, and on the same plan every step."""
        return not self.partings and (self.difference is None or not self.same_plan) and self.is_crash_alike

    @property
    def is_crash_alike(self) -> bool:
        """Whether the replay crashed if and only if the recording did."""
        return (self.crash is None) == (self.recording.crash is None)

    def __str__(self) -> str:
        recorded, lines = self.recording, []
        if recorded.is_cut:
            lines.append(f"the recording is cut short after step {_last_step(recorded)}; it is replayed up to there")
        if recorded.crash is not None:
            lines.append(_about_crash(recorded.crash))
            lines.append(
                f"the replay raised too: {self.crash}" if self.crash else "the replay ran past that without an error"
            )
        elif self.crash:
            lines.append(f"the replay raised, the recording did not: {self.crash}")
        if self.difference is not None:
            lines.append(f"first difference: {self.difference}")
        lines += [str(parting) for parting in self.partings]
        count = sum(map(len, recorded.tokens().values()))
        what = f"{self.steps} steps and {count} tokens" if self.steps else f"{count} tokens"
        if self.is_same:
            lines.append(f"the same: {what} of {len(recorded.requests)} requests")
        elif not self.partings:
            lines.append(f"the same tokens: {count} of {len(recorded.requests)} requests")
        return "\n".join(lines)


def replay(
    source: str | Path | Recording,
    *,
    model: str | Path | None = None,
    draft: str | Path | None = None,
    backend: BackendChoice | None = None,
    threads: int | None = None,
) -> Replay:
    """Run a recording again; `model` and `draft` stand in for the folders that it names, `backend` for its backends.

    Raises RecordingError for a recording that is damaged, of another version, or for other checkpoints than these.
    """
    recording = source if isinstance(source, Recording) else read_recording(source)
    llm = load_recorded(recording, model=model, draft=draft, backend=backend, threads=threads)
    return replay_on(llm.engine, recording)


def load_recorded(
    recording: Recording,
    *,
    model: str | Path | None = None,
    draft: str | Path | None = None,
    backend: BackendChoice | None = None,
    threads: int | None = None,
) -> LLM:
    """The recorded model and plan, loaded; with `backend`, the same options on another backend."""
    folders = recording.header["folders"]
    model = model or folders.get("model")
    draft = draft or folders.get("draft")
    if model is None:
        raise RecordingError(f"recording {recording.path} names no checkpoint folder; give it with --model")
    threads = threads or recording.header.get("threads")
    options = recording.plan.options
    try:
        if backend is None:
            return LLM(model, draft=draft, plan=recording.plan, threads=threads, progress=False)
        # A plan has a value for each option; where nothing drafts, those of drafting were given by nobody.
        idle = DRAFTING if draft is None else ()
        chosen = {name: value for name, value in vars(options).items() if name not in idle} | {"backend": backend}
        llm = LLM(model, draft=draft, threads=threads, progress=False, **chosen)
    except SlotwiseError as error:
        raise RecordingError(f"recording {recording.path} cannot be run on {model}: {error}") from error
    for role in recording.plan.roles:
        found = llm.plan().role(role.role).fingerprint
        if found != role.fingerprint:
            raise RecordingError(
                f"recording {recording.path} was made with another checkpoint: its {role.role} is {role.model} with "
                f"fingerprint {role.fingerprint[:12]}, {model if role.role == 'target' else draft} has {found[:12]}"
            )
    return llm


def replay_on(engine: Engine, recording: Recording) -> Replay:
    """Replay on an engine that has not run anything yet."""
    if engine.epoch:
        raise RecordingError(f"a replay needs an engine that has not run yet; this one is at step {engine.epoch}")
    same_plan = engine.plan == recording.plan
    compares_steps = same_plan and recording.is_whole
    lines: list[Json] = []
    recorder = Recorder(engine, lines.append)
    engine.observers.append(recorder)
    sequences: dict[int, Running] = {}
    difference, compared, crash = None, 0, None
    wanted = recording.tokens()
    try:
        for event in recording.events:
            if "request" in event:
                request = Request(tuple(event["prompt_ids"]), sampling_from_json(event["sampling"]))
                sequences[event["request"]] = engine.add(request)
            elif "cancel" in event and event["cancel"] in sequences:
                if not compares_steps:
                    _run(engine, sequences, wanted, {event["cancel"]})
                engine.cancel(sequences[event["cancel"]])
            elif "step" in event and compares_steps and difference is None:
                engine.step()
                compared += 1
                found = next(line for line in reversed(lines) if "step" in line)
                difference = first_difference(_comparable(event), _comparable(found), f"step {event['step']}")
        if not recording.is_cut or not compares_steps or difference is not None:
            _run(engine, sequences, wanted, set(sequences))
    except Exception as error:
        crash = f"{type(error).__name__}: {error}"
    finally:
        engine.observers.remove(recorder)
    partings = []
    for number, sequence in sequences.items():
        given = sequence.tokens[sequence.prompt_length :]
        at = parts_at(wanted[number], given, recorded_ended=_ended(recording, number), ended=sequence.state == "done")
        if at is not None:
            for other in sequences.values():
                engine.cancel(other)
            partings.append(judge_parting(engine, sequence.request, sequence.seed, number, wanted[number], given, at))
    return Replay(recording, same_plan, compared, difference, tuple(partings), crash)


def _run(engine: Engine, sequences: Mapping[int, Running], wanted: Mapping[int, list[int]], chosen: set[int]) -> None:
    """Step until the chosen sequences have as many tokens as were recorded, or have ended."""
    for _ in range(AHEAD):
        waiting = [
            number
            for number in chosen
            if sequences[number].state != "done" and sequences[number].new_tokens < max(1, len(wanted[number]))
        ]
        if not waiting or engine.is_idle:
            return
        engine.step()


def parts_at(recorded: list[int], given: list[int], *, recorded_ended: bool, ended: bool) -> int | None:
    """The first place at which two runs of one request have other tokens, or None.

    Where one run has fewer because it was cut short, what is missing is no difference; where it ended, it is.
    """
    shorter = min(len(recorded), len(given))
    at = next((i for i in range(shorter) if recorded[i] != given[i]), None)
    if at is not None:
        return at
    if len(given) < len(recorded) and ended:
        return shorter
    return shorter if len(recorded) < len(given) and recorded_ended else None


def _ended(recording: Recording, number: int) -> bool:
    """Whether the recorded run of a sequence came to its own end."""
    return any(
        number == each and reason in ("stop", "length") for s in recording.steps for each, reason, _ in s["ended"]
    )


def first_difference(recorded: Any, replayed: Any, where: str) -> str | None:
    """The first place at which two JSON values differ, in words; None where they are equal."""
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        for key in [*recorded, *(key for key in replayed if key not in recorded)]:
            if key not in recorded or key not in replayed:
                have, lack = ("recorded", "replayed") if key in recorded else ("replayed", "recorded")
                return f"{where}: {key} was {have}, not {lack}"
            found = first_difference(recorded[key], replayed[key], f"{where}, {key}")
            if found is not None:
                return found
        return None
    if isinstance(recorded, list) and isinstance(replayed, list):
        for place, (one, other) in enumerate(zip(recorded, replayed, strict=False)):
            found = first_difference(one, other, f"{where}[{place}]")
            if found is not None:
                return found
        if len(recorded) != len(replayed):
            return f"{where}: {len(recorded)} entries recorded, {len(replayed)} replayed"
        return None
    return None if recorded == replayed else f"{where}: recorded {recorded!r}, replayed {replayed!r}"


def _comparable(step: Json) -> Json:
    return {key: value for key, value in step.items() if key not in IGNORED}


def _last_step(recording: Recording) -> int:
    return recording.steps[-1]["step"] if recording.steps else 0


def _about_crash(crash: Json) -> str:
    return (
        f"the recorded run crashed in step {crash['crash']}: {crash['error']} at {crash['where']}: "
        f"{crash['message'].partition(chr(10))[0]}\n{crash['ledger']}"
    )
