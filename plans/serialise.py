"""The JSON form of a plan.

Owns writing and reading. What always holds: reading what was written gives an equal plan; the text carries a schema
version and a digest of its content; another schema, a damaged or an edited file is a PlanError, never a wrong plan.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

from slotwise.core.check import check_graph
from slotwise.core.errors import PlanError, SlotwiseError
from slotwise.core.graph import Effect, Graph, Node, Parameter, Rejection, Selection, Value
from slotwise.core.layouts import ROWS
from slotwise.core.specs import DType, TensorSpec, parse_spec
from slotwise.core.state import StatePart, StateSpec
from slotwise.plans.loop import DraftLoop
from slotwise.plans.options import PlanOptions
from slotwise.plans.passes.plan_buffers import Placement
from slotwise.plans.program import Program, RolePlan
from slotwise.plans.record import SCHEMA, PlanRecord
from slotwise.slots.affine import parse_affine
from slotwise.slots.step import Limit, Span, Step, StepOp

Json = dict[str, Any]


def plan_to_json(plan: PlanRecord) -> str:
    """The plan as text: one program node a line, so that a plain diff reads well."""
    body: Json = {
        "options": _options(plan.options),
        "draft": plan.draft,
        "roles": [_role(role) for role in plan.roles],
        "steps": [_step(step) for step in plan.steps],
        "buffers": {name: str(spec) for name, spec in plan.buffers},
        "loops": [[loop.sequences, loop.first, loop.rounds, loop.sampler] for loop in plan.loops],
        "programs": [_program(program) for program in plan.programs],
    }
    return _layout({"slotwise_plan": SCHEMA, "digest": _digest(body), **body}) + "\n"


def plan_from_json(text: str) -> PlanRecord:
    """The plan that `text` holds; raises PlanError for anything but an intact plan of this schema."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(
            f"this is no plan: it is not JSON ({error}); make one with `slotwise plan show --save`"
        ) from error
    if not isinstance(data, dict) or "slotwise_plan" not in data:
        raise PlanError(
            "this is no plan: the key 'slotwise_plan' is missing; make one with `slotwise plan show --save`"
        )
    schema = data.pop("slotwise_plan")
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        advice = "update Slotwise to read it" if newer else "compile it again with this version"
        raise PlanError(f"the plan has schema {schema!r}, this version reads schema {SCHEMA}; {advice}")
    digest = data.pop("digest", None)
    if digest != _digest(data):
        raise PlanError("the plan is damaged or was edited: its content does not match its digest; compile it again")
    try:
        plan = PlanRecord(
            options=_read_options(data["options"]),
            draft=data["draft"],
            roles=tuple(_read_role(role) for role in data["roles"]),
            programs=tuple(_read_program(program) for program in data["programs"]),
            steps=tuple(_read_step(step) for step in data["steps"]),
            buffers=tuple((name, parse_spec(spec)) for name, spec in data["buffers"].items()),
            loops=tuple(DraftLoop(*loop) for loop in data["loops"]),
        )
        for program in plan.programs:
            check_graph(program.graph)
    except SlotwiseError as error:
        raise PlanError(f"the plan holds something this version does not understand: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise PlanError(f"the plan is damaged: {type(error).__name__}: {error}; compile it again") from error
    return plan


def _digest(body: Json) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _layout(data: Json) -> str:
    """JSON with one entry a line at the depths that people compare."""

    def write(value: Any, depth: int, indent: str) -> str:
        inner = indent + " "
        if isinstance(value, dict) and depth < 3 and value:
            rows = [f"{inner}{json.dumps(k)}: {write(v, depth + 1, inner)}" for k, v in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
        if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
            rows = [inner + write(v, depth + 1, inner) for v in value]
            return "[\n" + ",\n".join(rows) + f"\n{indent}]"
        return json.dumps(value)

    return write(data, 0, "")


def _options(options: PlanOptions) -> Json:
    found: Json = {field.name: getattr(options, field.name) for field in fields(options)}
    found["backend"] = {op: list(names) for op, names in options.backend}
    found["dtype"] = None if options.dtype is None else options.dtype.value
    return found


def _read_options(data: Json) -> PlanOptions:
    values = {**data, "backend": tuple((op, tuple(names)) for op, names in data["backend"].items())}
    return PlanOptions(**values)


def _parameter(parameter: Parameter) -> Json:
    found: Json = {"name": parameter.value.name, "spec": str(parameter.value.spec), "sources": list(parameter.sources)}
    if parameter.derive:
        found["derive"] = parameter.derive
    if parameter.layout != ROWS:
        found |= {"layout": parameter.layout, "word": parameter.word}
    return found


def _read_parameter(data: Json) -> Parameter:
    value = Value(data["name"], parse_spec(data["spec"]), "parameter")
    layout, word = data.get("layout", ROWS), data.get("word", 0)
    return Parameter(value, tuple(data["sources"]), data.get("derive", ""), layout, word)


def _state(state: StateSpec) -> Json:
    parts = [[part.name, part.dtype.value, list(part.shape)] for part in state.parts]
    return {field.name: getattr(state, field.name) for field in fields(state)} | {"parts": parts}


def _read_state(data: Json) -> StateSpec:
    parts = tuple(StatePart(name, tuple(shape), DType.parse(dtype)) for name, dtype, shape in data["parts"])
    return StateSpec(**{**data, "parts": parts})


def _role(role: RolePlan) -> Json:
    found: Json = {field.name: getattr(role, field.name) for field in fields(role)}
    found["dtype"] = role.dtype.value
    found["states"] = [_state(state) for state in role.states]
    found["parameters"] = [_parameter(parameter) for parameter in role.parameters]
    return found


def _read_role(data: Json) -> RolePlan:
    states = tuple(_read_state(state) for state in data["states"])
    parameters = tuple(_read_parameter(parameter) for parameter in data["parameters"])
    return RolePlan(**{**data, "dtype": DType.parse(data["dtype"]), "states": states, "parameters": parameters})


def _span(span: Span) -> list[str]:
    return [span.role, str(span.begin), str(span.end)]


def _step(step: Step) -> Json:
    return {
        "name": step.name,
        "limits": [[str(limit.bound), limit.reason] for limit in step.limits],
        "ops": [
            {"op": op.op, "spans": [_span(s) for s in op.spans], "ends": [str(e) for e in op.ends], "note": op.note}
            for op in step.ops
        ],
    }


def _read_step(data: Json) -> Step:
    ops = []
    for op in data["ops"]:
        spans = tuple(Span(role, parse_affine(begin), parse_affine(end)) for role, begin, end in op["spans"])
        ops.append(StepOp(op["op"], spans, tuple(parse_affine(end) for end in op["ends"]), op["note"]))
    limits = tuple(Limit(parse_affine(bound), reason) for bound, reason in data["limits"])
    return Step(data["name"], limits, tuple(ops))


def _program(program: Program) -> Json:
    graph = program.graph
    caches = {v.name: str(v.spec) for node in graph.nodes for v in node.inputs if v is not None and v.kind == "cache"}
    return {
        "role": program.role,
        "kind": program.kind,
        "rows": program.rows,
        "graph": graph.name,
        "inputs": {value.name: str(value.spec) for value in graph.inputs},
        "parameters": [_parameter(parameter) for parameter in graph.parameters],
        "states": [_state(state) for state in graph.states],
        "state_values": caches,
        "outputs": [value.name for value in graph.outputs],
        "nodes": [_node(node) for node in graph.nodes],
        "placements": [[p.value, p.offset, p.nbytes, p.first, p.last] for p in program.placements],
    }


def _node(node: Node) -> Json:
    found: Json = {
        "op": node.op,
        "in": [None if value is None else value.name for value in node.inputs],
        "out": [[value.name, str(value.spec)] for value in node.outputs],
        "attrs": dict(node.attrs),
        "effects": [[effect.kind, effect.state, effect.span] for effect in node.effects],
    }
    if node.selection is not None:
        chosen = node.selection
        found["kernel"] = chosen.kernel
        found["why"] = chosen.reason
        found["row_invariant"] = chosen.row_invariant
        found["rejected"] = [[r.kernel, r.reason] for r in chosen.rejected]
    return found


def _read_program(data: Json) -> Program:
    specs: dict[str, TensorSpec] = {}

    def spec_of(text: str) -> TensorSpec:
        if text not in specs:
            specs[text] = parse_spec(text)
        return specs[text]

    inputs = tuple(Value(name, spec_of(spec), "input") for name, spec in data["inputs"].items())
    parameters = tuple(_read_parameter(parameter) for parameter in data["parameters"])
    values = {value.name: value for value in (*inputs, *(parameter.value for parameter in parameters))}
    values |= {name: Value(name, spec_of(spec), "cache") for name, spec in data["state_values"].items()}
    nodes = []
    for entry in data["nodes"]:
        outputs = tuple(Value(name, spec_of(spec)) for name, spec in entry["out"])
        operands = tuple(None if name is None else values[name] for name in entry["in"])
        values |= {value.name: value for value in outputs}
        selection = None
        if "kernel" in entry:
            rejected = tuple(Rejection(kernel, reason) for kernel, reason in entry["rejected"])
            selection = Selection(entry["kernel"], entry["why"], entry["row_invariant"], rejected)
        effects = tuple(Effect(kind, state, span) for kind, state, span in entry["effects"])
        attrs = tuple(sorted(entry["attrs"].items()))
        nodes.append(Node(entry["op"], operands, outputs, attrs, effects, selection))
    states = tuple(_read_state(state) for state in data["states"])
    outputs = tuple(values[name] for name in data["outputs"])
    graph = Graph(data["graph"], inputs, parameters, states, tuple(nodes), outputs)
    placements = tuple(Placement(*placement) for placement in data["placements"])
    return Program(data["role"], data["kind"], data["rows"], graph, placements)
