"""From model graphs and options to a plan.

Owns `compile_plan`, `unverified_plan`, the order of passes and the choice of row buckets. What always holds: the graph
is checked after every pass, and a finished plan is verified before it is returned; the result depends on the arguments
alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from slotwise.core.backend import Backend, load_backend
from slotwise.core.check import check_graph
from slotwise.core.errors import PlanError
from slotwise.core.graph import Graph
from slotwise.core.model import ModelSpec
from slotwise.core.specs import TensorSpec
from slotwise.plans.arrays import input_array, output_arrays, rows_array
from slotwise.plans.loop import DraftLoop, draft_loops, round_buffers
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes import Pass
from slotwise.plans.passes.fuse_add_norm import FuseAddNorm
from slotwise.plans.passes.fuse_projections import FuseProjections
from slotwise.plans.passes.fuse_rotary_write import FuseRotaryWrite
from slotwise.plans.passes.lay_out_weights import LayOutWeights
from slotwise.plans.passes.lower_cache import LowerCache
from slotwise.plans.passes.plan_buffers import plan_buffers
from slotwise.plans.passes.quantise_weights import QuantiseWeights
from slotwise.plans.passes.schedule import Schedule
from slotwise.plans.passes.select_kernels import SelectKernels
from slotwise.plans.passes.specialise import Specialise
from slotwise.plans.plan import Plan
from slotwise.plans.program import DECODE, PREFILL, SAMPLER, Program, RolePlan
from slotwise.plans.record import PlanRecord
from slotwise.plans.sampling import sampler_graphs
from slotwise.slots.step import DRAFT, TARGET, decode_step, prefill_step

DEFAULT_CAPACITY = 4096
AfterPass = Callable[[str, str, Graph], None]
"""Called as (pass name, program or model name, graph) after every pass: what `--print-after` and DEBUG show."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which checkpoint a role's weights come from: a name for people and its fingerprint."""

    name: str
    fingerprint: str


def symbolic_passes(options: PlanOptions, backends: Mapping[str, Backend]) -> tuple[Pass, ...]:
    """The passes that run once per model, in order."""
    return (
        FuseAddNorm(),
        FuseProjections(),
        LowerCache(page_size=options.page_size, speculates=options.speculate > 0),
        FuseRotaryWrite(),
        QuantiseWeights(options.weights),
        LayOutWeights(options, backends),
    )


def program_passes(
    options: PlanOptions, backends: Mapping[str, Backend], sizes: Mapping[str, int], decode_rows: int | None
) -> tuple[Pass, ...]:
    """The passes that run for each program, in order; `decode_rows` is None for a prefill program."""
    return (
        Specialise(tuple(sorted(sizes.items())), all_rows=decode_rows is not None),
        SelectKernels(options, backends, decode_rows),
        Schedule(),
    )


def pass_names() -> tuple[str, ...]:
    """Every pass, in order: what `--print-after` takes."""
    options = PlanOptions()
    return tuple(p.name for p in (*symbolic_passes(options, {}), *program_passes(options, {}, {}, None)))


def compile_plan(
    target: ModelSpec,
    *,
    draft: ModelSpec | str | None = None,
    options: PlanOptions | None = None,
    identities: Mapping[str, Identity] | None = None,
    observe: AfterPass | None = None,
) -> Plan:
    """Compile `target`, with a draft model, `"ngram"` or nothing as its drafter.

    `identities` name the checkpoints, by role. Raises BackendError for an unknown backend,
    KernelSelectionError for an op that none can run, PlanError when the roles or options do not fit each other.
    """
    plan = _compile(target, draft, options or PlanOptions(), identities or {}, observe or (lambda *_: None), _every)
    plan.verify()
    return plan


def unverified_plan(
    target: ModelSpec, *, draft: ModelSpec | str | None = None, options: PlanOptions, outline: bool
) -> PlanRecord:
    """What `compile_plan` makes, to be looked at and not run; an `outline` has of each kind the largest program alone.

    An outline takes a tenth of the work, no more memory than the plan, and nearly as much. Raises as `compile_plan`.
    """
    return _compile(target, draft, options, {}, lambda *_: None, _largest if outline else _every)


def _every(buckets: tuple[int, ...]) -> tuple[int, ...]:
    return buckets


def _largest(buckets: tuple[int, ...]) -> tuple[int, ...]:
    return buckets[-1:]


def _compile(
    target: ModelSpec,
    draft: ModelSpec | str | None,
    options: PlanOptions,
    identities: Mapping[str, Identity],
    watch: AfterPass,
    chosen: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> Plan:
    """The plan, unverified, with a program for each of the buckets that are `chosen`."""
    backends = {name: load_backend(name) for name in options.backend_names}
    for backend in backends.values():
        reason = backend.unavailable()
        if reason is not None:
            raise PlanError(f"backend {backend.name!r} cannot run here: {reason}")
    if isinstance(draft, str) and draft != "ngram":
        raise PlanError(f"drafter {draft!r} is not known; expected a model, 'ngram' or None")
    if draft is None or options.speculate == 0:
        draft, options = None, replace(options, speculate=0)
    kind = "none" if draft is None else "ngram" if isinstance(draft, str) else "model"
    models = {TARGET: target} | ({DRAFT: draft} if isinstance(draft, ModelSpec) else {})
    draft_vocab = draft.vocab_size if isinstance(draft, ModelSpec) else None
    if isinstance(draft, ModelSpec) and draft.vocab_size > target.vocab_size:
        raise PlanError(
            f"the draft model {draft.name} has {draft.vocab_size} token ids, the target {target.name} has "
            f"{target.vocab_size}; a draft must not have more: leave the last ones out, as `load_draft` does"
        )
    options = _settle(options, target)
    unnamed = {role: Identity(model.name, "") for role, model in models.items()}
    roles = {
        role: _role_plan(role, model, options, identities.get(role, unnamed[role])) for role, model in models.items()
    }
    programs: list[Program] = []
    for role, model in models.items():
        try:
            graph = _run(model.graph, symbolic_passes(options, backends), role, watch)
        except PlanError as error:
            raise PlanError(f"{role} {model.name}: {error}") from error
        made = _model_programs(roles[role], graph, options, backends, watch, chosen)
        parameters = {p.value.name: p for program in made for p in program.graph.parameters}
        roles[role] = replace(roles[role], parameters=tuple(parameters.values()))
        programs += made
    graphs = sampler_graphs(target.vocab_size, options.acceptance, kind != "none", draft_vocab)
    for sampler_kind, graph in graphs.items():
        for rows in chosen(_decode_buckets(options)):
            sizes = {"R": rows, "B": rows, "T": rows}
            programs.append(_program(SAMPLER, sampler_kind, rows, graph, options, backends, sizes, rows, watch))
    steps = [decode_step(kind, options.acceptance), *(prefill_step(role) for role in roles)]
    buffers = _buffers(programs, options, target.vocab_size)
    loops: tuple[DraftLoop, ...] = ()
    if draft_vocab is not None:
        loops = draft_loops(options, _decode_buckets(options), draft_vocab < target.vocab_size)
        scores = rows_array("scores", draft_vocab, target.vocab_size)
        buffers += [*round_buffers(loops, options.acceptance, scores, draft_vocab)]
    return Plan(options, kind, tuple(roles.values()), tuple(programs), tuple(steps), tuple(sorted(buffers)), loops)


def _settle(options: PlanOptions, target: ModelSpec) -> PlanOptions:
    """Options with their automatic values filled in."""
    capacity = options.capacity or min(target.max_positions, DEFAULT_CAPACITY)
    if capacity > target.max_positions:
        raise PlanError(
            f"capacity {capacity} is more than the {target.max_positions} positions of {target.name}; "
            f"choose capacity={target.max_positions} or less"
        )
    per_sequence = -(-capacity // options.page_size)
    pages = options.pages or per_sequence * options.max_sequences
    if pages < per_sequence:
        raise PlanError(
            f"a pool of {pages} pages of {options.page_size} slots cannot hold one sequence of capacity {capacity}, "
            f"which takes {per_sequence} pages; raise pages or lower capacity"
        )
    return replace(options, capacity=capacity, pages=pages, dtype=target.dtype)


def _role_plan(role: str, model: ModelSpec, options: PlanOptions, identity: Identity) -> RolePlan:
    capacity = min(options.capacity, model.max_positions)
    per_sequence = -(-capacity // options.page_size)
    pages = min(options.pages, per_sequence * options.max_sequences)
    return RolePlan(
        role=role,
        model=identity.name,
        fingerprint=identity.fingerprint,
        dtype=model.dtype,
        vocab_size=model.vocab_size,
        capacity=capacity,
        positions=capacity,
        page_size=options.page_size,
        pages=pages,
        states=model.graph.states,
        parameters=(),
    )


def _decode_buckets(options: PlanOptions) -> tuple[int, ...]:
    """Row counts of decode-side programs: fine steps where rows are few, about a third more each beyond."""
    wanted = max(options.max_sequences * (options.speculate + 2), 2 * (options.speculate + 1))
    largest = min(options.decode_rows, wanted)
    sizes = [size for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64) if size < largest]
    size = 96
    while size < largest:
        sizes.append(size)
        size = size * 4 // 3
    return (*sizes, largest)


def _prefill_buckets(options: PlanOptions) -> tuple[int, ...]:
    """Row counts of prefill programs: two a doubling, up to the chunk, so that a third at most is padding."""
    sizes = (size for power in range(4, 16) for size in (2**power, 3 * 2 ** (power - 1)))
    return (*(size for size in sizes if size < options.prefill_chunk), options.prefill_chunk)


def _model_programs(
    role: RolePlan,
    graph: Graph,
    options: PlanOptions,
    backends: Mapping[str, Backend],
    watch: AfterPass,
    chosen: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> list[Program]:
    columns = -(-role.capacity // role.page_size)
    shared = {"P": columns, "S": role.slots, "M": role.positions}
    programs = []
    for rows in chosen(_decode_buckets(options)):
        sizes = {**shared, "T": rows, "B": rows, "R": rows}
        programs.append(_program(role.role, DECODE, rows, graph, options, backends, sizes, rows, watch))
    for rows in chosen(_prefill_buckets(options)):
        sizes = {**shared, "T": rows, "B": rows, "R": 1}
        programs.append(_program(role.role, PREFILL, rows, graph, options, backends, sizes, None, watch))
    return programs


def _program(
    role: str,
    kind: str,
    rows: int,
    graph: Graph,
    options: PlanOptions,
    backends: Mapping[str, Backend],
    sizes: Mapping[str, int],
    decode_rows: int | None,
    watch: AfterPass,
) -> Program:
    invariant = None if decode_rows is None else max(options.decode_rows, decode_rows)
    bound = _run(graph, program_passes(options, backends, sizes, invariant), f"{role}.{kind}.{rows}", watch)
    return Program(role, kind, rows, bound, plan_buffers(bound, backends))


def _run(graph: Graph, passes: tuple[Pass, ...], where: str, watch: AfterPass) -> Graph:
    for each in passes:
        graph = each.apply(graph)
        check_graph(graph)
        watch(each.name, where, graph)
    return graph


def _buffers(programs: list[Program], options: PlanOptions, vocab_size: int) -> list[tuple[str, TensorSpec]]:
    """The engine's arrays: for every program input and output, the largest that any program needs."""
    found: dict[str, TensorSpec] = {}

    def grow(name: str, spec: TensorSpec) -> None:
        known = found.get(name, spec)
        found[name] = TensorSpec(
            spec.dtype, tuple(max(int(a), int(b)) for a, b in zip(known.shape, spec.shape, strict=True))
        )

    for program in programs:
        for value in program.graph.inputs:
            grow(input_array(program, value, vocab_size), value.spec)
        outputs = output_arrays(program, options.acceptance, vocab_size)
        for name, value in zip(outputs, program.graph.outputs, strict=True):
            grow(name, value.spec)
    return sorted(found.items())
