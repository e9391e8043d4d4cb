"""The lines of a recording: what stands in each, taken from the engine's own records.

What always holds: both recorders write these same lines, so what reads one reads the other; nothing here writes a file
or holds on to what it was given. docs/recordings.md describes each key.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import slotwise
from slotwise.engine.engine import Engine
from slotwise.engine.sampling.values import plain
from slotwise.engine.sequence import Sequence as Running
from slotwise.recording.file import KEY, SCHEMA, Json, sampling_to_json
from slotwise.slots.binding import Binding


def header_of(
    engine: Engine, folders: Mapping[str, str | None], *, from_start: bool, tensors: str | None = None
) -> Json:
    """The first line: versions, the plan with its digest and fingerprints, and where the checkpoints were."""
    return {
        KEY: SCHEMA,
        "version": slotwise.__version__,
        "from_start": from_start,
        "folders": dict(folders),
        "tensors": tensors,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "plan": json.loads(engine.plan.to_json()),
    }


def request_line(sequence: Running, epoch: int) -> Json:
    """A request with the seed that it got."""
    return {
        "request": sequence.id,
        "after": epoch,
        "prompt_ids": list(sequence.request.prompt_ids),
        "sampling": sampling_to_json(sequence.request.sampling, sequence.seed),
        "granted": sequence.granted,
    }


def prefill_line(binding: Binding) -> Json:
    """A prefill chunk's numbers."""
    (span,) = binding.spans
    return {
        "seq": binding.sequences[0],
        "role": span.role,
        "lane": int(span.lanes[0]),
        "begin": int(span.begin[0]),
        "end": int(span.end[0]),
        "known": int(binding.length[0]),
    }


def decode_line(binding: Binding) -> Json:
    """A decode step's numbers; `known` are those of the width formula that vary by sequence or step."""
    return {
        "seq": list(binding.sequences),
        "lane": binding.lanes.tolist(),
        "len": binding.length.tolist(),
        "k": binding.width.tolist(),
        "spans": {
            span.role: [
                list(row) for row in zip(span.lanes.tolist(), span.begin.tolist(), span.end.tolist(), strict=True)
            ]
            for span in binding.spans
        },
        "known": {name: plain(value) for name, value in binding.known.items()},
    }


def ledger_sums(engine: Engine) -> Json:
    """Pages and slot flow of each role: the two equations' terms."""
    found = {}
    for name, role in engine.ledger.roles.items():
        count, flow = role.pool.count(), role.flow
        found[name] = {
            "free": count.free,
            "held": count.held,
            "cached": count.cached,
            "total": count.total,
            "reserved": flow.reserved,
            "committed": flow.committed,
            "released": flow.released,
        }
    return found


def crash_line(engine: Engine, epoch: int, error: Exception, live: Iterable[Running]) -> Json:
    """What raised, where, the ledger as it was left, and the tokens that every live sequence had."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return {
        "crash": epoch,
        "error": type(error).__name__,
        "message": str(error),
        "where": "" if last is None else f"{Path(last.filename).name}:{last.lineno} in {last.name}",
        "traceback": "".join(traceback.format_exception(type(error), error, error.__traceback__)),
        "ledger": str(engine.ledger),
        "tokens": {str(s.id): s.tokens[s.prompt_length :] for s in live},
    }
