"""Engines whose steps are started ahead, and the streams that tests put in the place of a GPU's.

On `Held` nothing runs before somebody waits for it: what is planned meanwhile cannot have looked at any result. On
`AtOnce` work runs when it is started, as a launch that a GPU refuses fails there.
"""

from __future__ import annotations

from typing import Any

from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence
from slotwise.engine.streams import Done, Work

from .tiny import DraftChoice, alone, outcome, prompt_of, request, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05)}
NEW = 14


class Held:
    """A stream on which work runs when its end is waited for, and all before it."""

    def __init__(self) -> None:
        self.waiting: list[Work] = []
        self.most = 0

    def start(self, work: Work) -> Done:
        self.waiting.append(work)
        self.most = max(self.most, len(self.waiting))
        return _Until(self, work)

    def join(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class AtOnce:
    """A stream on which work runs when it is started, as launches do that a GPU refuses."""

    def start(self, work: Work) -> Done:
        work()
        return self

    def wait(self) -> None:
        pass

    def join(self) -> None:
        pass


class _Until:
    def __init__(self, stream: Held, work: Work) -> None:
        self._stream, self._work = stream, work

    def wait(self) -> None:
        while self._work in self._stream.waiting:
            self._stream.waiting.pop(0)()


def requests(count: int = 3, **sampling: Any) -> list[Request]:
    """Greedy and sampled, of several lengths; whoever asks for log-probabilities waits for every step."""
    return [
        request(prompt_of(5 + n, n), NEW + n, **{"temperature": 0.8 * (n % 2), "seed": n, "logprobs": None, **sampling})
        for n in range(count)
    ]


def overlapping(**options: Any) -> Engine:
    return tiny_engine(MODEL, overlap=True, **options)


def decoding(engine: Engine, wanted: list[Request]) -> list[Sequence]:
    """The requests, all with their prompts behind them."""
    sequences = [engine.add(one) for one in wanted]
    while any(sequence.state != "decode" for sequence in sequences):
        engine.step()
    return sequences


def assert_as_alone(sequences: list[Sequence], wanted: list[Request]) -> None:
    assert [outcome(s.completion()) for s in sequences] == [outcome(alone(MODEL, one)) for one in wanted]
