"""What the tests of faults share: requests, of which one gets a fault, and what must then hold for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slotwise.core.errors import SlotwiseError
from slotwise.engine.engine import Engine
from slotwise.engine.request import Request
from slotwise.engine.sequence import Sequence as Running

from .tiny import DraftChoice, alone, assert_all_returned, finish, outcome, prompt_of, request, tiny_engine, tiny_model

MODEL = tiny_model(1, layers=2)
DRAFTS: dict[str, DraftChoice] = {"none": None, "ngram": "ngram", "model": MODEL.draft(0.05, layers=2)}
PROMPT, NEW = 9, 14


def requests(count: int = 3, **sampling: Any) -> list[Request]:
    """Requests of several lengths, greedy and sampled."""
    return [
        request(prompt_of(PROMPT + i, i), NEW, **{"temperature": 0.8 * (i % 2), "seed": i, **sampling})
        for i in range(count)
    ]


def engine_for(draft: str, **options: Any) -> Engine:
    return tiny_engine(MODEL, DRAFTS[draft], share_prefixes=False, adaptive=False, **options)


def assert_only_victim_failed(engine: Engine, wanted: Sequence[Request], sequences: list[Running], victim: int) -> None:
    """Others are as alone; the victim has an error and a beginning of its tokens; the engine still serves."""
    finish(engine)
    assert_all_returned(engine)
    for i, sequence in enumerate(sequences):
        completion, expected = sequence.completion(), alone(MODEL, wanted[i])
        if i != victim:
            assert completion.error is None
            assert outcome(completion) == outcome(expected)
            continue
        assert completion.finish_reason == "error"
        assert isinstance(completion.error, SlotwiseError)
        assert completion.token_ids == expected.token_ids[: len(completion.token_ids)]
        assert (completion.logprobs or ()) == (expected.logprobs or ())[: len(completion.token_ids)]
        assert len(completion.token_ids) < len(expected.token_ids)
    again = engine.add(wanted[(victim + 1) % len(wanted)])
    finish(engine)
    assert outcome(again.completion()) == outcome(alone(MODEL, wanted[(victim + 1) % len(wanted)]))
    assert_all_returned(engine)
