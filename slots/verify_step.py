"""The static verifier of symbolic steps.

Owns `verify_step`. What always holds: the steps of a plan that passes stay within capacity, pages and rotary table, and
account for every slot that they reserve, for all lengths, widths and capacities: rules are proved, not tried out.
"""

from __future__ import annotations

from slotwise.core.errors import VerificationError
from slotwise.slots.affine import Affine, prove
from slotwise.slots.step import (
    BEGIN,
    BUDGET,
    CAPACITY,
    CHUNK,
    DRAFT,
    DRAFT_CAPACITY,
    FILLED,
    KEPT,
    KNOWN,
    LENGTH,
    ROOM,
    ROTARY,
    SPECULATE,
    TARGET,
    WIDTH,
    Span,
    Step,
)


def verify_step(step: Step, has_draft_model: bool) -> None:
    """Prove the step's spans in bounds for all integers that meet its premises.

    Raises VerificationError naming the obligation and what could not be proved.
    """
    if step.name.startswith("prefill"):
        _prove_prefill(step)
        return
    drafts = [op.op for op in step.ops if op.op == "draft"]
    if has_draft_model and not drafts:
        raise VerificationError("balance", f"step {step.name}: there is a draft model, but no draft op")
    roles = (TARGET, DRAFT) if has_draft_model else (TARGET,)
    _require_ops(step, ("reserve", *drafts[:1], "verify", "accept", *("commit" for _ in roles), "release"), roles)
    bounds = [limit.bound for limit in step.limits]
    # What holds whenever a sequence runs. k is not limited here, so each limit has an obligation that needs it.
    running = [LENGTH - 1, CAPACITY - LENGTH - 1, BUDGET - 1, ROTARY - LENGTH, ROOM - LENGTH, SPECULATE, KEPT - 1]
    running += [WIDTH + 1 - KEPT, BUDGET - KEPT]
    if has_draft_model:
        running += [FILLED, LENGTH - 1 - FILLED, DRAFT_CAPACITY - FILLED]
    drafting = [*running, WIDTH - 1, *(bound - WIDTH for bound in bounds)]
    plain = [*running, WIDTH, WIDTH * -1]
    reserved = step.span("reserve", TARGET)
    written = step.span("verify", TARGET)
    if reserved is None or written != reserved:
        raise VerificationError("written once", f"step {step.name}: verify writes {written}, reserved is {reserved}")
    for premises, case in ((drafting, "k > 0"), (plain, "k = 0")):
        _prove(step, case, premises, "capacity", "the target's span ends within capacity", CAPACITY - reserved.end)
        _prove(step, case, premises, "pages", "the target's span ends within its pages", ROOM - reserved.end)
        _prove(step, case, premises, "rotary", "positions are in the rotary table", ROTARY - reserved.end)
        at_mark, slots = reserved.begin - LENGTH + 1, reserved.end - reserved.begin
        _prove_zero(step, case, premises, "watermark", "the target's span starts at its committed mark", at_mark)
        _prove_zero(step, case, premises, "rows", "the span has k + 1 slots", slots - WIDTH - 1)
        _prove(step, case, premises, "capacity", "the sequence stays within capacity", CAPACITY - LENGTH - KEPT)
        _prove(step, case, premises, "width", "k is no greater than the plan's width", SPECULATE - WIDTH)
        _prove(step, case, premises, "budget", "no draft lies beyond max_new_tokens", BUDGET - WIDTH - 1)
        _prove_commit(step, case, premises, reserved)
    if has_draft_model:
        _prove_draft(step, drafting)


def _prove_draft(step: Step, premises: list[Affine]) -> None:
    reserved, written = step.span("reserve", DRAFT), step.span("draft", DRAFT)
    if reserved is None or written != reserved:
        raise VerificationError("written once", f"step {step.name}: draft writes {written}, reserved is {reserved}")
    case = "k > 0"
    at_mark = reserved.begin - FILLED
    _prove_zero(step, case, premises, "watermark", "the draft's span starts at its filled mark", at_mark)
    _prove(step, case, premises, "capacity", "the draft's span ends within its capacity", DRAFT_CAPACITY - reserved.end)
    _prove(
        step, case, premises, "rows", "the draft is fed up to its last draft but one", reserved.end - LENGTH - WIDTH + 1
    )
    _prove_commit(step, case, premises, reserved)


def _prove_commit(step: Step, case: str, premises: list[Affine], reserved: Span) -> None:
    """The committed mark never moves back, stays within the reservation and within the tokens that are known."""
    commit = next((op for op in step.ops if op.op == "commit" and reserved in op.spans), None)
    if commit is None:
        raise VerificationError("balance", f"step {step.name}: {reserved} is reserved and never committed")
    for end in commit.ends:
        _prove(step, case, premises, "balance", f"{reserved.role} commits no less than it had", end - reserved.begin)
    # The mark is the least of the ends: an upper bound holds when it holds for one of them.
    upper = ((reserved.end, "what was reserved"), (LENGTH + KEPT - 1, "the tokens known before the pending one"))
    for bound, what in upper:
        if not any(prove(premises, bound - end) for end in commit.ends):
            raise VerificationError(
                "balance",
                f"step {step.name}, {case}: {reserved.role} could commit more than {what}: "
                f"{' or '.join(map(str, commit.ends))} <= {bound} is not proved",
            )
    if reserved.role == TARGET:
        end = commit.ends[0]
        _prove(
            step, case, premises, "watermark", "the target ends filled up to the pending token", end - LENGTH - KEPT + 1
        )


def _prove_prefill(step: Step) -> None:
    role = step.name.split()[-1]
    premises = [BEGIN, CHUNK - 1, KNOWN - BEGIN - CHUNK, CAPACITY - KNOWN, ROOM - KNOWN, ROTARY - CAPACITY]
    _require_ops(step, ("reserve", "prefill", "commit"), (role,))
    reserved, written = step.span("reserve", role), step.span("prefill", role)
    if reserved is None or written != reserved:
        raise VerificationError("written once", f"step {step.name}: prefill writes {written}, reserved is {reserved}")
    if step.ops[-1].ends != (reserved.end,):
        raise VerificationError("balance", f"step {step.name}: commit must end where the chunk ends")
    _prove(step, "any chunk", premises, "capacity", "the chunk ends within capacity", CAPACITY - reserved.end)
    _prove(step, "any chunk", premises, "pages", "the chunk ends within its pages", ROOM - reserved.end)
    _prove(step, "any chunk", premises, "rotary", "positions are in the rotary table", ROTARY - reserved.end)
    _prove(step, "any chunk", premises, "known", "only known tokens are filled", KNOWN - reserved.end)
    at_mark = reserved.begin - BEGIN
    _prove_zero(step, "any chunk", premises, "watermark", "the chunk starts at the committed mark", at_mark)
    _prove(step, "any chunk", premises, "rows", "the chunk has its rows", reserved.end - BEGIN - CHUNK)


def _require_ops(step: Step, expected: tuple[str, ...], roles: tuple[str, ...]) -> None:
    """The step has exactly these ops in this order, reserves in each role once, and commits each reservation once."""
    found = tuple(op.op for op in step.ops)
    if found != expected:
        raise VerificationError(
            "balance", f"step {step.name}: expected the ops {expected} in this order, found {found}"
        )
    reserved = step.ops[0].spans
    if tuple(span.role for span in reserved) != roles:
        raise VerificationError("balance", f"step {step.name}: {step.ops[0]} must reserve in {roles}, each once")
    committed = tuple(span for op in step.ops if op.op == "commit" for span in op.spans)
    if committed != reserved:
        raise VerificationError(
            "balance",
            f"step {step.name}: reserved are {', '.join(map(str, reserved))}, committed "
            f"{', '.join(map(str, committed)) or 'none'}; each reservation is committed once, as it was reserved",
        )


def _prove(step: Step, case: str, premises: list[Affine], rule: str, what: str, goal: Affine) -> None:
    if not prove(premises, goal):
        raise VerificationError(rule, f"step {step.name}, {case}: not proved that {what} ({goal} >= 0)")


def _prove_zero(step: Step, case: str, premises: list[Affine], rule: str, what: str, goal: Affine) -> None:
    _prove(step, case, premises, rule, what, goal)
    _prove(step, case, premises, rule, what, goal * -1)
