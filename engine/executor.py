"""The executor: a plan's memory, and its programs bound to it.

Owns weights, caches, the arena and the engine's arrays. What always holds: everything is allocated and every kernel
bound at load; running a program calls prepared launches and makes no tensor of its own (a reference kernel's
temporaries are PyTorch's); nothing outside the arena, the arrays and the caches is written.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slotwise.core.backend import Launch, TimedLaunch, load_backend
from slotwise.core.errors import PlanError
from slotwise.core.graph import Node, Value
from slotwise.core.model import WeightSource
from slotwise.engine.arrays import Arrays, Parcel, lay_out
from slotwise.engine.calls import BoundCall, Conductor
from slotwise.engine.loops import BoundProgram, Loops, TensorOf
from slotwise.engine.memory import Shelf, memory_on
from slotwise.engine.streams import DeviceStream, Done, Stream, ThreadStream
from slotwise.engine.weights import Progress, load_weights
from slotwise.plans.arrays import input_array, output_arrays
from slotwise.plans.checks.overlap import why_no_overlap
from slotwise.plans.loop import DraftLoop, round_buffer
from slotwise.plans.memory import FOLLOWS, Budget, arrays_of, device_of, refuse_beyond
from slotwise.plans.plan import Plan
from slotwise.plans.program import PREFILL, SAMPLER, Program
from slotwise.slots.rows import RowInputs
from slotwise.slots.step import DRAFT

Probe = Callable[[str, str, float, bool], None]
"""Called as (program name, kernel, seconds, whether it was timed from within a chain) for each call of a program, in
order, when timing is on. With the kernel "", the seconds are those that a chain took until it had begun."""

Key = tuple[str, str, int]
"""A program: role, kind, rows."""


@dataclass(frozen=True, slots=True)
class Started:
    """Programs that run beside the host; `run` is their number among all runs of the executor."""

    parcel: Parcel
    done: Done
    run: int


class Executor:
    """Holds what a plan needs to run. `weights` gives each role's tensors.

    `arrays[name]` is the engine's array `name` as numpy; where kernels run on a GPU, `arrays` does the copying. `calls`
    are each program's calls with their tensors, by role, kind and rows; a `conductor`, where one is set, runs them in
    the executor's place. `threads` is the number of threads for backends that bring their own. `overlap` says whether
    programs may be started and waited for later: None where kernels run beside the host by nature, on a GPU; True on a
    CPU too, by a thread. Raises PlanError when a weight does not have the shape that the plan says.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, WeightSource],
        progress: Progress | None = None,
        threads: int | None = None,
        overlap: bool | None = None,
    ) -> None:
        self.plan = plan
        self._backends = {name: load_backend(name) for name in plan.backends}
        self._threads = threads
        place = device_of(plan)
        refuse_beyond(plan, Budget.here(place), overlap=bool(overlap))
        device = torch.device(place)
        written = {name for program in plan.programs for name in self._outputs(program)}
        on_device = device.type != "cpu"
        self.stream: Stream | None = None
        if overlap is not False and (overlap or on_device) and why_no_overlap(plan) is None:
            self.stream = DeviceStream() if on_device else ThreadStream()
        layout = lay_out(arrays_of(plan), written | {round_buffer(name) for name in written}, device)
        self.buffers = layout.buffers
        self.arrays = Arrays(layout, separate=on_device or self.stream is not None)
        self.arena = memory_on(device, plan.arena_bytes)
        self.caches = {role.role: _caches(plan, role.role, device) for role in plan.roles}
        self.weights = {
            role.role: _on(device, load_weights(role.parameters, weights[role.role], role.role, progress))
            for role in plan.roles
        }
        self.runs = 0
        self.launches_run = 0
        self.seconds_in_kernels = 0.0
        self.time_kernels = False
        self.probe: Probe | None = None
        self.conductor: Conductor | None = None
        self.calls: dict[Key, tuple[BoundCall, ...]] = {}
        self._programs: dict[Key, Program] = {}
        self._buckets: dict[tuple[str, str], tuple[int, ...]] = {}
        self._launches: dict[Key, tuple[Launch, ...]] = {}
        self._rows: dict[tuple[str, int], RowInputs] = {}
        self._touches: dict[Key, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        tell = None if progress is None else functools.partial(_tell_bound, _kinds(plan), progress)
        for program in plan.programs:
            key = (program.role, program.kind, program.rows)
            self._programs[key] = program
            self.calls[key] = self._bind(program, self.buffers.__getitem__, self.buffers.__getitem__, tell)
            reads = tuple(self._input(program, value) for value in program.graph.inputs)
            self._touches[key] = reads, self._outputs(program)
            self._launches[key] = self._chained([(program, self.calls[key])])
            self._buckets[key[:2]] = plan.buckets(program.role, program.kind)
            if program.role != SAMPLER and (program.role, program.rows) not in self._rows:
                self._rows[program.role, program.rows] = self._row_inputs(program)
        self._runs: dict[tuple[Key, ...], tuple[tuple[str, ...], tuple[str, ...], tuple[Launch, ...]]] = {}
        self._feed = tuple(self.buffers[name] for name in ("sampled", FOLLOWS, "token_ids"))
        self.loops = Loops(plan, self.buffers, self.arrays, self._bind, self._chained)

    def bucket(self, role: str, kind: str, rows: int) -> int:
        """The smallest bucket of that kind that holds `rows` rows; raises PlanError when there is none."""
        for bucket in self._buckets[role, kind]:
            if bucket >= rows:
                return bucket
        raise PlanError(f"no {kind} program of role {role} holds {rows} rows; there are {self._buckets[role, kind]}")

    def most_rows(self, role: str, kind: str) -> int:
        """Rows of the largest program of that kind."""
        return self._buckets[role, kind][-1]

    def row_inputs(self, role: str, rows: int) -> RowInputs:
        """The arrays that programs of this role and bucket read, for `fill_rows`."""
        return self._rows[role, rows]

    def run(self, role: str, kind: str, rows: int) -> None:
        """Run the program of exactly this bucket on what its arrays hold."""
        reads, writes = self._touches[role, kind, rows]
        self._begin(reads, rows)
        key = role, kind, rows
        if self.conductor is not None or self.probe is not None:
            self._run_watched([(self._programs[key], self.calls[key])], self._launches[key])
        else:
            self._launch(self._launches[key])
        self.arrays.after(writes)

    def run_loop(self, loop: DraftLoop, rounds: int) -> None:
        """Run the first `rounds` rounds of a draft loop on what its arrays hold, as one launch where backends can."""
        bound = self.loops.bound(loop, rounds)
        self._begin(bound.reads, loop.first)
        if self.conductor is not None or self.probe is not None:
            self._run_watched(bound.programs, bound.launches)
        else:
            self._launch(bound.launches)
        self.arrays.after(bound.writes)

    def start(self, keys: tuple[Key, ...], follows: npt.NDArray[np.int64] | None = None) -> Started:
        """Start programs, one after another, on what the arrays hold, without waiting for them.

        `follows[i]` is the row of the last run whose sampled token row i is fed; None feeds `token_ids` as they are.
        Raises PlanError when programs cannot run beside the host here.
        """
        if self.stream is None:
            raise PlanError("these programs do not run beside the host; load the model with overlap=True")
        if keys not in self._runs:
            self._runs[keys] = self._run_of(keys)
        reads, writes, launches = self._runs[keys]
        rows, n = keys[0][2], 0
        if follows is not None:
            n = follows.size
            self.arrays[FOLLOWS][:n] = follows
        parcel = self.arrays.pack(reads, rows)

        def work() -> None:
            self.arrays.send(parcel, reads, rows)
            if n:
                sampled, index, fed = self._feed
                torch.index_select(sampled, 0, index[:n], out=fed[:n])
            for launch in launches:
                launch()
            self.arrays.fetch(parcel)

        done = self.stream.start(work)
        self.arrays.after(writes)
        self.runs += 1
        self.launches_run += len(launches)
        return Started(parcel, done, self.runs)

    def finish(self, started: Started, names: Sequence[str]) -> list[npt.NDArray[np.generic]]:
        """Wait for started programs; copies of those of their short results. Raises what they raised."""
        started.done.wait()
        found = [started.parcel.short[name].copy() for name in names]
        self.arrays.give_back(started.parcel)
        return found

    def _run_of(self, keys: tuple[Key, ...]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Launch, ...]]:
        """What programs, one after another, read that none before them wrote; what they write; their launches."""
        reads: dict[str, None] = {}
        writes: dict[str, None] = {}
        for key in keys:
            read, written = self._touches[key]
            reads |= {name: None for name in read if name not in writes}
            writes |= dict.fromkeys(written)
        return tuple(reads), tuple(writes), tuple(launch for key in keys for launch in self._launches[key])

    def _begin(self, reads: Iterable[str], rows: int) -> None:
        """What the host launches itself comes after what it has started."""
        if self.stream is not None:
            self.stream.join()
        self.runs += 1
        self.arrays.before(tuple(reads), rows)

    def _launch(self, launches: tuple[Launch, ...]) -> None:
        self.launches_run += len(launches)
        if self.time_kernels:
            start = time.perf_counter()
            for launch in launches:
                launch()
            self.seconds_in_kernels += time.perf_counter() - start
        else:
            for launch in launches:
                launch()

    def _run_watched(self, programs: Sequence[BoundProgram], launches: Sequence[Launch]) -> None:
        """Under the conductor, call by call; else under the probe: from within chains that can be timed so, else each
        call launched by itself.
        """
        if self.conductor is not None:
            for program, calls in programs:
                self.conductor(program, calls)
            return
        pairs = [(program.name, call) for program, calls in programs for call in calls]
        single = {id(call.launch) for _, call in pairs}
        if not all(isinstance(launch, TimedLaunch) or id(launch) in single for launch in launches):
            launches = [call.launch for _, call in pairs]
        self.launches_run += len(launches)
        waiting = iter(pairs)
        for launch in launches:
            if isinstance(launch, TimedLaunch):
                begun, each = launch.timed()
                self._tell(pairs[0][0], "", begun, True)
                for seconds in each:
                    name, call = next(waiting)
                    self._tell(name, _kernel(call), seconds, True)
                continue
            start = time.perf_counter()
            launch()
            seconds = time.perf_counter() - start
            name, call = next(waiting)
            self._tell(name, _kernel(call), seconds, False)

    def _tell(self, program: str, kernel: str, seconds: float, is_inside: bool) -> None:
        self.seconds_in_kernels += seconds
        if self.probe is not None:
            self.probe(program, kernel, seconds, is_inside)

    def _bind(
        self, program: Program, read: TensorOf, written: TensorOf, tell: Callable[[Node], None] | None = None
    ) -> tuple[BoundCall, ...]:
        """Give every node's kernel its tensors: arrays to read and to write, weights, caches, views of the arena.

        `tell` hears of each node before its kernel is bound.
        """
        tensors: dict[str, torch.Tensor] = {}
        for value in program.graph.inputs:
            tensors[value.name] = _leading(read(self._input(program, value)), value)
        for name, value in zip(self._outputs(program), program.graph.outputs, strict=True):
            tensors[value.name] = _leading(written(name), value)
        if program.role != SAMPLER:
            tensors |= self.weights[program.role]
            tensors |= self.caches[program.role]
        places = {place.value: place for place in program.placements}
        calls: list[BoundCall] = []
        for index, node in enumerate(program.graph.nodes):
            for value in node.outputs:
                if value.name not in tensors:
                    place = places[value.name]
                    raw = self.arena[place.offset : place.offset + value.spec.nbytes()]
                    tensors[value.name] = raw.view(value.spec.dtype.torch).view(value.spec.sizes())
            if node.selection is None:
                raise PlanError(f"program {program.name}, call {index}: op {node.op} has no kernel")
            scratch = places.get(f"ws{index}")
            workspace = None if scratch is None else self.arena[scratch.offset : scratch.offset + scratch.nbytes]
            if tell is not None:
                tell(node)
            kernel = self._backends[node.selection.backend].kernel(node.selection.kernel.partition(":")[2])
            inputs = tuple(None if value is None else tensors[value.name] for value in node.inputs)
            outputs = tuple(tensors[value.name] for value in node.outputs)
            calls.append(BoundCall(node, inputs, outputs, kernel.bind(inputs, outputs, node.attr_dict, workspace)))
        return tuple(calls)

    def _input(self, program: Program, value: Value) -> str:
        return input_array(program, value, self.plan.target.vocab_size)

    def _outputs(self, program: Program) -> tuple[str, ...]:
        return output_arrays(program, self.plan.options.acceptance, self.plan.target.vocab_size)

    def _chained(self, programs: Iterable[BoundProgram]) -> tuple[Launch, ...]:
        """Their launches, each run of those that one `chain` makes into one made so; backends may share a chain."""
        pairs: list[tuple[Any, Launch]] = []
        for program, calls in programs:
            backends = [
                self._backends[call.node.selection.backend] for call in calls if call.node.selection is not None
            ]
            chains = [each.chain if each.chains_prefill or program.kind != PREFILL else None for each in backends]
            pairs += zip(chains, [call.launch for call in calls], strict=True)
        found: list[Launch] = []
        for chain, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
            parts = [launch for _, launch in run]
            found += parts if chain is None else [chain(parts, self._threads)]
        return tuple(found)

    def _row_inputs(self, program: Program) -> RowInputs:
        rows, array = program.rows, functools.partial(_int32, self.arrays)
        is_narrow = program.role == DRAFT and self.plan.drafts_fewer_ids
        return RowInputs(
            rows,
            token_ids=array("token_ids")[:rows],
            positions=array("positions")[:rows],
            slots=array("slots")[:rows],
            row_start=array("row_start")[: rows + 1],
            kv_len=array("kv_len")[:rows],
            page_table=array(f"{program.role}.page_table")[:rows],
            id_limit=self.plan.role(DRAFT).vocab_size if is_narrow else None,
        )

    def set_logit_row(self, row: int) -> None:
        """Say which row of a prefill call gives logits."""
        if "logit_rows" in self.arrays:
            self.arrays["logit_rows"][0] = row


def _kernel(call: BoundCall) -> str:
    return "" if call.node.selection is None else call.node.selection.kernel


def _kind(node: Node) -> tuple[object, ...]:
    """What calls have in common that one compiled kernel serves, as far as a plan shows it."""
    chosen = None if node.selection is None else node.selection.kernel
    dtypes = tuple(value.spec.dtype for value in (*node.inputs, *node.outputs) if value is not None)
    return chosen, node.attrs, dtypes


def _kinds(plan: Plan) -> dict[tuple[object, ...], bool]:
    """Every kind of call of a plan; none is bound yet."""
    return {_kind(node): False for program in plan.programs for node in program.graph.nodes}


def _tell_bound(kinds: dict[tuple[object, ...], bool], progress: Progress, node: Node) -> None:
    """Report how many kinds of calls are bound: it is the first of a kind that takes time, where it is compiled."""
    kind = _kind(node)
    if not kinds[kind]:
        progress("preparing kernels", sum(kinds.values()), len(kinds))
        kinds[kind] = True
        if all(kinds.values()):
            progress("preparing kernels", len(kinds), len(kinds))


def _int32(arrays: Arrays, name: str) -> npt.NDArray[np.int32]:
    found: npt.NDArray[np.int32] = arrays[name].view(np.int32)
    return found


def _leading(buffer: torch.Tensor, value: Value) -> torch.Tensor:
    """The first rows of an array, as many as the program's value has."""
    return buffer[: value.spec.sizes()[0]]


def _caches(plan: Plan, role_name: str, device: torch.device) -> dict[str, torch.Tensor]:
    role = plan.role(role_name)
    parts = {state.value_name(part.name): part for state in role.states for part in state.parts}
    shelf = Shelf(sum(Shelf.room(role.slots * part.nbytes) for part in parts.values()), device)
    return {name: shelf.take((role.slots, *part.shape), part.dtype.torch) for name, part in parts.items()}


def _on(device: torch.device, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on `device`; what two names share is moved once."""
    moved = {id(tensor): tensor.to(device) for tensor in tensors.values()}
    return {name: moved[id(tensor)] for name, tensor in tensors.items()}
