"""Whether what a sampler's program draws may be fed to a model's program without passing through the host.

Owns `why_not_fed`. What always holds: where it has nothing to say, the two speak of one vocabulary, the sampler's op
promises an id below it in every row, drawn or not, and the model has an embedding for each.
"""

from __future__ import annotations

from slotwise.core.graph import Value
from slotwise.core.ops import contract_of
from slotwise.plans.program import Program
from slotwise.plans.sampling import output_names

SAMPLED = "sampled"
"""The array that sampler programs draw into."""


def why_not_fed(sampler: Program, model: Program, acceptance: str) -> str | None:
    """Why `model` cannot be fed what `sampler` draws from its logits; None when it can."""
    logits = input_of(sampler, "logits")
    sampled = sampled_value(sampler, acceptance)
    if logits is None or sampled is None:
        return f"{sampler.name} draws no tokens from logits"
    vocabulary = int(logits.spec.shape[-1])
    if not _is_below_vocabulary(sampler, sampled):
        return f"no op of {sampler.name} promises that {sampled.name} is below V"
    given = model.graph.outputs[0].spec
    if given.dtype is not logits.spec.dtype or given.sizes()[1] != vocabulary:
        return f"{model.name} gives {given}, {sampler.name} reads {logits.spec}"
    tables = [node.inputs[1] for node in model.graph.nodes if node.op == "embedding"]
    if not tables or any(table is None or int(table.spec.shape[0]) < vocabulary for table in tables):
        return f"{sampler.name} can sample {vocabulary} tokens, more than {model.name} has embeddings"
    return None


def input_of(program: Program, name: str) -> Value | None:
    """The program's input of that name, or None."""
    return next((value for value in program.graph.inputs if value.name == name), None)


def sampled_value(sampler: Program, acceptance: str) -> Value | None:
    """The output in which a sampler's program gives tokens, or None."""
    names = output_names(sampler.kind, acceptance)
    return dict(zip(names, sampler.graph.outputs, strict=True)).get(SAMPLED)


def _is_below_vocabulary(sampler: Program, sampled: Value) -> bool:
    """Whether the op that gives `sampled` promises a token id in every row, drawn or not."""
    for node in sampler.graph.nodes:
        for argument, value in zip(contract_of(node.op).outputs, node.outputs, strict=True):
            if value == sampled:
                return argument.below == "V"
    return False
