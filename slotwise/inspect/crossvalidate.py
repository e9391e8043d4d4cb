"""Cross-validation: every op x backend x dtype x case against the float64 oracle, and the backends against each other.

Owns `crossvalidate`. What always holds: a check that failed fails the run unless a waiver excuses it, and a waiver that
has nothing left to excuse fails it too; a backend that this machine cannot run is named, not passed over in silence;
the same seed draws the same inputs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from slotwise.core.backend import Backend, backend_names, load_backend
from slotwise.core.contract import OpContract
from slotwise.core.errors import BackendError, OptionError, nearest
from slotwise.core.ops import contract_of, contracts
from slotwise.core.specs import DType
from slotwise.inspect.calls import plan_calls
from slotwise.inspect.checks import Agreement, Check, Verdict
from slotwise.inspect.crossvalidate_report import CrossValidation
from slotwise.inspect.sample import Job, quick_sample, seconds_for
from slotwise.inspect.waivers import Waiver, read_waivers
from slotwise.keywords import known_keywords
from slotwise.plans.plan import Plan
from slotwise.progress import Report
from slotwise.proving.measures import cosine, ulps_between
from slotwise.proving.validate import CaseResult, Trial, cases_of, check_row_invariance, dtypes_of, try_case


@known_keywords
def crossvalidate(
    plan: Plan | str | Path | None = None,
    *,
    backends: Sequence[str | Backend] | str | None = None,
    ops: Sequence[str] | str | None = None,
    dtypes: Sequence[str | DType] | str | None = None,
    cases: Sequence[str] | str | None = None,
    quick: bool = True,
    seed: int = 0,
    waivers: Sequence[Waiver] | str | Path = (),
    timed: bool = True,
    progress: Report | None = None,
    announce: Callable[[str], None] | None = None,
) -> CrossValidation:
    """Try every kernel in every dtype on a case of its op; or, with `plan`, on exactly that plan's calls.

    `quick` false tries every case, and so does naming `cases`. `announce` hears how many trials there are and about how
    long they take, before they begin.
    `backends` are names or `Backend` records (default: all that this machine can run); `ops` and `cases` are patterns
    as a shell's; `waivers` a file or records. Raises OptionError for a filter that matches nothing, BackendError for a
    backend that was named and cannot run here, PlanError for a plan that cannot be read.
    """
    chosen, missing = _backends(backends)
    if isinstance(plan, (str, Path)):
        plan = Plan.load(plan)
    excuses = read_waivers(waivers) if isinstance(waivers, (str, Path)) else tuple(waivers)
    wanted = tuple(DType.parse(d) for d in _several(dtypes))
    jobs = list(_case_jobs(chosen, seed) if plan is None else _plan_jobs(plan, chosen, backends is not None, seed))
    jobs = _filtered(jobs, _several(ops), wanted, _several(cases))
    of_all = len(jobs)
    if quick and plan is None and cases is None:
        jobs = quick_sample(jobs, seed)
    if announce is not None:
        rest = f" of {of_all} (a sample: every kernel and dtype once)" if len(jobs) < of_all else ""
        announce(f"{len(jobs)} trials{rest}, about {_duration(seconds_for(jobs))}")
    checks: list[Check] = []
    agreements: list[Agreement] = []
    trials: list[tuple[Job, Trial]] = []
    for number, job in enumerate(jobs):
        if trials and _company(trials[-1][0]) != _company(job):
            agreements += _agreements(trials)
            trials.clear()
        trial = try_case(job.kernel, job.contract, job.case, job.dtype, device=job.backend.device, timed=timed)
        trials.append((job, trial))
        checks.append(_settle(_oracle_check(job, trial), excuses))
        if job.contract.rows is not None and job.kernel.is_row_invariant(1) and trial.result.outcome != "refused":
            rows = check_row_invariance(job.kernel, job.contract, job.case, job.dtype, device=job.backend.device)
            checks.append(_settle(_check(job, "rows", rows), excuses))
        if progress is not None:
            progress("validating", number + 1, len(jobs))
    agreements += _agreements(trials)
    about = "the contracts' cases" if plan is None else f"the calls of the plan for {plan.target.model}"
    return CrossValidation(tuple(checks), tuple(agreements), missing, seed, about, of_all - len(jobs))


def _duration(seconds: float) -> str:
    """A time to be expected, as roughly as it is known."""
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{round(seconds / 60)} minutes"


def _backends(named: Sequence[str | Backend] | str | None) -> tuple[list[Backend], dict[str, str]]:
    """The backends to try, and those that cannot run here with the reason."""
    found: list[Backend] = []
    missing: dict[str, str] = {}
    for each in backend_names() if named is None else _several(named):
        try:
            backend = load_backend(each) if isinstance(each, str) else each
            reason = backend.unavailable()
        except BackendError as error:
            if named is not None:
                raise
            missing[str(each)] = str(error)
            continue
        if reason is None:
            found.append(backend)
        elif named is not None:
            raise BackendError(f"backend {backend.name!r} cannot run here: {reason}")
        else:
            missing[backend.name] = reason
    return found, missing


def _several(value: Any) -> tuple[Any, ...]:
    """One or several of something, or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, (str, DType, Backend)) else tuple(value)


def _case_jobs(backends: Sequence[Backend], seed: int) -> Iterator[Job]:
    for contract in contracts().values():
        cases = cases_of(contract, seed)
        for dtype in dtypes_of(contract):
            for case in cases:
                for backend in backends:
                    for kernel in backend.kernels_for(contract.name):
                        yield Job(contract, backend, kernel, case, dtype)


def _plan_jobs(plan: Plan, backends: Sequence[Backend], are_named: bool, seed: int) -> Iterator[Job]:
    """The plan's own kernels on its calls; where backends were named, their kernels for the same calls beside them."""
    known = {backend.name: backend for backend in backends}
    for call in plan_calls(plan, seed):
        contract = contract_of(call.op)
        name, _, kernel_name = call.kernel.partition(":")
        own = known.get(name) or load_backend(name)
        if not are_named or name in known:
            yield Job(contract, own, own.kernel(kernel_name), call.case, call.dtype)
        for backend in backends if are_named else ():
            for kernel in backend.kernels_for(call.op):
                if (backend.name, kernel.name) != (name, kernel_name):
                    yield Job(contract, backend, kernel, call.case, call.dtype)


def _filtered(jobs: list[Job], ops: Sequence[object], dtypes: Sequence[DType], cases: Sequence[object]) -> list[Job]:
    namings: tuple[tuple[str, Sequence[object], Callable[[Job], str]], ...] = (
        ("op", ops, lambda job: job.contract.name),
        ("dtype", [dtype.value for dtype in dtypes], lambda job: job.dtype.value),
        ("case", cases, lambda job: job.case.name),
    )
    for word, patterns, name_of in namings:
        if not patterns:
            continue
        names = sorted({name_of(job) for job in jobs})
        for pattern in patterns:
            if not fnmatch.filter(names, str(pattern)):
                raise OptionError(
                    f"no {word} here matches {pattern!r}{nearest(str(pattern), names)}; there are {', '.join(names)}"
                )
        jobs = [job for job in jobs if any(fnmatch.fnmatchcase(name_of(job), str(p)) for p in patterns)]
    if not jobs:
        raise OptionError("there is nothing to validate: the chosen backends have no kernel for what was asked")
    return jobs


def _company(job: Job) -> tuple[str, str, str]:
    return job.contract.name, job.dtype.value, job.case.name


def _check(job: Job, check: str, result: CaseResult) -> Check:
    verdict: Verdict = "ok" if result.outcome == "passed" else result.outcome
    message, reason = ("", result.message) if verdict == "refused" else (result.message, "")
    return Check(
        op=job.contract.name,
        backend=job.backend.name,
        kernel=job.kernel.name,
        dtype=job.dtype.value,
        case=job.case.name,
        check=check,
        verdict=verdict,
        rule=result.rule,
        message=message,
        reason=reason,
    )


def _oracle_check(job: Job, trial: Trial) -> Check:
    check = replace(_check(job, "oracle", trial.result), seconds=trial.seconds)
    if not trial.outputs:
        return check
    pairs = list(_pairs(job.contract, trial.outputs, trial.expected))
    return replace(
        check,
        max_abs=trial.result.max_abs,
        max_rel=trial.result.max_rel,
        ulps=max((int(ulps_between(got, want).max()) for got, want in pairs if got.numel()), default=0),
        cosine=min((cosine(got, want) for got, want in pairs if got.is_floating_point()), default=None),
    )


def _pairs(
    contract: OpContract, left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What of two results means something: a row that is not `ok` has no token."""
    ok = right.get("ok")
    for name, got in left.items():
        want = right[name]
        if ok is not None and name != "ok" and not got.is_floating_point():
            got, want = got[ok.bool()], want[ok.bool()]
        yield got.cpu(), want.cpu()


def _agreements(trials: Sequence[tuple[Job, Trial]]) -> Iterator[Agreement]:
    """Every two kernels of different backends on the same case."""
    ran = [(job, trial) for job, trial in trials if trial.outputs]
    for place, (job, trial) in enumerate(ran):
        for other, its in ran[place + 1 :]:
            if other.backend.name == job.backend.name:
                continue
            pairs = list(_pairs(job.contract, trial.outputs, its.outputs))
            gaps = [(a.double() - b.double()).abs().nan_to_num(nan=0.0) for a, b in pairs if a.numel()]
            yield Agreement(
                *_company(job),
                f"{job.backend.name}:{job.kernel.name}",
                f"{other.backend.name}:{other.kernel.name}",
                max((float(gap.max()) for gap in gaps), default=0.0),
                max((int(ulps_between(a, b).max()) for a, b in pairs if a.numel()), default=0),
            )


def _settle(check: Check, waivers: Sequence[Waiver]) -> Check:
    """The check with what the waivers make of it."""
    if check.verdict == "refused":
        return check
    for waiver in waivers:
        names = {name: getattr(check, name) for name in ("op", "backend", "kernel", "dtype", "case", "check")}
        if waiver.covers(**names):
            verdict: Verdict = "waived" if check.verdict == "failed" else "unexpected pass"
            return replace(check, verdict=verdict, reason=waiver.reason)
    return check
