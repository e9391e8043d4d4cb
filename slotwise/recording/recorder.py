"""The recorder: writes what the engine decides, step by step, as it happens.

Owns `Recorder` and `record`. What always holds: each line is flushed before the next step begins, so a crash leaves
all that came before it; the recorder changes nothing of what is generated; a disk that fails ends the recording, not
the requests, and is reported when the recording is closed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from slotwise.core.errors import OptionError, OutputError
from slotwise.engine.acceptance import Verdict
from slotwise.engine.calls import BoundCall
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.engine.sequence import Sequence as Running
from slotwise.plans.program import Program
from slotwise.recording.file import Json, write_line
from slotwise.recording.lines import crash_line, decode_line, header_of, ledger_sums, prefill_line, request_line
from slotwise.slots.binding import Binding
from slotwise.slots.pages import PagePool
from slotwise.slots.step import TARGET

Sink = Callable[[Json], None]


class Recorder(Observer):
    """Turns what an engine does into lines for `sink`. Attach it while the engine is idle."""

    def __init__(self, engine: Engine, sink: Sink) -> None:
        self._engine, self._sink = engine, sink
        self._watch = SlotWatch(engine)
        self._live: dict[int, Running] = {}
        self._seen: dict[int, tuple[str, int | None, int]] = {}
        self._line: Json = {}
        self._told: set[int] = set()
        self._started = self._began = time.perf_counter()

    def added(self, sequence: Running) -> None:
        """See `Observer`."""
        self._tell(request_line(sequence, self._engine.epoch), sequence.request.prompt_ids)
        self._live[sequence.id] = sequence
        self._seen[sequence.id] = ("waiting", None, 0)

    def began(self, epoch: int) -> None:
        """See `Observer`."""
        self.report_cancelled()
        self._began = time.perf_counter()
        self._line = {"step": epoch, "prefill": [], "decode": None}

    def bound(self, binding: Binding) -> None:
        """See `Observer`."""
        if binding.step.limits:
            self._line["decode"] = decode_line(binding)
            self._line["bound"] = self._watch.changes()
        else:
            self._line["prefill"].append(prefill_line(binding))

    def judged(self, binding: Binding, verdicts: Sequence[Verdict]) -> None:
        """See `Observer`."""
        tokens = self._engine.lanes.tokens
        self._line["decode"]["drafts"] = [
            tokens[lane, length : length + width].tolist()
            for lane, length, width in zip(
                binding.lanes.tolist(), binding.length.tolist(), binding.width.tolist(), strict=True
            )
        ]
        self._line["decode"]["accepted"] = [len(verdict.candidates) - (verdict.fault is None) for verdict in verdicts]

    def ended(self, epoch: int) -> None:
        """See `Observer`."""
        line = self._finished_line()
        drafts = (line["decode"] or {}).get("drafts", [])
        self._tell(line, [token for tokens in (*drafts, *(fresh for _, fresh in line["tokens"])) for token in tokens])

    def _tell(self, line: Json, tokens: Iterable[int]) -> None:
        """Write a line, with the texts of those of its tokens that no line before had."""
        pieces = self._engine.pieces
        fresh = sorted(set(tokens) - self._told)
        if pieces is not None and fresh:
            line["texts"] = [[token, pieces.shown(token)] for token in fresh]
            self._told.update(fresh)
        self._sink(line)

    def crashed(self, epoch: int, error: Exception) -> None:
        """See `Observer`."""
        self._sink({**crash_line(self._engine, epoch, error, self._live.values()), "under_way": self._line})

    def report_cancelled(self) -> None:
        """Write a line for each sequence that was ended from outside since the last step."""
        for number, sequence in list(self._live.items()):
            if sequence.state == "done" and self._seen[number][0] != "done":
                if sequence.finish_reason == "cancelled":
                    self._sink({"cancel": number, "after": self._engine.epoch})
                del self._live[number]

    def _finished_line(self) -> Json:
        line, now = self._line, time.perf_counter()
        line["tokens"], line["sequences"], line["ended"] = [], [], []
        for number, sequence in list(self._live.items()):
            state, lane, count = self._seen[number]
            fresh = sequence.tokens[sequence.prompt_length + count :]
            if fresh:
                line["tokens"].append([number, fresh])
            if (sequence.state, sequence.lane) != (state, lane):
                line["sequences"].append([number, sequence.state, sequence.lane])
            self._seen[number] = (sequence.state, sequence.lane, count + len(fresh))
            if sequence.state == "done":
                line["ended"].append([number, sequence.finish_reason, _text(sequence.error)])
                del self._live[number]
        line["after"] = self._watch.changes()
        line["ledger"] = ledger_sums(self._engine)
        line["t"], line["s"] = round(self._began - self._started, 6), round(now - self._began, 6)
        return line


class SlotWatch:
    """Says what changed of pages, page tables and marks since it was last asked, by role; see docs/recordings.md."""

    def __init__(self, engine: Engine) -> None:
        self._roles = engine.ledger.roles
        self._pages: dict[str, dict[int, tuple[int, int]]] = {role: {} for role in self._roles}
        self._tables: dict[str, dict[int, list[int]]] = {role: {} for role in self._roles}
        self._marks: dict[str, dict[int, tuple[int, int]]] = {role: {} for role in self._roles}

    def changes(self) -> Json:
        """By role: `pages` [[page, holders, cached]], `tables` [[lane, from, [page, ...]]], `marks` [[lane, committed,
        reserved]]; what did not change is left out.
        """
        found: Json = {}
        for name, role in self._roles.items():
            tables, marks = [], []
            for lane in range(len(role.committed)):
                table = role.page_table[lane, : role.page_count[lane]].tolist()
                before = self._tables[name].get(lane, [])
                if table != before:
                    same = next((i for i, (a, b) in enumerate(zip(table, before, strict=False)) if a != b), None)
                    start = min(len(table), len(before)) if same is None else same
                    tables.append([lane, start, table[start:]])
                    self._tables[name][lane] = table
                mark = (int(role.committed[lane]), int(role.reserved[lane]))
                if mark != self._marks[name].get(lane, (0, 0)):
                    marks.append([lane, *mark])
                    self._marks[name][lane] = mark
            changed = {"pages": self._changed_pages(name, role.pool), "tables": tables, "marks": marks}
            if any(changed.values()):
                found[name] = {key: value for key, value in changed.items() if value}
        return found

    def _changed_pages(self, name: str, pool: PagePool) -> list[list[int]]:
        cached, known = set(pool.cached), self._pages[name]
        changed = []
        for page, holders in enumerate(pool.references.tolist()):
            state = (holders, int(page in cached))
            if state != known.get(page, (0, 0)):
                changed.append([page, *state])
                known[page] = state
        return changed


def _text(error: Exception | None) -> str | None:
    return None if error is None else str(error)


class LogitsKeeper:
    """An executor's conductor that keeps the target's logits of every call, `step<epoch>.call<n>` f32 [rows, V]."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tensors: dict[str, torch.Tensor] = {}
        self._counts: dict[int, int] = {}

    def __call__(self, program: Program, calls: tuple[BoundCall, ...]) -> None:
        """Run the calls; copy the logits of real rows."""
        for call in calls:
            call.launch()
        if program.role != TARGET:
            return
        buffers, epoch = self._engine.executor.buffers, self._engine.epoch
        rows = 1 if program.kind == "prefill" else int(buffers["row_start"][program.rows])
        number = self._counts[epoch] = self._counts.get(epoch, -1) + 1
        self.tensors[f"step{epoch}.call{number}"] = buffers["logits"][:rows].to("cpu", copy=True)


@contextmanager
def record(
    engine: Engine, path: str | Path, folders: Mapping[str, str | None], *, tensors: bool = False
) -> Iterator[Recorder]:
    """Record what `engine` does into the file `path` until the block ends; `tensors` keeps logits too.

    Raises OutputError when the file cannot be written, at its end too; OptionError when the engine is busy.
    """
    if not engine.is_idle:
        raise OptionError("a recording begins while nothing runs; finish or cancel the running requests first")
    beside = f"{Path(path).name}.safetensors" if tensors else None
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise OutputError(f"recording {path}: cannot be written: {error}") from error
    faults: list[OSError] = []

    def write(line: Json) -> None:
        if faults:
            return
        try:
            file.write(write_line(line))
            file.flush()
        except OSError as error:
            faults.append(error)

    recorder = Recorder(engine, write)
    write(header_of(engine, folders, from_start=engine.epoch == 0, tensors=beside))
    keeper = LogitsKeeper(engine) if tensors else None
    engine.observers.append(recorder)
    before = engine.executor.conductor
    if keeper is not None:
        engine.executor.conductor = keeper
    try:
        yield recorder
    finally:
        engine.observers.remove(recorder)
        engine.executor.conductor = before
        recorder.report_cancelled()
        write({"end": engine.epoch})
        try:
            file.close()
            if keeper is not None:
                save_file(keeper.tensors, f"{path}.safetensors")
        except OSError as error:
            faults.append(error)
    if faults:
        raise OutputError(f"recording {path} is incomplete: {faults[0]}; what was generated is not touched by it")
