"""What a model hands to the rest: its graph with a few facts, and a source of weights.

Owns `ModelSpec` and `WeightSource`. What always holds: a `ModelSpec` is a pure description (no tensor is in it), and
every source name of its graph's parameters is one that the model's `WeightSource` answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from slotwise.core.graph import Graph
from slotwise.core.specs import DType, TensorSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model, described.

    `name` is what people call it (the checkpoint folder's name), `architecture` the checkpoint's model type. `graph`
    takes `token_ids` and `positions` i32[T] and `logit_rows` i32[R] and returns logits f32[R, vocab_size]; its
    parameters are in `dtype`, its rotary tables f32[M, W]. `max_positions` is how many positions the model serves,
    scaling of its rotary embedding included.
    """

    name: str
    architecture: str
    graph: Graph
    vocab_size: int
    max_positions: int
    dtype: DType


class WeightSource(Protocol):
    """Where the tensors behind a graph's parameters come from."""

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """The tensor called `name`, one of the sources of a parameter with the bound spec `spec`.

        On the CPU and not to be written to: often a memory-mapped view, in the checkpoint's dtype. A name that starts
        with `rope.` is a rotary table: float32 with `spec.shape[0]` rows. Raises CheckpointError for another name.
        """
        ...
