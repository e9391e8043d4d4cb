"""What observers and conductors are promised: every turn of every step, in order, and no say in what is computed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from slotwise.core.errors import LedgerError
from slotwise.engine.acceptance import Verdict
from slotwise.engine.calls import BoundCall
from slotwise.engine.engine import Engine
from slotwise.engine.observer import Observer
from slotwise.engine.sequence import Sequence as Running
from slotwise.plans.program import Program
from slotwise.slots.binding import Binding

from .tiny import finish, outcome, prompt_of, request, run, tiny_engine, tiny_model

REQUESTS = [request(prompt_of(9), 12, temperature=0.8), request(prompt_of(4, 1), 6), request(prompt_of(5, 2), 9)]


class Listener(Observer):
    """Keeps what it heard, and what it saw of the ledger at each turn."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.heard: list[tuple[str, int]] = []

    def added(self, sequence: Running) -> None:
        self.heard.append(("added", sequence.id))

    def began(self, epoch: int) -> None:
        self.heard.append(("began", epoch))

    def bound(self, binding: Binding) -> None:
        for span in binding.spans:
            role = self._engine.ledger[span.role]
            assert (role.reserved[span.lanes] >= span.end).all()  # reserved, not committed
            assert (role.committed[span.lanes] <= span.begin).all()
        self.heard.append(("bound", binding.epoch))

    def judged(self, binding: Binding, verdicts: Sequence[Verdict]) -> None:
        assert len(verdicts) == len(binding.sequences)
        target = self._engine.ledger["target"]
        assert (target.committed[binding.lanes] == binding.length - 1).all()  # nothing is committed yet
        self.heard.append(("judged", binding.epoch))

    def ended(self, epoch: int) -> None:
        self.heard.append(("ended", epoch))

    def crashed(self, epoch: int, error: Exception) -> None:
        self.heard.append(("crashed", epoch))


def test_an_observer_hears_every_turn_and_changes_nothing() -> None:
    target = tiny_model()
    alone = run(tiny_engine(target, target.draft(), speculate=3), REQUESTS)
    engine = tiny_engine(target, target.draft(), speculate=3)
    listener = Listener(engine)
    engine.observers.append(listener)
    watched = run(engine, REQUESTS)
    assert [outcome(each) for each in watched] == [outcome(each) for each in alone]
    heard = listener.heard
    assert heard[:3] == [("added", 0), ("added", 1), ("added", 2)]
    steps = [epoch for name, epoch in heard if name == "began"]
    assert steps == list(range(1, engine.epoch + 1)) == [epoch for name, epoch in heard if name == "ended"]
    for epoch in steps:
        turns = [name for name, number in heard[3:] if number == epoch]
        assert (turns[0], turns[-1]) == ("began", "ended")
        assert turns.count("judged") == (len(turns) > 2 and turns[-2] == "judged")
    assert {"bound", "judged"} <= {name for name, _ in heard}


def test_an_observer_hears_of_a_crash_and_the_crash_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_model())
    listener = Listener(engine)
    engine.observers.append(listener)
    engine.add(REQUESTS[0])
    engine.step()

    def broken(step: int) -> None:
        raise LedgerError(f"step {step}")

    monkeypatch.setattr(engine.ledger, "check", broken)
    with pytest.raises(LedgerError, match="step 2"):
        engine.step()
    assert listener.heard[-1] == ("crashed", 2)
    assert ("ended", 2) not in listener.heard


def test_a_conductor_runs_every_call_in_the_executors_place() -> None:
    target = tiny_model()
    alone = run(tiny_engine(target), REQUESTS)
    engine = tiny_engine(target)
    launched: list[str] = []

    def conduct(program: Program, calls: tuple[BoundCall, ...]) -> None:
        assert [call.node for call in calls] == list(program.graph.nodes)
        for call in calls:
            assert [tuple(t.shape) for t in call.outputs] == [value.spec.sizes() for value in call.node.outputs]
            call.launch()
            launched.append(call.node.op)

    engine.executor.conductor = conduct
    sequences = [engine.add(each) for each in REQUESTS]
    finish(engine)
    assert [outcome(s.completion()) for s in sequences] == [outcome(each) for each in alone]
    assert {"attention", "greedy", "logits"} <= set(launched)
    assert engine.executor.launches_run == 0
