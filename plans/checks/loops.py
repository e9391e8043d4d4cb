"""The static verifier of draft loops.

Owns `verify_loops`. What always holds: in a plan that passes, a loop runs programs that the plan has; what a round
samples fits, and lies within, what the next one reads; nothing that differs from round to round is shared, and every
round has room in its arrays; the rows of every round are proved to lie in the draft's span.
"""

from __future__ import annotations

from slotwise.core.errors import VerificationError
from slotwise.plans.arrays import OVER_IDS, input_array, output_arrays, rows_array
from slotwise.plans.checks.feed import input_of, sampled_value, why_not_fed
from slotwise.plans.loop import FED, FEEDS, GIVEN, DraftLoop, loop_samplers, round_buffer
from slotwise.plans.program import Program
from slotwise.plans.record import PlanRecord
from slotwise.slots.affine import Affine, prove, variable
from slotwise.slots.step import DRAFT, FILLED, LENGTH, WIDTH

RULE = "loops"
ROUND = variable("round")

_SHARED = (
    f"{DRAFT}.page_table",
    *OVER_IDS,
    *(f"{DRAFT}.{name}" for name in OVER_IDS),
    *("seed", "temperature", "top_k", "top_p", "min_p"),
)
"""Inputs that are the same in every round, or that a round itself has written before it reads them."""


def verify_loops(plan: PlanRecord) -> None:
    """Check every loop of the plan; raises VerificationError of the rule `loops`."""
    if plan.loops and not plan.has_draft_model:
        raise VerificationError(RULE, f"{plan.loops[0]}: the plan has no draft model")
    if len(set(plan.loops)) < len(plan.loops):
        raise VerificationError(RULE, "a loop is there twice")
    programs = {(program.role, program.kind, program.rows): program for program in plan.programs}
    for loop in plan.loops:
        _verify_loop(plan, loop, programs)
    if plan.loops:
        _prove_rows(plan)


def _verify_loop(plan: PlanRecord, loop: DraftLoop, programs: dict[tuple[str, str, int], Program]) -> None:
    if not 1 <= loop.rounds <= plan.options.speculate or not 1 <= loop.sequences <= loop.first:
        raise VerificationError(
            RULE,
            f"{loop}: expected 1 to {plan.options.speculate} rounds, found {loop.rounds}, and at least as many first "
            "rows as sequences",
        )
    allowed = loop_samplers(plan.options.acceptance, plan.drafts_fewer_ids)
    if loop.sampler not in allowed:
        raise VerificationError(RULE, f"{loop}: drafts are drawn by {' or '.join(allowed)}, not by {loop.sampler}")
    for _, key in loop.programs(loop.rounds):
        if key not in programs:
            raise VerificationError(RULE, f"{loop}: there is no program {'.'.join(map(str, key))}")
    (_, first), (_, sampler), *_ = loop.programs(1)
    models = [programs[first], *(programs[key] for n, key in loop.programs(loop.rounds) if n and key[0] == DRAFT)]
    _verify_feed(plan, loop, models, programs[sampler])
    _verify_arrays(plan, loop, (models[-1], programs[sampler]))


def _verify_feed(plan: PlanRecord, loop: DraftLoop, models: list[Program], sampler: Program) -> None:
    """The model's logits are the sampler's, and its tokens are ids that the next round's model can be fed."""
    for model in models:
        reason = why_not_fed(sampler, model, plan.options.acceptance)
        if reason is not None:
            raise VerificationError(RULE, f"{loop}: {reason}")
        given, sampled = model.graph.outputs[0].spec, sampled_value(sampler, plan.options.acceptance)
        if given.sizes()[0] < loop.sequences:
            raise VerificationError(RULE, f"{loop}: {model.name} gives {given}, too few for its sequences")
        if model.rows == loop.sequences:
            fed = input_of(model, FED)
            if fed is None:
                raise VerificationError(RULE, f"program {model.name} has no input {FED}, which a loop feeds")
            if sampled is None or fed.spec != sampled.spec:
                found = None if sampled is None else sampled.spec
                raise VerificationError(
                    RULE, f"{loop}: {sampler.name} samples {found}, but {model.name} reads {FED} as {fed.spec}"
                )


def _verify_arrays(plan: PlanRecord, loop: DraftLoop, programs: tuple[Program, Program]) -> None:
    """Every value that differs between rounds has an array with room for each round; all others may be shared."""
    buffers, later, vocabulary = dict(plan.buffers), loop.rounds - 1, plan.target.vocab_size
    if not later:
        return
    slices = max(each.rounds for each in plan.loops) - 1
    scores = rows_array("scores", plan.role(DRAFT).vocab_size, vocabulary)
    apart = {round_buffer(scores)} if plan.options.acceptance != "coupled" else set()
    for program in programs:
        names = output_arrays(program, plan.options.acceptance, vocabulary)
        values = [(input_array(program, value, vocabulary), value, False) for value in program.graph.inputs]
        values += [(name, value, True) for name, value in zip(names, program.graph.outputs, strict=True)]
        for name, value, is_written in values:
            own = round_buffer(name)
            needed = name in GIVEN or (is_written and (name in (FEEDS, "ok") or own in apart))
            if not needed and (is_written or name in (FED, *_SHARED)):
                continue
            spec = buffers.get(own)
            if spec is None or spec.dtype is not value.spec.dtype or spec.shape[1:] != value.spec.shape[1:]:
                raise VerificationError(
                    RULE, f"{loop}: {program.name} needs {own} for {later} rounds of {value.spec}, found {spec}"
                )
            if spec.sizes()[0] % slices or spec.sizes()[0] // slices < value.spec.sizes()[0]:
                raise VerificationError(
                    RULE, f"{loop}: {own} is {spec}, {slices} rounds of {value.spec} do not fit it evenly"
                )


def _prove_rows(plan: PlanRecord) -> None:
    """Round r of a sequence of length L writes slot L - 1 + r, for r < k: within the draft's span, each another."""
    step = plan.step("decode")
    span = step.span("draft", DRAFT)
    if span is None:
        raise VerificationError(RULE, "there are loops, but the decode step has no draft span")
    position: Affine = LENGTH - 1 + ROUND
    premises = [LENGTH - 1 - FILLED, FILLED, WIDTH - 1, ROUND, WIDTH - 1 - ROUND]
    for what, goal in (("after its begin", position - span.begin), ("before its end", span.end - position - 1)):
        if not prove(premises, goal):
            raise VerificationError(RULE, f"not proved that every round's row lies in {span}, {what} ({goal} >= 0)")
