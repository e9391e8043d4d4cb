"""The executor's promises: a step makes no tensor of its own, writes nothing but its own memory, and repeats itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slotwise.core.backend import Launch
from slotwise.core.errors import PlanError
from slotwise.engine.engine import Engine
from slotwise.engine.executor import Executor
from slotwise.plans.memory import Budget, need_of
from slotwise.plans.options import PlanOptions
from slotwise.plans.program import PREFILL
from slotwise.slots.step import TARGET

from . import tiny
from .tiny import DraftChoice, TinyWeights, alone, finish, outcome, prompt_of, request, run, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}
GUARD = 173


class Watch(TorchDispatchMode):
    """Notes every PyTorch operation that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def decoding_engine(draft: str, acceptance: str, temperature: float, penalty: float) -> Engine:
    """Three sequences, all decoding."""
    engine = tiny_engine(MODEL, DRAFTS[draft], acceptance=acceptance, adaptive=False)
    sampling = {"temperature": temperature, "repetition_penalty": penalty}
    sequences = [engine.add(request(prompt_of(5 + n, n), 30, **sampling)) for n in range(3)]
    while any(s.state != "decode" for s in sequences):
        engine.step()
    return engine


@pytest.mark.parametrize(("temperature", "penalty"), [(0.0, 1.2), (1.0, 1.2), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_no_tensor_is_made_in_a_decode_step_outside_kernels(
    draft: str, acceptance: str, temperature: float, penalty: float
) -> None:
    # A draft model drafts round by round for those with penalties, else in a loop.
    engine = decoding_engine(draft, acceptance, temperature, penalty)
    # With launches that do nothing, whatever PyTorch is asked for is asked by the engine itself.
    launched: list[tuple[Launch, ...]] = []
    engine.executor._launch = launched.append  # type: ignore[method-assign]
    for name in {"ok", "rounds.ok"} & engine.executor.arrays.keys():
        engine.executor.arrays[name][:] = 1
    with Watch() as watch:
        for _ in range(4):
            engine.step()
    assert len(launched) >= 8
    assert watch.calls == []


def test_the_watch_sees_a_tensor_being_made() -> None:
    with Watch() as watch:
        torch.zeros(3)
    assert watch.calls


UNEVEN = tiny.uneven()


class Captures:
    """A backend that makes one launch of many, as CUDA graphs do, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, chains_prefill: bool) -> None:
        self.sizes: list[int] = []
        self.replays = 0
        monkeypatch.setattr(
            tiny, "uneven", lambda: dataclasses.replace(UNEVEN, chain=self._chain, chains_prefill=chains_prefill)
        )

    def _chain(self, launches: Sequence[Launch], threads: int | None) -> Launch:
        self.sizes.append(len(launches))

        def replay() -> None:
            self.replays += 1
            for launch in launches:
                launch()

        return replay


@pytest.mark.parametrize("chains_prefill", [False, True])
def test_every_program_is_captured_whole_at_load_but_prefill_where_a_backend_runs_that_eagerly(
    monkeypatch: pytest.MonkeyPatch, chains_prefill: bool
) -> None:
    captures = Captures(monkeypatch, chains_prefill=chains_prefill)
    engine = tiny_engine(MODEL, DRAFTS["model"], share_prefixes=False)
    wanted = [p for p in engine.executor.plan.programs if chains_prefill or p.kind != PREFILL]
    assert captures.sizes == [len(p.graph.nodes) for p in wanted]
    assert len(wanted) < len(engine.executor.plan.programs) or chains_prefill
    run(engine, [request(prompt_of(9), 5), request(prompt_of(9), 5)])
    drafting = captures.sizes[len(wanted) :]
    assert drafting
    run(engine, [request(prompt_of(9), 5), request(prompt_of(9), 5)])
    assert captures.sizes[len(wanted) :] == drafting, "a draft loop is captured at its first use, once"


@pytest.mark.parametrize(("draft", "width"), [("none", 0), ("model", 3)])
def test_a_captured_decode_step_replays_each_program_once(
    monkeypatch: pytest.MonkeyPatch, draft: str, width: int
) -> None:
    captures = Captures(monkeypatch, chains_prefill=False)
    engine = tiny_engine(MODEL, DRAFTS[draft], adaptive=False, speculate=3)
    wanted = [request(prompt_of(5, n), 12) for n in range(2)]
    sequences = [engine.add(each) for each in wanted]
    while any(s.state != "decode" for s in sequences):
        engine.step()
    before, launches = captures.replays, engine.executor.launches_run
    engine.step()
    # The target's program and the sampler's; with drafts also acceptance, and one for all drafts.
    assert captures.replays - before == (2 if not width else 4)
    assert engine.executor.launches_run - launches == captures.replays - before
    finish(engine)
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, each)) for each in wanted]


def test_a_plan_beyond_this_machines_memory_is_refused_before_a_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.tiny_plan(MODEL.spec, None, PlanOptions(capacity=60, decode_rows=8))
    present = Budget(need_of(plan).peak - 1, "this machine has")
    monkeypatch.setattr(Budget, "here", lambda device: present)
    with pytest.raises(
        PlanError, match=rf"needs .* \({present.nbytes + 1} bytes\), this machine has .* weights .* arena"
    ):
        Executor(plan, {})
    monkeypatch.setattr(Budget, "here", lambda device: Budget(present.nbytes + 1, present.said))
    with pytest.raises(KeyError):  # it goes on to the weights, which nobody gave
        Executor(plan, {})


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_two_runs_with_the_same_seeds_give_the_same(draft: str, acceptance: str) -> None:
    wanted = [request(prompt_of(4 + n, n), 15, temperature=0.9, seed=n) for n in range(4)]
    first, second = (run(tiny_engine(MODEL, DRAFTS[draft], acceptance=acceptance), wanted) for _ in range(2))
    assert [outcome(c) for c in first] == [outcome(c) for c in second]


def test_a_request_without_a_seed_gets_one_that_repeats_it() -> None:
    engine = tiny_engine(MODEL)
    (first,) = run(engine, [request((1, 2), 20, temperature=1.0, seed=None)])
    (second,) = run(engine, [request((1, 2), 20, temperature=1.0, seed=first.stats.seed)])
    (other,) = run(engine, [request((1, 2), 20, temperature=1.0, seed=None)])
    assert first.token_ids == second.token_ids
    assert other.stats.seed != first.stats.seed


@pytest.mark.parametrize("draft", DRAFTS)
def test_what_lies_in_memory_before_a_step_never_matters(draft: str) -> None:
    # Arena, arrays and every slot that nobody has written are filled with rubbish, and again after each step.
    wanted = [request(prompt_of(4 + 3 * n, n), 12, temperature=0.5 * n, seed=n) for n in range(4)]
    expected = [outcome(c) for c in run(tiny_engine(MODEL, DRAFTS[draft], adaptive=False), wanted)]
    engine = tiny_engine(MODEL, DRAFTS[draft], adaptive=False)
    for caches in engine.executor.caches.values():
        for cache in caches.values():
            cache.fill_(float("nan"))
    sequences = [engine.add(one) for one in wanted]
    while not engine.is_idle:
        engine.executor.arena.fill_(255)
        for array in engine.executor.arrays.values():
            array.view("uint8").fill(GUARD)
        engine.step()
    assert [outcome(s.completion()) for s in sequences] == expected


@pytest.mark.parametrize("draft", DRAFTS)
def test_kernels_write_nothing_outside_arena_arrays_and_owned_or_scratch_slots(draft: str) -> None:
    engine = tiny_engine(MODEL, DRAFTS[draft], adaptive=False, pages=24, capacity=30)
    for caches in engine.executor.caches.values():
        for cache in caches.values():
            cache.fill_(GUARD)
    weights = {
        role: {name: tensor.clone() for name, tensor in tensors.items()}
        for role, tensors in engine.executor.weights.items()
    }
    (sequence,) = [engine.add(request(prompt_of(8), 6))]
    written: dict[str, set[int]] = {role: set() for role in engine.ledger.roles}
    while not engine.is_idle:
        engine.step()
        for role, ledger in engine.ledger.roles.items():
            if sequence.lane is not None:
                count = int(ledger.page_count[sequence.lane])
                written[role] |= set(ledger.page_table[sequence.lane, :count].tolist())
    for role, caches in engine.executor.caches.items():
        ledger = engine.ledger[role]
        # Pages that speculation took and gave back between two looks come next in the pool's order.
        allowed = {0} | written[role] | {max(written[role], default=0) + n for n in (1, 2)}
        for cache in caches.values():
            pages = cache.view(-1, ledger.page_size, *cache.shape[1:])
            touched = {page for page in range(len(pages)) if not (pages[page] == GUARD).all()}
            assert touched <= allowed
            assert len(touched) < len(pages)
    for role, tensors in engine.executor.weights.items():
        assert all(torch.equal(tensor, weights[role][name]) for name, tensor in tensors.items())


def test_every_intermediate_value_lies_in_the_arena_within_its_place() -> None:
    plan = tiny_engine(MODEL, DRAFTS["model"]).plan
    for program in plan.programs:
        for place in program.placements:
            assert place.offset >= 0
            assert place.offset + place.nbytes <= plan.arena_bytes


def test_weights_of_another_shape_are_refused_by_name() -> None:
    shapes = tuple((name, (5, 16) if name == "head" else shape) for name, shape in MODEL.weights.shapes)
    engine = tiny_engine(MODEL)
    with pytest.raises(PlanError, match="head"):
        Executor(engine.plan, {TARGET: TinyWeights(shapes, 1)})


def test_progress_is_reported_while_loading_up_to_the_end() -> None:
    seen: dict[str, tuple[int, int]] = {}
    engine = tiny_engine(MODEL, DRAFTS["model"])
    weights = {"target": MODEL.weights, "draft": MODEL.draft().weights}
    Executor(engine.plan, weights, lambda what, done, total: seen.update({what: (done, total)}))
    assert set(seen) >= {"loading target", "loading draft", "preparing kernels"}
    assert all(done == total for done, total in seen.values())


def test_a_probe_sees_every_kernel_with_its_program() -> None:
    engine, seen = tiny_engine(MODEL), []
    engine.executor.probe = lambda program, kernel, seconds, _: seen.append((program, kernel, seconds >= 0))
    engine.add(request(prompt_of(5), 3))
    finish(engine)
    assert len(seen) == engine.executor.launches_run > 0
    names = {program.name for program in engine.plan.programs}
    assert {program for program, _, _ in seen} <= names
    assert {kernel.split(":")[0] for _, kernel, _ in seen} == {"reference"}


def test_a_bucket_is_the_smallest_that_holds_the_rows() -> None:
    executor = tiny_engine(MODEL).executor
    buckets = executor.plan.buckets(TARGET, "decode")
    for rows in range(1, buckets[-1] + 1):
        assert executor.bucket(TARGET, "decode", rows) == min(size for size in buckets if size >= rows)
    with pytest.raises(PlanError, match="rows"):
        executor.bucket(TARGET, "decode", buckets[-1] + 1)


def test_options_do_not_change_what_a_plan_computes() -> None:
    # Another arena layout, other buckets, other lanes: the same bits.
    one = request(prompt_of(9), 12, temperature=0.8)
    found = set()
    for options in ({"max_sequences": 1}, {"max_sequences": 9, "decode_rows": 40}, {"speculate": 1}, {"capacity": 33}):
        (completion,) = run(tiny_engine(MODEL, "ngram", **options), [one])
        found.add((completion.token_ids, tuple(entry.logprob for entry in completion.logprobs or ())))
    assert len(found) == 1
    assert dataclasses.is_dataclass(one)
