"""The sampler's graphs: from logits to tokens.

Owns the programs that every model shares. What always holds: they are ordinary graphs of contract ops, so kernels are
chosen, buffers planned and plans printed for them as for a model.
"""

from __future__ import annotations

from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Graph, Value
from slotwise.core.ops.noise import DRAFT_STREAM, TARGET_STREAM
from slotwise.core.specs import DType, TensorSpec

GREEDY, SAMPLE, SAMPLE_DRAFT, FILTER, ACCEPT = "greedy", "sample", "sample_draft", "filter", "accept"
GREEDY_NARROW, SAMPLE_NARROW = "greedy_narrow", "sample_narrow"
"""`greedy` and `sample` over the ids of a draft model that has fewer than the target."""

CHEAPER = {SAMPLE: GREEDY, SAMPLE_NARROW: GREEDY_NARROW}
"""What draws the same tokens as a kind for less where every row is greedy; it reads no setting of a row."""


def sampler_graphs(
    vocab_size: int, acceptance: str, speculates: bool, draft_vocab: int | None = None
) -> dict[str, Graph]:
    """Kind -> graph, for the acceptance rule `coupled` or `rejection`.

    `draft_vocab` is how many token ids the draft model has, at most the target's `vocab_size`; None without one.
    Drafts are drawn from its ids alone, so that each can be fed to it.
    """
    graphs = {GREEDY: _greedy(vocab_size, GREEDY), SAMPLE: _sample(vocab_size, SAMPLE, TARGET_STREAM)}
    if not speculates:
        return graphs
    if acceptance == "coupled":
        graphs[ACCEPT] = _accept_coupled()
        if draft_vocab is not None and draft_vocab < vocab_size:
            graphs[GREEDY_NARROW] = _greedy(draft_vocab, GREEDY_NARROW)
            graphs[SAMPLE_NARROW] = _sample(draft_vocab, SAMPLE_NARROW, TARGET_STREAM)
    else:
        graphs[SAMPLE_DRAFT] = _sample(draft_vocab or vocab_size, SAMPLE_DRAFT, DRAFT_STREAM)
        graphs[FILTER] = _filter(vocab_size)
        graphs[ACCEPT] = _accept_rejection(vocab_size)
    return graphs


def _logits(builder: GraphBuilder, vocab_size: int) -> Value:
    return builder.input("logits", TensorSpec(DType.F32, ("R", vocab_size)))


def _scores(builder: GraphBuilder, vocab_size: int) -> Value:
    logits = _logits(builder, vocab_size)
    controls = [
        builder.input(name, TensorSpec(dtype, ("R",)))
        for name, dtype in (
            ("temperature", DType.F32),
            ("top_k", DType.I32),
            ("top_p", DType.F32),
            ("min_p", DType.F32),
        )
    ]
    (scores,) = builder.op("filter_logits", logits, *controls)
    return scores


def _keys(builder: GraphBuilder) -> tuple[Value, Value]:
    seed = builder.input("seed", TensorSpec(DType.I64, ("R",)))
    return seed, builder.input("token_positions", TensorSpec(DType.I32, ("R",)))


def _greedy(vocab_size: int, kind: str) -> Graph:
    builder = GraphBuilder(kind)
    return builder.finish(*builder.op("greedy", _logits(builder, vocab_size)))


def _sample(vocab_size: int, kind: str, stream: int) -> Graph:
    builder = GraphBuilder(kind)
    scores = _scores(builder, vocab_size)
    tokens, ok = builder.op("sample", scores, *_keys(builder), stream=stream)
    return builder.finish(tokens, ok, scores)


def _filter(vocab_size: int) -> Graph:
    builder = GraphBuilder(FILTER)
    return builder.finish(_scores(builder, vocab_size))


def _accept_coupled() -> Graph:
    builder = GraphBuilder(ACCEPT)
    sampled = builder.input("sampled", TensorSpec(DType.I32, ("R",)))
    token_ids = builder.input("token_ids", TensorSpec(DType.I32, ("R",)))
    row_start = builder.input("row_start", TensorSpec(DType.I32, ("B+1",)))
    return builder.finish(*builder.op("accept_coupled", sampled, token_ids, row_start))


def _accept_rejection(vocab_size: int) -> Graph:
    builder = GraphBuilder(ACCEPT)
    target = builder.input("scores", TensorSpec(DType.F32, ("R", vocab_size)))
    draft = builder.input("draft_scores", TensorSpec(DType.F32, ("R", vocab_size)))
    token_ids = builder.input("token_ids", TensorSpec(DType.I32, ("R",)))
    row_start = builder.input("row_start", TensorSpec(DType.I32, ("B+1",)))
    return builder.finish(*builder.op("accept_rejection", target, draft, token_ids, row_start, *_keys(builder)))


_OUTPUTS = {
    **dict.fromkeys((GREEDY, GREEDY_NARROW), ("sampled", "ok")),
    **dict.fromkeys((SAMPLE, SAMPLE_NARROW, SAMPLE_DRAFT), ("sampled", "ok", "scores")),
    FILTER: ("scores",),
}


def output_names(kind: str, acceptance: str) -> tuple[str, ...]:
    """What a program of that kind gives, in the order of its graph's outputs."""
    if kind == ACCEPT:
        return ("accepted",) if acceptance == "coupled" else ("accepted", "following", "accept_ok")
    return _OUTPUTS.get(kind, ("logits",))
