"""Logits of given tokens, row by row, by the decode-side programs.

What always holds: a row's logits have the bits of decoding the tokens one by one, because the same row-invariant
kernels compute them; the lane and the slots that it takes return, whatever happens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from slotwise.core.errors import OutOfPages, RequestError
from slotwise.engine.engine import Engine
from slotwise.engine.model_call import run_rows
from slotwise.engine.parts import check_prompt
from slotwise.plans.program import DECODE
from slotwise.slots.binding import BoundSpan
from slotwise.slots.step import TARGET


def score(engine: Engine, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits float32 [T, V]: row i holds those for the token after `token_ids[i]`.

    Raises RequestError when the tokens do not fit, or when all lanes or pages are taken by running requests.
    """
    target = engine.plan.target
    check_prompt(token_ids, target)
    if not engine.lanes.free:
        raise RequestError("all sequences of the plan are in use; finish or cancel a running request first")
    found = torch.empty(len(token_ids), target.vocab_size, dtype=torch.float32)
    lane, ledger = engine.lanes.take(), engine.ledger[TARGET]
    lanes = np.array([lane])
    try:
        engine.lanes.put(lane, 0, list(token_ids))
        ledger.open(lane)
        most = engine.executor.most_rows(TARGET, DECODE)
        for begin in range(0, len(token_ids), most):
            end = min(begin + most, len(token_ids))
            ends = np.array([end])
            ledger.reserve(lanes, ends)
            run_rows(engine.executor, ledger, engine.lanes, BoundSpan(TARGET, lanes, np.array([begin]), ends))
            found[begin:end] = engine.executor.buffers["logits"][: end - begin]
            ledger.commit(lanes, ends)
    except OutOfPages as error:
        raise RequestError(f"{len(token_ids)} tokens cannot be scored beside what is running: {error}") from error
    finally:
        ledger.close(lane)
        engine.lanes.give_back(lane)
    return found
