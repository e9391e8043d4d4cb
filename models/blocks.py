"""The blocks that decoders are built of, as ops of the graph.

Owns `Sizes`, `Sources` and `DecoderBuilder`. What always holds: nodes come in their natural order and unfused (passes
fuse later); every parameter has one source, named as Hugging Face checkpoints name it; rows whose logits nobody asked
for are dropped before the final norm.
"""

from __future__ import annotations

from dataclasses import dataclass

from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Graph, Value
from slotwise.core.specs import Dim, DType, TensorSpec
from slotwise.core.state import kv_state


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers that every decoder has. `inner` is the feed-forward width, `tied` whether embeddings are shared."""

    hidden: int
    inner: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    eps: float
    activation: str
    tied: bool


@dataclass(frozen=True, slots=True)
class Sources:
    """How the checkpoint at hand names its tensors: the common prefix, the embedding table, the output matrix."""

    prefix: str
    embedding: str
    head: str


class DecoderBuilder:
    """Appends a decoder's blocks to a graph; `layer` numbers layers from 0, values are [T, ...] rows.

    One weight serves as embedding table and output matrix when `sources` gives both the same name.
    """

    def __init__(self, name: str, sizes: Sizes, sources: Sources, dtype: DType, norm_offset: float) -> None:
        self._graph = GraphBuilder(name)
        self._sizes, self._sources, self._dtype, self._norm_offset = sizes, sources, dtype, norm_offset
        self._token_ids = self._graph.input("token_ids", TensorSpec(DType.I32, ("T",)))
        self._positions = self._graph.input("positions", TensorSpec(DType.I32, ("T",)))
        self._logit_rows = self._graph.input("logit_rows", TensorSpec(DType.I32, ("R",)))
        self._table = self._weight("embedding", sources.embedding, sizes.vocab, sizes.hidden)
        self._ropes: dict[str, tuple[Value, Value]] = {}

    def embed(self, scale: float = 1.0) -> Value:
        """The embeddings of the input tokens [T, H], times `scale` rounded to the dtype."""
        return self._one("embedding", self._token_ids, self._table, scale=scale)

    def norm(self, x: Value, layer: int, name: str, source: str) -> Value:
        """RMS norm of `x` [T, H] with the layer's weight `source`."""
        weight = self._weight(f"layers.{layer}.{name}", f"{self._layer(layer)}.{source}.weight", self._sizes.hidden)
        return self._one("rms_norm", x, weight, eps=self._sizes.eps, weight_offset=self._norm_offset)

    def qkv(self, x: Value, layer: int, *, bias: bool) -> tuple[Value, Value, Value]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of `x` [T, H]."""
        q_heads, kv_heads = self._sizes.q_heads, self._sizes.kv_heads
        return (
            self._heads(x, layer, "q", q_heads, bias),
            self._heads(x, layer, "k", kv_heads, bias),
            self._heads(x, layer, "v", kv_heads, bias),
        )

    def head_norm(self, x: Value, layer: int, name: str) -> Value:
        """RMS norm of each head of `x` [T, Hx, D] with the layer's weight `name` (`q_norm` or `k_norm`)."""
        source = f"{self._layer(layer)}.self_attn.{name}.weight"
        weight = self._weight(f"layers.{layer}.attention.{name}", source, self._sizes.head_dim)
        return self._one("head_rms_norm", x, weight, eps=self._sizes.eps, weight_offset=self._norm_offset)

    def rotate(self, q: Value, k: Value, rope: str = "rope") -> tuple[Value, Value]:
        """Queries and keys turned to their positions by the tables `rope`."""
        if rope not in self._ropes:
            table = TensorSpec(DType.F32, ("M", self._sizes.head_dim // 2))
            cos, sin = (self._graph.parameter(f"{rope}.{f}", table, f"{rope}.{f}") for f in ("cos", "sin"))
            self._ropes[rope] = cos, sin
        rotated_q, rotated_k = self._graph.op("rotary", q, k, self._positions, *self._ropes[rope])
        return rotated_q, rotated_k

    def attend(
        self,
        q: Value,
        k: Value,
        v: Value,
        layer: int,
        *,
        bias: bool,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Value:
        """Causal attention through the layer's cache, and the output projection: [T, H].

        `scale` is 1 / sqrt(head_dim) where it is None; `window` and `softcap` are as in the op `attend`, 0 for none.
        """
        sizes = self._sizes
        self._graph.state(kv_state(layer, sizes.kv_heads, sizes.head_dim, self._dtype, window))
        scale = sizes.head_dim**-0.5 if scale is None else scale
        mixed = self._one("attend", q, k, v, layer=layer, scale=scale, window=window, softcap=softcap)
        width = sizes.q_heads * sizes.head_dim
        return self._linear(mixed, layer, "attention.o", "self_attn.o_proj", sizes.hidden, width, bias)

    def feed_forward(self, x: Value, layer: int, *, bias: bool = False) -> Value:
        """The gated feed-forward block of `x` [T, H]."""
        hidden, inner = self._sizes.hidden, self._sizes.inner
        gate = self._linear(x, layer, "feed_forward.gate", "mlp.gate_proj", inner, hidden, bias)
        up = self._linear(x, layer, "feed_forward.up", "mlp.up_proj", inner, hidden, bias)
        gated = self._one("gated_activation", gate, up, activation=self._sizes.activation)
        return self._linear(gated, layer, "feed_forward.down", "mlp.down_proj", hidden, inner, bias)

    def add(self, residual: Value, update: Value) -> Value:
        """`residual + update`, both [T, H]."""
        return self._one("add", residual, update)

    def logits(self, x: Value, softcap: float = 0.0) -> Value:
        """The rows asked for, the final norm, and the logits f32[R, V]."""
        sizes, sources = self._sizes, self._sources
        taken = self._one("take_rows", x, self._logit_rows)
        weight = self._weight("final_norm", f"{sources.prefix}norm.weight", sizes.hidden)
        normed = self._one("rms_norm", taken, weight, eps=sizes.eps, weight_offset=self._norm_offset)
        shared = sources.head == sources.embedding
        head = self._table if shared else self._weight("lm_head", sources.head, sizes.vocab, sizes.hidden)
        return self._one("logits", normed, head, softcap=softcap)

    def finish(self, logits: Value) -> Graph:
        """The checked graph."""
        return self._graph.finish(logits)

    def _heads(self, x: Value, layer: int, name: str, heads: int, bias: bool) -> Value:
        sizes = self._sizes
        parameters = self._weight_and_bias(
            layer, f"attention.{name}", f"self_attn.{name}_proj", heads * sizes.head_dim, sizes.hidden, bias
        )
        return self._one("linear_heads", x, *parameters, heads=heads, head_dim=sizes.head_dim)

    def _linear(self, x: Value, layer: int, name: str, source: str, rows: int, columns: int, bias: bool) -> Value:
        return self._one("linear", x, *self._weight_and_bias(layer, name, source, rows, columns, bias))

    def _weight_and_bias(
        self, layer: int, name: str, source: str, rows: int, columns: int, bias: bool
    ) -> tuple[Value, Value | None]:
        path, full = f"layers.{layer}.{name}", f"{self._layer(layer)}.{source}"
        weight = self._weight(path, f"{full}.weight", rows, columns)
        return weight, self._weight(f"{path}.bias", f"{full}.bias", rows) if bias else None

    def _weight(self, name: str, source: str, *shape: Dim) -> Value:
        return self._graph.parameter(name, TensorSpec(self._dtype, shape), source)

    def _layer(self, layer: int) -> str:
        return f"{self._sources.prefix}layers.{layer}"

    def _one(self, op: str, *inputs: Value | None, **attrs: int | float | str | bool) -> Value:
        (output,) = self._graph.op(op, *inputs, **attrs)
        return output
