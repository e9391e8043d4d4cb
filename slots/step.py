"""The symbolic step: what one decode or prefill step does to slots, as planned ops over named lengths.

Owns `StepOp`, `Step` and the two steps of a plan. What always holds: spans are affine in the step's variables; the
width formula is written here once, and planning, printing, the static proof and the run-time check all read it here.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.slots.affine import Affine, variable

TARGET, DRAFT = "target", "draft"
"""The roles: the model whose tokens are the output, and the one that drafts for it."""

# The variables of a step, each per sequence.
LENGTH = variable("len")  # tokens known so far, the pending one included: its K and V are not written yet
WIDTH = variable("k")  # drafts of this step
KEPT = variable("kept")  # tokens this step adds: accepted drafts and one more, cut at a stop or at the budget
FILLED = variable("filled")  # the draft role's committed mark
BEGIN = variable("begin")  # where a prefill chunk starts: the role's committed mark
CHUNK = variable("chunk")  # rows of a prefill chunk
KNOWN = variable("known")  # tokens whose K and V a prefill may fill
CAPACITY = variable("capacity")  # most tokens of a sequence (target)
DRAFT_CAPACITY = variable("draft_capacity")  # most tokens that the draft model can hold
SPECULATE = variable("speculate")  # the plan's greatest width, or less where the width policy says so
ROTARY = variable("rotary")  # rows of the target's rotary table
BUDGET = variable("budget")  # tokens the request may still get
ROOM = variable("room")  # slots that the page pool can give this sequence, those it holds included

VARIABLES = {
    "len": "tokens known so far, the last one's K and V not yet written",
    "k": "draft width of this step",
    "kept": "tokens this step adds to the sequence",
    "filled": "slots that the draft role has committed",
    "begin": "first position of the chunk",
    "chunk": "rows of the chunk",
    "known": "tokens whose K and V may be filled",
    "capacity": "most tokens of one sequence",
    "draft_capacity": "most tokens that the draft model can hold",
    "speculate": "greatest width that plan and width policy allow",
    "rotary": "positions in the rotary table",
    "budget": "tokens the request may still get",
    "room": "slots that the page pool can give, those held included",
}


@dataclass(frozen=True, slots=True)
class Span:
    """Slots `begin .. end` (exclusive) of a role's sequence."""

    role: str
    begin: Affine
    end: Affine

    def __str__(self) -> str:
        return f"{self.role}[{self.begin} .. {self.end})"


@dataclass(frozen=True, slots=True)
class Limit:
    """One upper bound of the draft width, with its reason: a short name, a colon, and what it is about."""

    bound: Affine
    reason: str

    @property
    def name(self) -> str:
        """The short name."""
        return self.reason.partition(":")[0]


@dataclass(frozen=True, slots=True)
class StepOp:
    """One planned op of a step: its name, the spans it touches, and what it says about itself.

    For `commit`, a span runs from the old committed mark to the new one; where two ends are given the mark is their
    minimum.
    """

    op: str
    spans: tuple[Span, ...] = ()
    ends: tuple[Affine, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        parts = [str(span) for span in self.spans]
        if self.ends:
            parts.append(f"-> min({', '.join(map(str, self.ends))})" if len(self.ends) > 1 else f"-> {self.ends[0]}")
        text = f"{self.op:<8} {' '.join(parts)}".rstrip()
        return f"{text:<72} # {self.note}" if self.note else text


@dataclass(frozen=True, slots=True)
class Step:
    """A step with free variables. `limits` bound the width: `k = max(0, min(limits))`."""

    name: str
    limits: tuple[Limit, ...]
    ops: tuple[StepOp, ...]

    def span(self, op: str, role: str) -> Span | None:
        """The span that op `op` has in `role`, or None."""
        for step_op in self.ops:
            if step_op.op == op:
                for span in step_op.spans:
                    if span.role == role:
                        return span
        return None

    def __str__(self) -> str:
        lines = [f"step {self.name}"]
        if self.limits:
            lines.append("  k = max(0, min(")
            lines += [f"    {limit.bound!s:<28} # {limit.reason}" for limit in self.limits]
            lines.append("  ))")
        lines += [f"  %{index} = {op}" for index, op in enumerate(self.ops)]
        return "\n".join(lines)


def decode_step(draft: str, acceptance: str) -> Step:
    """The decode step for a drafter of kind `draft` (`none`, `ngram`, `model`)."""
    limits = [
        Limit(SPECULATE, "speculate: the plan's width, adapted to acceptance"),
        Limit(CAPACITY - LENGTH - 1, "target room: capacity C means C tokens"),
        Limit(ROTARY - LENGTH, "rotary table: it has a row for the last position"),
        Limit(ROOM - LENGTH, "pages: what the pool can give"),
        Limit(BUDGET - 1, "budget: max_new_tokens is the user's"),
    ]
    target = Span("target", LENGTH - 1, LENGTH + WIDTH)
    reserved: tuple[Span, ...] = (target,)
    ops: list[StepOp] = []
    commits = [StepOp("commit", (target,), (LENGTH + KEPT - 1,), "the rest of the reservation is released")]
    if draft == "model":
        limits.append(Limit(DRAFT_CAPACITY - LENGTH + 1, "draft room: its last draft's K and V are not written"))
        span = Span("draft", FILLED, LENGTH + WIDTH - 1)
        reserved = (target, span)
        ops.append(StepOp("draft", (span,), (), "k > 0; rows up to len catch up, then one row a draft"))
        commits.append(
            StepOp("commit", (span,), (LENGTH + KEPT - 1, LENGTH + WIDTH - 1), "k > 0; drafts that were kept")
        )
    elif draft != "none":
        ops.append(StepOp("draft", (), (), f"{draft}: proposes up to k tokens, touches no slots"))
    accept = StepOp("accept", (), (), f"{acceptance}; kept = accepted + 1, cut at the first stop and at the budget")
    return Step(
        "decode",
        tuple(limits),
        (
            StepOp("reserve", reserved),
            *ops,
            StepOp("verify", (target,), (), "rows = k + 1"),
            accept,
            *commits,
            StepOp("release", (), (), "what was reserved and not committed, in every role"),
        ),
    )


def prefill_step(role: str) -> Step:
    """The prefill step of one role: a chunk of known tokens."""
    span = Span(role, BEGIN, BEGIN + CHUNK)
    return Step(
        f"prefill {role}",
        (),
        (
            StepOp("reserve", (span,)),
            StepOp("prefill", (span,), (), "rows = chunk"),
            StepOp("commit", (span,), (BEGIN + CHUNK,)),
        ),
    )
