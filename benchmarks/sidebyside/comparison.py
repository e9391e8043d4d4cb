"""One shape, all engines, several rounds.

Owns `compare` and its `Comparison`. What always holds: an engine that is missing, fails or computes something else is
named with its reason, and never keeps the others from being measured; memory bandwidth is read before and after
every turn, and arithmetic before it, so that each figure has limits of its own time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sidebyside import guard
from sidebyside.arithmetic import multiply_adds_per_second
from sidebyside.bandwidth import MemoryReader
from sidebyside.engine import About, EngineSpec
from sidebyside.machine import Disturbance, available_bytes
from sidebyside.rounds import Samples, rotated
from sidebyside.shapes import Shape
from sidebyside.work import BATCH, DECODE, DECODE_BATCH, PREFILL, WORKS, Pace, Work
from sidebyside.workers import EngineFailed, Worker

MEMORY = "memory"
READ, COPY = "read", "copy"
LIMIT_SHARE = {DECODE: "decode, of bandwidth", DECODE_BATCH: f"batch {BATCH}, of bandwidth"}
ARITHMETIC = "arithmetic"
MULTIPLY_ADDS = "multiply-adds"
ARITHMETIC_SHARE = {work: f"{work}, of arithmetic" for work in (DECODE_BATCH, PREFILL)}
LONGEST_TURN = 8.0
"""Times its share that work may take beyond it, by the trial; what takes longer is left out."""

Say = Callable[[str], None]


@dataclass
class Comparison:
    """What came out for one shape.

    Samples are rates, by engine and work, and shares of what memory and float32 arithmetic allow. (Products in whole
    numbers may do more than all of the latter.)
    """

    shape: Shape
    threads: int
    samples: Samples = field(default_factory=Samples)
    about: dict[str, About] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    findings: dict[str, guard.Finding] = field(default_factory=dict)
    seconds: float = 0.0
    disturbance: dict[str, float] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, guard.Finding]:
        """Engines whose logits are not what they should be."""
        return {name: finding for name, finding in self.findings.items() if finding.is_wrong}


def compare(
    shape: Shape,
    folder: Path,
    specs: Sequence[EngineSpec],
    checks: Sequence[EngineSpec],
    *,
    threads: int,
    rounds: int,
    share: float,
    works: Sequence[Work] = WORKS,
    say: Say,
) -> Comparison:
    """Measure `specs` for `rounds` rounds; `checks` are engines whose logits alone are looked at.

    `share` is the seconds that a turn of decoding may take.
    """
    found, begun, disturbance = Comparison(shape, threads), time.monotonic(), Disturbance()
    memory = MemoryReader(threads)
    workers: dict[str, Worker] = {}
    try:
        for spec in specs:
            say(f"{shape.name}: loading {spec.name}")
            _start(spec, shape, folder, threads, found, workers)
        say(f"{shape.name}: comparing logits")
        _check(found, workers, checks, folder)
        paces = {}
        for name in list(workers):
            say(f"{shape.name}: trying {name}")
            with _Failing(found, workers, name):
                paces[name] = Pace.of(workers[name].ask, shape.vocab)
        for turn in range(rounds):
            for work in works:
                # Bandwidth is read before and after every turn; a turn's limit is the mean of the two.
                before = _read(found, memory)
                for name in rotated(list(workers), turn):
                    seconds = work.fixed_seconds(paces[name])
                    if work.may_be_left_out and seconds > LONGEST_TURN * share:
                        reason = f"left out, for a turn would take {seconds:.0f} s or more"
                        found.left_out[f"{name}, {' and '.join(work.names)}"] = reason
                        continue
                    say(f"{shape.name}: round {turn + 1} of {rounds}, {' and '.join(work.names)}, {name}")
                    with _Failing(found, workers, name):
                        possible = _multiply(found, threads)
                        rates = work.run(workers[name].ask, shape.vocab, turn, paces[name], share)
                        after = _read(found, memory)
                        for kind, rate in rates.items():
                            found.samples.add(name, kind, turn, rate)
                        for kind in ARITHMETIC_SHARE.keys() & rates.keys():
                            multiplied = rates[kind] * shape.multiply_adds(logits=kind == DECODE_BATCH)
                            found.samples.add(name, ARITHMETIC_SHARE[kind], turn, multiplied / possible)
                        for kind in LIMIT_SHARE.keys() & rates.keys():
                            needed = step_bytes(shape, found.about[name], paces[name].cached_tokens(kind, share))
                            steps = rates[kind] / (BATCH if kind == DECODE_BATCH else 1)
                            found.samples.add(name, LIMIT_SHARE[kind], turn, 2 * steps * needed / (before + after))
                        before = after
            found.samples.add(MEMORY, COPY, turn, memory.copy())
    finally:
        for worker in workers.values():
            worker.close()
    found.seconds = time.monotonic() - begun
    found.disturbance = disturbance.shares()
    return found


def step_bytes(shape: Shape, about: About, cached_tokens: float) -> float:
    """Bytes that a decode step has to read: the weights once, and the cached tokens of all sequences."""
    return about.weight_bytes + shape.cache_bytes(cached_tokens, about.kv_itemsize)


def _read(found: Comparison, memory: MemoryReader) -> float:
    speed = memory.read()
    found.samples.add(MEMORY, READ, len(found.samples.values(MEMORY, READ)), speed)
    return speed


def _multiply(found: Comparison, threads: int) -> float:
    speed = multiply_adds_per_second(threads)
    found.samples.add(ARITHMETIC, MULTIPLY_ADDS, len(found.samples.values(ARITHMETIC, MULTIPLY_ADDS)), speed)
    return speed


def _start(
    spec: EngineSpec, shape: Shape, folder: Path, threads: int, found: Comparison, workers: dict[str, Worker]
) -> None:
    needed, available = spec.bytes_a_weight * shape.parameters + 2**29, available_bytes()
    if available is not None and available < needed + 2**30:
        found.missing[spec.name] = (
            f"needs about {needed / 2**30:.1f} GiB and {available / 2**30:.1f} are free; compare fewer with --engines"
        )
        return
    with _Failing(found, workers, spec.name):
        workers[spec.name] = worker = Worker(spec, threads, shape=shape, folder=folder)
        found.about[spec.name] = worker.about


def _check(found: Comparison, workers: dict[str, Worker], checks: Sequence[EngineSpec], folder: Path) -> None:
    """Compare the logits of a prompt; engines that are only checked come and go."""
    prompt = random.Random(7).choices(range(found.shape.vocab), k=24)
    logits = {}
    for name in list(workers):
        with _Failing(found, workers, name):
            logits[name] = workers[name].ask("logits", prompt)
    if guard.REFERENCE in logits:
        for spec in checks:
            passing: dict[str, Worker] = {}
            _start(spec, found.shape, folder, found.threads, found, passing)
            with _Failing(found, passing, spec.name):
                if spec.name in passing:
                    logits[spec.name] = passing[spec.name].ask("logits", prompt)
            for worker in passing.values():
                worker.close()
    found.findings = guard.judge(logits)


class _Failing:
    """`with _Failing(...):` an engine that fails inside is taken out, with its reason."""

    def __init__(self, found: Comparison, workers: dict[str, Worker], name: str) -> None:
        self._found, self._workers, self._name = found, workers, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if not isinstance(error, EngineFailed):
            return False
        self._found.missing[self._name] = str(error)
        worker = self._workers.pop(self._name, None)
        if worker is not None:
            worker.close()
        return True
