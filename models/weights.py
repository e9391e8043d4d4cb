"""Whether a checkpoint's tensors are those that a graph needs, and the source that hands them over.

Owns `find_sources`, `check_layers`, `check_tensors` and `CheckpointWeights`. What always holds: all checks read headers
alone, so a wrong checkpoint is refused before any weight is touched; a tensor that nothing uses is refused unless it is
known to be harmless; a refusal says what was seen, and a cause only where it is certain; nothing is copied.
(One exception reads weights: where tied embeddings are stored twice, the two copies are compared.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from slotwise.core.errors import CheckpointError
from slotwise.core.graph import Graph
from slotwise.core.specs import TensorSpec
from slotwise.models.architecture import Architecture
from slotwise.models.blocks import Sources
from slotwise.models.checkpoint import WEIGHT_DTYPES, Checkpoint
from slotwise.models.rope import Rope

PREFIXES = ("model.", "", "language_model.model.", "model.language_model.", "language_model.")
"""What stands before `layers.0`: a causal model's, a decoder's saved from its base class (as embedding models are), and
those of a text model within a multimodal one, by transformers before 5, since, and saved from its base class."""

_HEADS = ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight")
_BUFFERS = re.compile(r"rotary_emb\.inv_freq$")
_ADAPTER = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.)")
_QUANTISED = re.compile(r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|quant_map|weight_(scale|packed|zero_point)\w*)$")
_UNQUANTISED = ("F64", "C64")
_NAMED = 4


class CheckpointWeights:
    """The `WeightSource` of one checkpoint: memory-mapped views, and rotary tables computed on demand.

    Of a tensor in `rows` only so many first rows are there.
    """

    def __init__(self, checkpoint: Checkpoint, ropes: Mapping[str, Rope], rows: Mapping[str, int]) -> None:
        self._checkpoint = checkpoint
        self._ropes = dict(ropes)
        self._rows = dict(rows)

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """The tensor `name` as a view of its file; for `rope.cos` and its like a float32 table of `spec`'s rows.

        Raises CheckpointError for a name that the checkpoint lacks.
        """
        rope, _, function = name.rpartition(".")
        if rope in self._ropes and function in ("cos", "sin"):
            kind: Literal["cos", "sin"] = "cos" if function == "cos" else "sin"
            return self._ropes[rope].table(kind, spec.sizes()[0])
        return self._checkpoint.tensor(name)[: self._rows.get(name)]


def find_sources(checkpoint: Checkpoint, architecture: Architecture) -> Sources:
    """How this checkpoint names its tensors.

    Where embeddings are tied, one tensor serves both ends, whichever of the two is stored. Where both are stored and
    differ, each serves its own end, as in transformers 5.
    """
    names = checkpoint.tensors
    prefix = next((p for p in PREFIXES if any(name.startswith(f"{p}layers.") for name in names)), PREFIXES[0])
    embedding = f"{prefix}embed_tokens.weight"
    head = next((name for name in _HEADS if name in names), _HEADS[0])
    if not architecture.sizes.tied:
        return Sources(prefix, embedding, head)
    if embedding not in names and head in names:
        return Sources(prefix, head, head)
    if head in names and not _are_equal(checkpoint, embedding, head):
        return Sources(prefix, embedding, head)
    return Sources(prefix, embedding, embedding)


def _are_equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.tensors[one], checkpoint.tensors[other]
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(checkpoint.tensor(one), checkpoint.tensor(other))


def check_layers(checkpoint: Checkpoint, prefix: str, layers: int) -> None:
    """Raise CheckpointError unless the checkpoint's tensors are numbered for exactly `layers` layers.

    This comes before the graph is built, so that an absurd number in a config costs nothing.
    """
    pattern = re.compile(re.escape(prefix) + r"layers\.(0|[1-9][0-9]{0,5})\.")
    found = {int(match[1]) for match in map(pattern.match, checkpoint.tensors) if match}
    if found == set(range(layers)):
        return
    said = f"{checkpoint.folder}: config.json says 'num_hidden_layers' is {layers}, but the weights"
    if not found:
        raise CheckpointError(
            f"{said} hold no layer; expected names that start with {' or '.join(f'{p}layers.0.' for p in PREFIXES)}, "
            f"found {_listed(checkpoint.tensors)}"
        )
    raise CheckpointError(
        f"{said} named '{prefix}layers.*' hold layers {min(found)} to {max(found)} ({len(found)} of them); correct "
        "the number where these are all the layers, else fetch the missing weights"
    )


def check_tensors(checkpoint: Checkpoint, graph: Graph, sources: Sources, ignored: tuple[str, ...]) -> None:
    """Raise CheckpointError unless the tensors are those that `graph` needs, each with its shape and a float dtype.

    Harmless others: rotary buffers, the second copy of tied embeddings, and what starts with one of `ignored`.
    """
    needed = {
        source: parameter.value.spec
        for parameter in graph.parameters
        for source in parameter.sources
        if not source.startswith("rope.")
    }
    tables = {sources.embedding, sources.head}
    for name, spec in needed.items():
        _check_tensor(checkpoint, name, spec, is_table=name in tables)
    tied = {f"{sources.prefix}embed_tokens.weight", *_HEADS} if sources.embedding == sources.head else set()
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in needed and name not in tied and not _BUFFERS.search(name) and not name.startswith(ignored)
    ]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.folder}: holds {len(unknown)} tensors without a use in a {graph.name} of this config.json: "
            f"{_listed(unknown)}; {_what_to_do(unknown)}"
        )


def _what_to_do(unknown: list[str]) -> str:
    """About tensors that nothing reads: what they are, where their names say so."""
    if any(_ADAPTER.search(name) for name in unknown):
        return "they are an adapter's, which is not supported: merge it into the model's weights"
    if any(_QUANTISED.search(name) for name in unknown):
        return "they belong to quantised weights, which are not supported: expected float32, float16 or bfloat16"
    if all(name.endswith(".bias") for name in unknown):
        return "config.json says that this model has no such biases: correct it there if they are meant"
    return "parts that the architecture does not have are not supported, and none is left out in silence"


def _check_tensor(checkpoint: Checkpoint, name: str, spec: TensorSpec, *, is_table: bool) -> None:
    info = checkpoint.tensors.get(name)
    expected = list(spec.sizes())
    if info is None:
        hint = checkpoint.hint(name)
        if name in _HEADS and name not in checkpoint.absent:
            hint = (
                "; if the model shares its embeddings, 'tie_word_embeddings' in config.json must be true; a model that "
                "was made for embeddings alone has none, and generates nothing"
            )
        raise CheckpointError(f"{checkpoint.folder}: tensor '{name}' of shape {expected} is missing{hint}")
    if list(info.shape) != expected:
        rows = "; its rows are 'vocab_size', its columns 'hidden_size'" if is_table else ""
        raise CheckpointError(
            f"{info.file}: tensor '{name}' must have the shape {expected} by config.json, found {list(info.shape)}"
            f"{rows}; correct config.json where the tensor is right, else fetch the file again"
        )
    if info.dtype not in WEIGHT_DTYPES:
        advice = "convert it" if info.dtype in _UNQUANTISED else "quantised weights are not supported"
        raise CheckpointError(
            f"{info.file}: tensor '{name}' must be one of {', '.join(WEIGHT_DTYPES)}, found {info.dtype}; {advice}"
        )


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f", and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(repr(name[:100]) for name in ordered[:_NAMED]) + rest
