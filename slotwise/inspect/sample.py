"""Which trials a quick cross-validation runs, and about how long trials take.

Owns `Job`, `quick_sample` and `seconds_for`. What always holds: every kernel is in the sample once in each dtype, on a
case that it takes if there is one; the kernels of an op get the same case where they can, so that backends are
compared; the sample follows from the jobs and the seed alone, and other seeds pick other cases.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from slotwise.core.backend import Backend, Kernel
from slotwise.core.contract import Case, OpContract
from slotwise.core.specs import DType
from slotwise.proving.validate import call_of, case_inputs, try_case


@dataclass(frozen=True, slots=True)
class Job:
    """One kernel to be tried on one case."""

    contract: OpContract
    backend: Backend
    kernel: Kernel
    case: Case
    dtype: DType

    @property
    def work(self) -> int:
        """What a trial's time goes by, roughly: rows, for each is tried alone too, times elements of the inputs."""
        inputs = case_inputs(self.contract, self.case, self.dtype)
        rows = call_of(self.contract, inputs, self.case.attrs).rows
        return rows * sum(value.numel() for value in inputs if value is not None)


def quick_sample(jobs: Sequence[Job], seed: int) -> list[Job]:
    """One job for each kernel and dtype, in the order of `jobs`.

    Of an op's cases the quarter with the least work is drawn from, beginning with the
    one that the seed and the dtype point at.
    """
    chosen: set[int] = set()
    numbered = list(enumerate(jobs))
    for place, (_, group) in enumerate(groupby(numbered, key=lambda pair: (pair[1].contract.name, pair[1].dtype))):
        of_group = list(group)
        sizes = {id(job.case): job.work for _, job in of_group}
        ordered = sorted(sizes, key=lambda case: sizes[case])
        drawn = max(2, len(ordered) // 4)
        start = (seed + place) % drawn
        ranks = {case: rank for rank, case in enumerate(ordered[start:drawn] + ordered[:start] + ordered[drawn:])}
        of_kernel: dict[tuple[str, str], list[tuple[int, Job]]] = {}
        for number, job in of_group:
            of_kernel.setdefault((job.backend.name, job.kernel.name), []).append((number, job))
        for candidates in of_kernel.values():
            candidates.sort(key=lambda pair: ranks[id(pair[1].case)])
            taken = (number for number, job in candidates if _is_taken(job))
            chosen.add(next(taken, candidates[0][0]))
    return [job for number, job in numbered if number in chosen]


def _is_taken(job: Job) -> bool:
    inputs = case_inputs(job.contract, job.case, job.dtype)
    return job.kernel.refuses(call_of(job.contract, inputs, job.case.attrs)) is None


def seconds_for(jobs: Sequence[Job]) -> float:
    """About how long the jobs take: for each backend, how many it has times what a few of them take here on average.

    The few are spread evenly over the work, and each is run once: a first run also makes what a kernel needs.
    """
    by_backend: dict[str, list[Job]] = {}
    for job in jobs:
        by_backend.setdefault(job.backend.name, []).append(job)
    total = 0.0
    for several in by_backend.values():
        ordered = sorted(several, key=lambda job: job.work)
        few = ordered[len(ordered) // (2 * TRIED) :: max(1, len(ordered) // TRIED)][:TRIED]
        start = time.perf_counter()
        for job in few:
            try_case(job.kernel, job.contract, job.case, job.dtype, device=job.backend.device)
        total += ROWS_TOO * (time.perf_counter() - start) / len(few) * len(several)
    return total


TRIED = 5
"""Jobs of a backend that the estimate runs."""
ROWS_TOO = 4
"""How much longer a job takes than its first check, on average: most are tried for row invariance too."""
