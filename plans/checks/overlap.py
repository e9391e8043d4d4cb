"""Whether a plan's steps may be started before the step before them has been read.

Owns `why_no_overlap`. What always holds: in a plan that may, a step without drafts moves every mark by an amount that
is known before its tokens are, so the next one is bound and verified against marks that stand; and the one thing that
the host does not know, each row's token, is an id of the model (whose it is, `slots/verify_follow.py` checks).
"""

from __future__ import annotations

from slotwise.plans.checks.feed import input_of, sampled_value, why_not_fed
from slotwise.plans.program import DECODE, SAMPLER, Program
from slotwise.plans.record import PlanRecord
from slotwise.plans.sampling import GREEDY, SAMPLE
from slotwise.slots.affine import prove
from slotwise.slots.step import KEPT, LENGTH, TARGET, WIDTH


def why_no_overlap(plan: PlanRecord) -> str | None:
    """Why steps of the plan wait for each other; None when a step without drafts need not be waited for."""
    if plan.draft != "none":
        return "how many drafts are accepted is known when the step has run"
    decode = plan.step("decode")
    # k = 0, and kept from 1 to k + 1: so whatever is sampled, the mark ends where the next step's span begins.
    premises = [LENGTH - 1, WIDTH, WIDTH * -1, KEPT - 1, WIDTH + 1 - KEPT]
    ends = [end for op in decode.ops if op.op == "commit" for end in op.ends]
    for end in ends:
        if not (prove(premises, end - LENGTH) and prove(premises, LENGTH - end)):
            return f"it is not proved that a step without drafts commits up to {LENGTH}: {end}"
    models = [p for p in plan.programs if (p.role, p.kind) == (TARGET, DECODE)]
    samplers = [p for p in plan.programs if p.role == SAMPLER and p.kind in (GREEDY, SAMPLE)]
    if not (ends and models and samplers):
        return "there is no decode step that commits, or no program to decode or to sample with"
    for sampler in samplers:
        for model in models:
            reason = why_not_fed(sampler, model, plan.options.acceptance) or _differs(sampler, model, plan)
            if reason is not None:
                return reason
    return None


def _differs(sampler: Program, model: Program, plan: PlanRecord) -> str | None:
    """Why a sampled token is no token id as the model reads it."""
    fed, sampled = input_of(model, "token_ids"), sampled_value(sampler, plan.options.acceptance)
    if fed is None or sampled is None or fed.spec.dtype is not sampled.spec.dtype:
        given, read = (None if value is None else value.spec for value in (sampled, fed))
        return f"{sampler.name} samples {given}, {model.name} reads token_ids as {read}"
    return None
