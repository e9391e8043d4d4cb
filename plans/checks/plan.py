"""The static verifier: what is proved about a plan before anything runs.

Owns `verify_plan` and the names of its rules. What always holds: a plan that passes writes and reads within its arena,
its buffers and its caches, has each layer's slots written before they are read, and its symbolic steps
(`slots/verify_step.py`) and draft loops (`loops.py`) are proved. Each rule raises VerificationError under its own name.
"""

from __future__ import annotations

from slotwise.core.backend import Kernel, load_backend
from slotwise.core.check import check_graph
from slotwise.core.errors import BackendError, SlotwiseError, VerificationError
from slotwise.core.graph import Node, Parameter
from slotwise.core.layouts import OCTETS, ROWS, fits
from slotwise.core.printer import format_around
from slotwise.core.quantise import DERIVATIONS
from slotwise.core.specs import TensorSpec
from slotwise.plans.arrays import input_array, output_arrays
from slotwise.plans.checks.loops import verify_loops
from slotwise.plans.passes.plan_buffers import ALIGNMENT, Placement, call_spec
from slotwise.plans.program import PREFILL, SAMPLER, Program, RolePlan
from slotwise.plans.record import PlanRecord
from slotwise.slots.step import DRAFT, TARGET
from slotwise.slots.verify_step import verify_step


def verify_plan(plan: PlanRecord) -> None:
    """Check every program and prove every step; raises VerificationError for the first rule that is broken."""
    roles = {role.role: role for role in plan.roles}
    if TARGET not in roles:
        raise VerificationError("roles", f"the plan has no role {TARGET!r}; it has {sorted(roles)}")
    if (DRAFT in roles) != (plan.draft == "model"):
        raise VerificationError("roles", f"the drafter is {plan.draft!r}, but the roles are {sorted(roles)}")
    for role in plan.roles:
        _verify_role(plan, role)
    if DRAFT in roles and roles[DRAFT].vocab_size > roles[TARGET].vocab_size:
        raise VerificationError(
            "roles",
            f"{DRAFT} has {roles[DRAFT].vocab_size} token ids, {TARGET} {roles[TARGET].vocab_size}: it could draft "
            "what the target cannot be fed",
        )
    names = [program.name for program in plan.programs]
    for name in names:
        if names.count(name) > 1:
            raise VerificationError("programs", f"{name} is there twice")
    for program in plan.programs:
        if program.role != SAMPLER and program.role not in roles:
            raise VerificationError("roles", f"program {program.name} is for a role that the plan does not have")
        _verify_program(plan, program)
    _verify_one_kernel_per_call(plan)
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
    expected = ["decode", *(f"prefill {role.role}" for role in plan.roles)]
    if sorted(step.name for step in plan.steps) != sorted(expected):
        raise VerificationError(
            "steps", f"the steps are {[step.name for step in plan.steps]}, expected {expected}, each once"
        )
    for step in plan.steps:
        verify_step(step, plan.has_draft_model)
    verify_loops(plan)


def _verify_one_kernel_per_call(plan: PlanRecord) -> None:
    """Decode-side buckets of one kind run the same kernels: else a row's bits would depend on its company."""
    chosen: dict[tuple[object, ...], tuple[str, str]] = {}
    for program in plan.programs:
        if program.kind == PREFILL:
            continue
        for node in program.graph.nodes:
            names = tuple(value.name for value in (*node.inputs, *node.outputs) if value is not None)
            kernel = "none" if node.selection is None else node.selection.kernel
            first, where = chosen.setdefault((program.role, program.kind, node.op, names), (kernel, program.name))
            if kernel != first:
                raise VerificationError(
                    "row invariance",
                    f"{node.op}({', '.join(names)}) runs {first} in {where} and {kernel} in {program.name}; rows would "
                    "have other bits in other batches: let one kernel take all buckets, or prefer another backend",
                )


def _verify_role(plan: PlanRecord, role: RolePlan) -> None:
    for name in ("capacity", "positions", "vocab_size", "page_size", "pages"):
        value = getattr(role, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise VerificationError("roles", f"{role.role}: {name} must be an integer of 1 or more, is {value!r}")
    for program in plan.programs:
        if program.role == role.role and program.graph.outputs[0].spec.shape[-1] != role.vocab_size:
            raise VerificationError(
                "roles",
                f"{role.role}: {role.vocab_size} token ids, but {program.name} gives {program.graph.outputs[0].spec}",
            )
    if role.page_size != plan.options.page_size:
        raise VerificationError(
            "pages", f"{role.role}: pages of {role.page_size} slots, the options say {plan.options.page_size}"
        )
    if role.role == TARGET and role.capacity != plan.options.capacity:
        raise VerificationError(
            "capacity", f"{role.role}: a capacity of {role.capacity}, the options say {plan.options.capacity}"
        )
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


def _verify_program(plan: PlanRecord, program: Program) -> None:
    try:
        check_graph(program.graph)
    except SlotwiseError as error:
        raise VerificationError("graph", f"program {program.name}: {error}") from error
    _verify_rows(program)
    _verify_kernels(program)
    _verify_arena(program)
    if program.role != SAMPLER:
        _verify_states(plan, program)
        _verify_parameters(plan.role(program.role), program)
    buffers = dict(plan.buffers)
    vocabulary = plan.target.vocab_size
    wanted = [(input_array(program, value, vocabulary), value) for value in program.graph.inputs]
    outputs = output_arrays(program, plan.options.acceptance, vocabulary)
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


def _verify_rows(program: Program) -> None:
    """Every input has the bucket's rows, and no name is left in any spec."""
    for value in (*program.graph.inputs, *(v for node in program.graph.nodes for v in (*node.inputs, *node.outputs))):
        if value is not None and not all(isinstance(size, int) for size in value.spec.shape):
            raise VerificationError("programs", f"program {program.name}: {value.name}: {value.spec} is not bound")
    for value in program.graph.inputs:
        # A prefill gives the logits of one row; row_start has one entry more than there are sequences.
        rows = 1 if value.name == "logit_rows" else program.rows + (value.name == "row_start")
        if value.spec.shape[:1] != (rows,):
            raise VerificationError(
                "programs", f"program {program.name}: {value.name} is {value.spec}, not {rows} rows"
            )


def _kernel(node: Node, where: str) -> Kernel:
    if node.selection is None:
        raise VerificationError("kernels", f"{where}: op {node.op} has no kernel")
    try:
        return load_backend(node.selection.backend).kernel(node.selection.kernel.partition(":")[2])
    except BackendError as error:
        raise VerificationError("kernels", f"{where}: {error}") from error


def _verify_kernels(program: Program) -> None:
    for index, node in enumerate(program.graph.nodes):
        where = f"program {program.name}, call {index}"
        kernel, call = _kernel(node, where), call_spec(node)
        if kernel.op != node.op:
            raise VerificationError("kernels", f"{where}: kernel {kernel.name} runs {kernel.op}, not {node.op}")
        reason = kernel.refuses(call)
        if reason is not None:
            raise VerificationError("kernels", f"{where}: {kernel.name} cannot run it: {reason}")
        invariant = kernel.is_row_invariant(call.rows)
        if node.selection is None or invariant != node.selection.row_invariant:
            raise VerificationError("row invariance", f"{where}: {kernel.name} is not what the plan says it is")
        if program.kind != "prefill" and not invariant:
            raise VerificationError(
                "row invariance", f"{where}: {kernel.name} is not row-invariant for {call.rows} rows"
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
        if scratch := _kernel(node, f"program {program.name}, call {index}").workspace(call_spec(node)):
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


def _verify_states(plan: PlanRecord, program: Program) -> None:
    role = plan.role(program.role)
    declared = {state.name: state for state in role.states}
    written: set[str] = set()
    for index, node in enumerate(program.graph.nodes):
        for value in node.inputs:
            if value is None or value.kind != "cache":
                continue
            touched = [declared[effect.state] for effect in node.effects if effect.state in declared]
            expected = {
                state.value_name(part.name): TensorSpec(part.dtype, (role.slots, *part.shape))
                for state in touched
                for part in state.parts
            }
            if expected.get(value.name) != value.spec:
                raise VerificationError(
                    "states",
                    f"program {program.name}, call {index}: {value.name} is {value.spec}, the role has "
                    f"{'; '.join(map(str, touched)) or 'no such state'} in {role.slots} slots\n"
                    f"{format_around(program.graph, index)}",
                )
        if node.attr_dict.get("page_size", role.page_size) != role.page_size:
            raise VerificationError(
                "pages",
                f"program {program.name}, call {index}: reads pages of {node.attr('page_size')} slots, the role's have "
                f"{role.page_size}",
            )
        written.update(effect.state for effect in node.effects if effect.kind == "writes")
    if written != declared.keys():
        missing = ", ".join(name for name in declared if name not in written)
        raise VerificationError("states", f"program {program.name} never writes {missing}")


def _can_stand(parameter: Parameter) -> bool:
    """Whether a parameter's shape allows the layout that it is said to have."""
    shape, word = parameter.value.spec.sizes(), parameter.word
    in_octets = parameter.layout == OCTETS and len(shape) == 2 and word > 0 and fits(shape[0], shape[1], word)
    return parameter.layout == ROWS or in_octets


def _verify_parameters(role: RolePlan, program: Program) -> None:
    """A program's weights are the role's, its rotary tables reach every position, its page tables every slot."""
    known = {parameter.value.name: parameter for parameter in role.parameters}
    for parameter in program.graph.parameters:
        value = parameter.value
        if known.get(value.name) != parameter:
            raise VerificationError("weights", f"program {program.name}: {value.name}: {value.spec} is not the role's")
        if parameter.derive and parameter.derive not in DERIVATIONS:
            raise VerificationError(
                "weights", f"program {program.name}: {value.name} is derived by {parameter.derive!r}, which is unknown"
            )
        if not _can_stand(parameter):
            raise VerificationError(
                "weights",
                f"program {program.name}: {value.name}: {value.spec} cannot stand in {parameter.layout!r} of words of "
                f"{parameter.word}",
            )
        if parameter.sources[0].startswith("rope.") and value.spec.sizes()[0] < role.positions:
            raise VerificationError(
                "rotary",
                f"program {program.name}: {value.name} is {value.spec}, the role has {role.positions} positions",
            )
    for value in program.graph.inputs:
        if value.name == "page_table" and value.spec.sizes()[1] * role.page_size < role.capacity:
            raise VerificationError(
                "pages",
                f"program {program.name}: {value.name} is {value.spec}, too narrow for {role.capacity} tokens in pages "
                f"of {role.page_size}",
            )
