"""The static verifier: what is proved about a plan before anything runs.

Owns `verify_plan` and the names of its rules. What always holds: a plan that passes writes and reads within its arena,
its buffers and its caches, has each layer's slots written before they are read, and its symbolic steps are proved in
bounds for all lengths, widths and capacities. Each rule raises VerificationError under its own name.
"""

from __future__ import annotations

from slotwise.core.affine import Affine, prove
from slotwise.core.backend import load_backend
from slotwise.core.check import check_graph
from slotwise.core.errors import SlotwiseError, VerificationError
from slotwise.core.printer import format_around
from slotwise.plans.passes.plan_buffers import ALIGNMENT, Placement, call_spec
from slotwise.plans.plan import Plan
from slotwise.plans.program import DRAFT, SAMPLER, TARGET, Program, RolePlan
from slotwise.plans.sampling import output_buffers
from slotwise.plans.step import (
    BEGIN,
    BUDGET,
    CAPACITY,
    CHUNK,
    DRAFT_CAPACITY,
    FILLED,
    KEPT,
    KNOWN,
    LENGTH,
    ROOM,
    ROTARY,
    WIDTH,
    Span,
    Step,
)


def verify_plan(plan: Plan) -> None:
    """Check every program and prove every step; raises VerificationError for the first rule that is broken."""
    roles = {role.role: role for role in plan.roles}
    if TARGET not in roles:
        raise VerificationError("roles", f"the plan has no role {TARGET!r}; it has {sorted(roles)}")
    for role in plan.roles:
        _verify_role(role)
    names = [program.name for program in plan.programs]
    for name in names:
        if names.count(name) > 1:
            raise VerificationError("programs", f"{name} is there twice")
    for program in plan.programs:
        if program.role != SAMPLER and program.role not in roles:
            raise VerificationError("roles", f"program {program.name} is for a role that the plan does not have")
        _verify_program(plan, program)
    for needed in (TARGET, *([DRAFT] if plan.has_draft_model else [])):
        for kind in ("decode", "prefill"):
            if not plan.buckets(needed, kind):
                raise VerificationError("programs", f"there is no {kind} program for role {needed}")
    widest = max(plan.buckets(TARGET, "decode"))
    if widest < plan.options.speculate + 1:
        raise VerificationError(
            "programs",
            f"verifying {plan.options.speculate} drafts takes {plan.options.speculate + 1} rows, but the "
            f"largest decode program has {widest}",
        )
    for step in plan.steps:
        verify_step(step, plan.draft == "model")


def _verify_role(role: RolePlan) -> None:
    columns = -(-role.capacity // role.page_size)
    if role.pages < columns:
        raise VerificationError(
            "capacity",
            f"{role.role}: one sequence of {role.capacity} tokens takes {columns} pages, the pool has {role.pages}",
        )
    if role.positions < role.capacity:
        raise VerificationError(
            "rotary", f"{role.role}: the rotary table has {role.positions} rows for a capacity of {role.capacity}"
        )


def _verify_program(plan: Plan, program: Program) -> None:
    try:
        check_graph(program.graph)
    except SlotwiseError as error:
        raise VerificationError("graph", f"program {program.name}: {error}") from error
    _verify_kernels(plan, program)
    _verify_arena(program)
    _verify_caches(plan, program)
    buffers = dict(plan.buffers)
    wanted = [(program.buffer_of(value), value) for value in program.graph.inputs]
    outputs = output_buffers(program.kind, plan.options.acceptance)
    if len(outputs) != len(program.graph.outputs):
        raise VerificationError(
            "buffers", f"program {program.name} has {len(program.graph.outputs)} outputs, expected {outputs}"
        )
    for name, value in (*wanted, *zip(outputs, program.graph.outputs, strict=True)):
        if name not in buffers:
            raise VerificationError("buffers", f"program {program.name} needs the buffer {name}, which the plan lacks")
        spec = buffers[name]
        fits = spec.dtype is value.spec.dtype and len(spec.shape) == len(value.spec.shape)
        fits = fits and spec.shape[1:] == value.spec.shape[1:] and spec.sizes()[0] >= value.spec.sizes()[0]
        if not fits:
            raise VerificationError("buffers", f"program {program.name}: {name} must hold {value.spec}, is {spec}")


def _verify_kernels(plan: Plan, program: Program) -> None:
    for index, node in enumerate(program.graph.nodes):
        where = f"program {program.name}, call {index}"
        if node.selection is None:
            raise VerificationError("kernels", f"{where}: op {node.op} has no kernel")
        kernel = load_backend(node.selection.backend).kernel(node.selection.kernel.partition(":")[2])
        call = call_spec(node)
        if kernel.op != node.op:
            raise VerificationError(
                "kernels", f"{where}: kernel {node.selection.kernel} runs {kernel.op}, not {node.op}"
            )
        reason = kernel.refuses(call)
        if reason is not None:
            raise VerificationError("kernels", f"{where}: {node.selection.kernel} cannot run it: {reason}")
        if kernel.is_row_invariant(call.rows) != node.selection.row_invariant:
            raise VerificationError(
                "row invariance", f"{where}: {node.selection.kernel} is not what the plan says it is"
            )
        if program.kind != "prefill" and not node.selection.row_invariant:
            raise VerificationError(
                "row invariance", f"{where}: {node.selection.kernel} is not row-invariant for {call.rows} rows"
            )


def _verify_arena(program: Program) -> None:
    """Placements cover exactly the values that need one, for as long as they are used, and never collide."""
    outputs = {value.name for value in program.graph.outputs}
    spans: dict[str, tuple[int, int]] = {}
    sizes: dict[str, int] = {}
    for index, node in enumerate(program.graph.nodes):
        for value in node.inputs:
            if value is not None and value.name in spans:
                spans[value.name] = (spans[value.name][0], index)
        for value in node.outputs:
            if value.name not in outputs:
                spans[value.name], sizes[value.name] = (index, index), value.spec.nbytes()
        if node.selection is not None:
            kernel = load_backend(node.selection.backend).kernel(node.selection.kernel.partition(":")[2])
            if scratch := kernel.workspace(call_spec(node)):
                spans[f"ws{index}"], sizes[f"ws{index}"] = (index, index), scratch
    placed = {p.value: p for p in program.placements}
    if len(placed) != len(program.placements) or placed.keys() != spans.keys():
        odd = sorted(placed.keys() ^ spans.keys()) or "a value placed twice"
        raise VerificationError("arena", f"program {program.name}: placements do not match the values: {odd}")
    for name, place in placed.items():
        first, last = spans[name]
        if place.first > first or place.last < last or place.nbytes < sizes[name]:
            raise VerificationError(
                "arena",
                f"program {program.name}: {name} is used from call {first} to {last} in {sizes[name]} bytes, but "
                f"placed for {place.first} to {place.last} in {place.nbytes}",
            )
        if place.offset < 0 or place.offset % ALIGNMENT:
            raise VerificationError("arena", f"program {program.name}: {name} at {place.offset} is not aligned")
    collision = _collision(program.placements)
    if collision is not None:
        one, other = collision
        raise VerificationError("arena", f"program {program.name}: {one} and {other} share bytes while both are alive")


def _collision(placements: tuple[Placement, ...]) -> tuple[Placement, Placement] | None:
    alive: list[Placement] = []
    for place in sorted(placements, key=lambda p: p.first):
        alive = [other for other in alive if other.last >= place.first]
        for other in alive:
            if place.overlaps(other):
                return other, place
        alive.append(place)
    return None


def _verify_caches(plan: Plan, program: Program) -> None:
    if program.role == SAMPLER:
        return
    role = plan.role(program.role)
    declared = {cache.layer: cache for cache in role.caches}
    written: set[int] = set()
    for index, node in enumerate(program.graph.nodes):
        for value in node.inputs:
            if value is None or value.kind != "cache":
                continue
            layer = int(node.attr("layer"))
            cache = declared.get(layer)
            expected = (role.slots, cache.kv_heads, cache.head_dim) if cache is not None else None
            if value.spec.shape != expected or not value.name.startswith(f"kv{layer}."):
                raise VerificationError(
                    "caches",
                    f"program {program.name}, call {index}: {value.name} is {value.spec}, the role's layer "
                    f"{layer} has {expected}\n{format_around(program.graph, index)}",
                )
        written.update(effect.layer for effect in node.effects if effect.kind == "writes")
    if written != declared.keys():
        missing = sorted(declared.keys() - written)
        raise VerificationError("caches", f"program {program.name} never writes the slots of layers {missing}")


def verify_step(step: Step, has_draft_model: bool) -> None:
    """Prove the step's spans in bounds for all integers that meet its premises.

    Raises VerificationError naming the obligation and what could not be proved.
    """
    names = [op.op for op in step.ops]
    if "reserve" not in names or "commit" not in names or names[0] != "reserve":
        raise VerificationError("balance", f"step {step.name}: a step reserves first and commits last, found {names}")
    if step.name.startswith("prefill"):
        _prove_prefill(step)
        return
    _require_order(step, ("reserve", "verify", "accept", "commit", "release"))
    bounds = [limit.bound for limit in step.limits]
    running = [LENGTH - 1, CAPACITY - LENGTH - 1, BUDGET - 1, ROTARY - CAPACITY, ROOM - LENGTH, KEPT - 1]
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
        _prove(
            step,
            case,
            premises,
            "watermark",
            "the target's span starts at its committed mark",
            reserved.begin - LENGTH + 1,
        )
        _prove(
            step,
            case,
            premises,
            "watermark",
            "the target's span starts at its committed mark",
            LENGTH - 1 - reserved.begin,
        )
        _prove(step, case, premises, "rows", "the span has k + 1 slots", reserved.end - reserved.begin - WIDTH - 1)
        _prove(step, case, premises, "rows", "the span has k + 1 slots", WIDTH + 1 - reserved.end + reserved.begin)
        _prove(step, case, premises, "capacity", "the sequence stays within capacity", CAPACITY - LENGTH - KEPT)
        _prove_commit(step, case, premises, reserved)
    if has_draft_model:
        _prove_draft(step, drafting)


def _prove_draft(step: Step, premises: list[Affine]) -> None:
    reserved, written = step.span("reserve", DRAFT), step.span("draft", DRAFT)
    if reserved is None or written != reserved:
        raise VerificationError("written once", f"step {step.name}: draft writes {written}, reserved is {reserved}")
    case = "k > 0"
    _prove(step, case, premises, "watermark", "the draft's span starts at its filled mark", reserved.begin - FILLED)
    _prove(step, case, premises, "watermark", "the draft's span starts at its filled mark", FILLED - reserved.begin)
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
    reserved, written = step.span("reserve", role), step.span("prefill", role)
    if reserved is None or written != reserved:
        raise VerificationError("written once", f"step {step.name}: prefill writes {written}, reserved is {reserved}")
    commit = next((op for op in step.ops if op.op == "commit"), None)
    if commit is None or commit.ends != (reserved.end,):
        raise VerificationError("balance", f"step {step.name}: commit must end where the chunk ends")
    _prove(step, "any chunk", premises, "capacity", "the chunk ends within capacity", CAPACITY - reserved.end)
    _prove(step, "any chunk", premises, "known", "only known tokens are filled", KNOWN - reserved.end)
    _prove(step, "any chunk", premises, "watermark", "the chunk starts at the committed mark", reserved.begin - BEGIN)
    _prove(step, "any chunk", premises, "watermark", "the chunk starts at the committed mark", BEGIN - reserved.begin)
    _prove(step, "any chunk", premises, "rows", "the chunk has its rows", reserved.end - BEGIN - CHUNK)


def _require_order(step: Step, order: tuple[str, ...]) -> None:
    found = [op.op for op in step.ops if op.op in order]
    if list(dict.fromkeys(found)) != list(order):
        raise VerificationError("balance", f"step {step.name}: expected the ops {order} in this order, found {found}")


def _prove(step: Step, case: str, premises: list[Affine], rule: str, what: str, goal: Affine) -> None:
    if not prove(premises, goal):
        raise VerificationError(rule, f"step {step.name}, {case}: not proved that {what} ({goal} >= 0)")
