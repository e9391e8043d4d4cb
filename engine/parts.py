"""What the engine is put together from, and what it asks of a prompt.

Owns the empty ledger of a plan, the check of a prompt, and the lanes of sequences. What always holds: a prompt that
passes fits the plan alone, with ids of its model.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

from slotwise.core.errors import RequestError
from slotwise.engine.lanes import Ints
from slotwise.engine.sequence import Sequence
from slotwise.plans.plan import Plan
from slotwise.plans.program import RolePlan
from slotwise.slots.ledger import Ledger, RoleLedger


def make_ledger(plan: Plan) -> Ledger:
    """An empty ledger for the plan's roles."""
    return Ledger(
        [
            RoleLedger(
                role.role,
                lanes=plan.options.max_sequences,
                capacity=role.capacity,
                page_size=role.page_size,
                pages=role.pages,
            )
            for role in plan.roles
        ]
    )


def check_prompt(prompt: SequenceOf[int], target: RolePlan) -> None:
    """Raise RequestError when a prompt is empty, holds a wrong id, or does not fit the capacity alone."""
    if not prompt:
        raise RequestError("the prompt has no tokens; give at least one (a begin-of-text token, say)")
    wrong = next((token for token in prompt if not 0 <= token < target.vocab_size), None)
    if wrong is not None:
        raise RequestError(f"the prompt has token id {wrong}; this model's ids are 0 to {target.vocab_size - 1}")
    if len(prompt) > target.capacity:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens, the capacity is {target.capacity}; shorten it, or load the model "
            "with a larger capacity if its own maximum allows one"
        )


def lanes_of(sequences: SequenceOf[Sequence]) -> Ints:
    """The lanes of running sequences, in order."""
    return np.array([s.lane for s in sequences if s.lane is not None], np.int64)
