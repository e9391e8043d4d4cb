"""From a checkpoint folder to a model: description, weights, and the checkpoint itself.

Owns `load_model` and `check_config`. What always holds: when `load_model` returns, config and tensors have been checked
against each other, from headers alone; no weight has been read into memory.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from slotwise.core.errors import CheckpointError, OptionError
from slotwise.core.graph import Graph
from slotwise.core.model import ModelSpec, WeightSource
from slotwise.core.specs import COMPUTING, DType
from slotwise.models.architecture import Architecture, architectures, read_architecture
from slotwise.models.blocks import Sources
from slotwise.models.checkpoint import WEIGHT_DTYPES, Checkpoint
from slotwise.models.config import ConfigReader, read_json_object, shown
from slotwise.models.config_fields import Noted
from slotwise.models.weights import CheckpointWeights, check_layers, check_tensors, find_sources


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be planned: what it is, where its weights come from, and the folder behind both."""

    spec: ModelSpec
    weights: WeightSource
    checkpoint: Checkpoint


def load_model(
    folder: str | os.PathLike[str], dtype: DType | None = None, vocab_size: int | None = None
) -> LoadedModel:
    """Open the checkpoint in `folder`, check it, and build its graph.

    With `vocab_size`, a model that has more token ids is one of that many: the last rows of its embeddings and of its
    output matrix are left out. (A draft model may be padded further than its target.)

    `dtype` is what to compute in (float32, float16 or bfloat16); None is the checkpoint's own: what its config says,
    else what most of its tensors are. Raises CheckpointError for a folder that is damaged, inconsistent or not
    supported.
    """
    if dtype is not None and dtype not in COMPUTING:
        raise OptionError(
            f"dtype must be one of {', '.join(d.value for d in COMPUTING)} to compute in, found {dtype.value}"
        )
    checkpoint = Checkpoint.open(folder)
    config = checkpoint.reader()
    model_type = config.string("model_type")
    if model_type not in architectures():
        raise _unknown_type(config, _another_type(checkpoint, model_type))
    dtype = dtype or _own_dtype(checkpoint, config)
    architecture, graph, sources = _checked(checkpoint, config, model_type, dtype)
    rows: dict[str, int] = {}
    if vocab_size is not None and vocab_size < architecture.sizes.vocab:
        architecture = replace(architecture, sizes=replace(architecture.sizes, vocab=vocab_size))
        graph = architecture.graph(model_type, sources, dtype)
        rows = dict.fromkeys((sources.embedding, sources.head), vocab_size)
    spec = ModelSpec(
        name=_name_of(checkpoint.folder.resolve()),
        architecture=model_type,
        graph=graph,
        vocab_size=architecture.sizes.vocab,
        max_positions=architecture.max_positions,
        dtype=dtype,
    )
    return LoadedModel(spec, CheckpointWeights(checkpoint, architecture.ropes, rows), checkpoint)


def check_config(folder: Path) -> None:
    """Raise CheckpointError for a folder whose config.json alone says that the model is not supported."""
    file = folder / "config.json"
    config = ConfigReader(read_json_object(file), str(file))
    model_type = config.string("model_type")
    if model_type not in architectures():
        raise _unknown_type(config, "")
    read_architecture(config, model_type)


def _unknown_type(config: ConfigReader, suggestion: str) -> CheckpointError:
    return CheckpointError(
        f"{config.source}: model_type {shown(config.string('model_type'))} is not supported{suggestion}; supported are "
        f"{', '.join(sorted(architectures()))}"
    )


def _name_of(folder: Path) -> str:
    """What people call the model: the folder's name, or the repository's where it lies in the cache of a hub."""
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent.name.rpartition("--")[2] if cached else folder.name


def _checked(
    checkpoint: Checkpoint, config: ConfigReader, model_type: str, dtype: DType
) -> tuple[Architecture, Graph, Sources]:
    """What `config` describes, found to fit the checkpoint's tensors, and how those are named."""
    architecture = read_architecture(config, model_type)
    sources = find_sources(checkpoint, architecture)
    check_layers(checkpoint, sources.prefix, architecture.sizes.layers)
    graph = architecture.graph(model_type, sources, dtype)
    check_tensors(checkpoint, graph, sources, architecture.ignored)
    return architecture, graph, sources


def _another_type(checkpoint: Checkpoint, model_type: str) -> str:
    """A suggestion in place of a type that is not known; none unless everything in the folder would be used as it."""
    for near in difflib.get_close_matches(model_type[:80], sorted(architectures()), n=3, cutoff=0.5):
        fields = Noted(checkpoint.config)
        try:
            _checked(checkpoint, ConfigReader(fields, str(checkpoint.folder)), near, DType.F32)
        except CheckpointError:
            continue
        if set(fields.unexplained()) <= {"model_type", "dtype", "torch_dtype", "eos_token_id"}:
            return f" (did you mean '{near}'? as that it would load)"
    return ""


def _own_dtype(checkpoint: Checkpoint, config: ConfigReader) -> DType:
    """The dtype that the config names (`torch_dtype` before transformers 5), else that of most bytes."""
    names = tuple(str(d.torch).removeprefix("torch.") for d in COMPUTING)
    text = config.optional_mapping("text_config")
    for reader in (config, text):
        for key in ("dtype", "torch_dtype"):
            if reader is not None and reader.has(key) and reader.fields[key] != "auto":  # what is stored decides
                plain = {**reader.fields, key: str(reader.fields[key]).removeprefix("torch.")}
                return DType.parse(ConfigReader(plain, reader.source).choice(key, names))
    sizes: Counter[DType] = Counter()
    for info in checkpoint.tensors.values():
        if info.dtype in WEIGHT_DTYPES:
            sizes[DType.parse(info.dtype)] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else DType.F32
