"""Traces that Perfetto (and Chrome's tracing page) open.

Owns `plan_trace` and `recording_trace`. What always holds: the format is the Trace Event Format's JSON; a recording's
steps lie at the times that were measured, a plan's calls one after another at their roofline times, which the names of
the tracks say.
Source: "Trace Event Format", Google, and https://perfetto.dev/docs/getting-started/other-formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from slotwise.inspect.view import BANDWIDTH, GFLOPS, program_data
from slotwise.plans.plan import Plan
from slotwise.recording.file import Recording

Event = dict[str, Any]
STEPS, PLAN = 1, 2
"""Process numbers of the two kinds of tracks."""


def trace(plan: Plan, recording: Recording | None, *, bandwidth: float = BANDWIDTH, gflops: float = GFLOPS) -> str:
    """The trace of a recording, or of a plan where there is none, as JSON text."""
    events = plan_trace(plan, bandwidth, gflops) if recording is None else recording_trace(recording)
    return json.dumps({"displayTimeUnit": "ns", "traceEvents": list(events)}, separators=(",", ":")) + "\n"


def plan_trace(plan: Plan, bandwidth: float, gflops: float) -> Iterator[Event]:
    """A track for each program; `bandwidth` in GB/s, `gflops` in GFLOP/s."""
    yield _name("process_name", PLAN, 0, f"roofline at {bandwidth:g} GB/s and {gflops:g} GFLOP/s")
    for number, program in enumerate(plan.programs, 1):
        yield _name("thread_name", PLAN, number, program.name)
        start = 0.0
        for call in program_data(program)["calls"]:
            micro = max(call["bytes"] / bandwidth / 1e3, call["flops"] / gflops / 1e3)
            arguments = {"kernel": call["kernel"], "bytes": call["bytes"], "flops": call["flops"], "call": call["text"]}
            yield _slice(PLAN, number, call["op"], start, micro, arguments)
            start += micro


def recording_trace(recording: Recording) -> Iterator[Event]:
    """A track of steps, one for each sequence, and counters of pages and kept tokens."""
    yield _name("process_name", STEPS, 0, "engine")
    yield _name("thread_name", STEPS, 0, "steps")
    for number in recording.requests:
        yield _name("thread_name", STEPS, number + 1, f"sequence {number}")
    for step in recording.steps:
        if "t" not in step:
            continue  # a crash's last steps have no times
        start, length = step["t"] * 1e6, step["s"] * 1e6
        sums = {"ledger": step["ledger"], "tokens": sum(len(tokens) for _, tokens in step["tokens"])}
        yield _slice(STEPS, 0, f"step {step['step']}", start, length, sums)
        for chunk in step["prefill"]:
            name = f"prefill {chunk['role']} {chunk['begin']}..{chunk['end']}"
            yield _slice(STEPS, chunk["seq"] + 1, name, start, length, chunk)
        decode = step["decode"]
        if decode is not None:
            kept = {int(number): tokens for number, tokens in step["tokens"]}
            for place, number in enumerate(decode["seq"]):
                width, tokens = decode["k"][place], kept.get(number, [])
                about = {
                    "len": decode["len"][place],
                    "k": width,
                    "kept": tokens,
                    "drafts": _of(decode, "drafts", place),
                }
                yield _slice(STEPS, number + 1, f"decode k={width} kept {len(tokens)}", start, length, about)
        for role, ledger in step["ledger"].items():
            pages = {key: ledger[key] for key in ("held", "cached", "free")}
            yield {"ph": "C", "pid": STEPS, "name": f"{role} pages", "ts": start + length, "args": pages}
        yield {"ph": "C", "pid": STEPS, "name": "tokens kept", "ts": start + length, "args": {"tokens": sums["tokens"]}}


def _of(decode: dict[str, Any], key: str, place: int) -> Any:
    return decode[key][place] if key in decode else []


def _name(kind: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(process: int, thread: int, name: str, start: float, length: float, about: dict[str, Any]) -> Event:
    """A complete event; times in microseconds."""
    times = {"ts": round(start, 3), "dur": round(length, 3)}
    return {"ph": "X", "pid": process, "tid": thread, "name": name, **times, "args": about}
