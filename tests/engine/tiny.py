"""Random models that run in microseconds, and a way to drive an engine over them.

A model is built straight as a graph, with weights in memory. A draft model is the target with noise in its weights, so
that some of its drafts are accepted and some are not. `alone` is what a request must give whatever else happens: the
same request, by itself, without speculation and without anything shared.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from slotwise.core.backend import Backend, Kernel, Launch, Tensors, load_backend
from slotwise.core.builder import GraphBuilder
from slotwise.core.graph import Value
from slotwise.core.model import ModelSpec
from slotwise.core.specs import DType, TensorSpec
from slotwise.core.state import kv_state
from slotwise.engine.detokenize import TokenPieces
from slotwise.engine.drafters import Drafter
from slotwise.engine.engine import Engine
from slotwise.engine.request import Chunk, Completion, Request
from slotwise.engine.sampling import Sampling
from slotwise.engine.sequence import Sequence as Running
from slotwise.plans.compile import compile_plan
from slotwise.plans.options import PlanOptions
from slotwise.plans.plan import Plan
from slotwise.slots.pages import SCRATCH_PAGE
from slotwise.slots.step import DRAFT, TARGET

HEAD_DIM = 8
INNER = 20


@dataclass(frozen=True)
class TinyWeights:
    """Weights by name, drawn from `seed`; `noise` is added to each, relative to its size. Answers rotary tables too.

    Of the tables over token ids only the first `ids` rows are there.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    seed: int
    noise: float = 0.0
    ids: int | None = None

    @functools.cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Norm weights around 1, the rest scaled to keep activations near unit variance and logits a few units wide."""
        return {name: self._draw(name, shape) for name, shape in self.shapes}

    def tensor(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """See `WeightSource.tensor`."""
        if not name.startswith("rope."):
            return self.tensors[name][: self.ids] if name in ("embedding", "head") else self.tensors[name]
        steps = 100.0 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        angles = torch.outer(torch.arange(spec.sizes()[0]).float(), steps)
        return angles.cos() if name == "rope.cos" else angles.sin()

    def _draw(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        # By name, so that a model with fewer layers has the same weights in those that it has.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        values = torch.randn(shape, generator=generator)
        values += self.noise * torch.randn(shape, generator=generator)
        if "norm" in name:
            return 1 + 0.3 * values
        if name.startswith("embedding"):
            return values
        return values * (2.0 if name.startswith("head") else 1.3) / shape[-1] ** 0.5


@dataclass(frozen=True)
class TinyModel:
    """A model and its weights."""

    spec: ModelSpec
    weights: TinyWeights

    def draft(
        self, noise: float = 0.1, *, layers: int = 1, max_positions: int | None = None, ids: int | None = None
    ) -> TinyModel:
        """This model's first layers with noise in their weights, and perhaps a shorter context or fewer token ids."""
        shapes = dict(self.weights.shapes)
        same = {"layers": layers, "max_positions": max_positions or self.spec.max_positions}
        same |= {"hidden": shapes["embedding"][1], "inner": shapes["layers.0.up"][0]}
        vocab = self.spec.vocab_size
        cut, full = (tiny_model(self.weights.seed, vocab=v, **same) for v in (ids or vocab, vocab))
        return TinyModel(cut.spec, replace(full.weights, noise=noise, ids=ids))


@functools.cache
def tiny_model(
    seed: int = 0,
    *,
    layers: int = 1,
    vocab: int = 31,
    max_positions: int = 64,
    window: int = 0,
    softcap: float = 0.0,
    hidden: int = 16,
    inner: int = INNER,
) -> TinyModel:
    """A decoder with one key head; `window` and `softcap` are attention's."""
    heads = hidden // HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {}
    g = GraphBuilder(f"tiny{seed}")
    ids, positions = (g.input(n, TensorSpec(DType.I32, ("T",))) for n in ("token_ids", "positions"))
    logit_rows = g.input("logit_rows", TensorSpec(DType.I32, ("R",)))

    def weight(name: str, *shape: int) -> Value:
        shapes[name] = shape
        return g.parameter(name, TensorSpec(DType.F32, shape), name)

    def one(op: str, *inputs: Value | None, **attrs: int | float | str | bool) -> Value:
        return g.op(op, *inputs, **attrs)[0]

    tables = [g.parameter(n, TensorSpec(DType.F32, ("M", HEAD_DIM // 2)), n) for n in ("rope.cos", "rope.sin")]
    x = one("embedding", ids, weight("embedding", vocab, hidden))
    for layer in range(layers):
        path = f"layers.{layer}"
        normed = one("rms_norm", x, weight(f"{path}.norm", hidden), eps=1e-6)
        q, k, v = (
            one(
                "linear_heads",
                normed,
                weight(f"{path}.{part}", n * HEAD_DIM, hidden),
                None,
                heads=n,
                head_dim=HEAD_DIM,
            )
            for part, n in (("q", heads), ("k", 1), ("v", 1))
        )
        q, k = g.op("rotary", q, k, positions, *tables)
        g.state(kv_state(layer, 1, HEAD_DIM, DType.F32))
        mixed = one("attend", q, k, v, layer=layer, scale=HEAD_DIM**-0.5, window=window, softcap=softcap)
        x = one("add", x, one("linear", mixed, weight(f"{path}.o", hidden, heads * HEAD_DIM), None))
        normed = one("rms_norm", x, weight(f"{path}.second_norm", hidden), eps=1e-6)
        gate, up = (one("linear", normed, weight(f"{path}.{n}", inner, hidden), None) for n in ("gate", "up"))
        gated = one("gated_activation", gate, up, activation="silu")
        x = one("add", x, one("linear", gated, weight(f"{path}.down", hidden, inner), None))
    taken = one("take_rows", x, logit_rows)
    normed = one("rms_norm", taken, weight("final_norm", hidden), eps=1e-6)
    graph = g.finish(one("logits", normed, weight("head", vocab, hidden)))
    spec = ModelSpec(f"tiny{seed}", "tiny", graph, vocab, max_positions, DType.F32)
    return TinyModel(spec, TinyWeights(tuple(shapes.items()), seed))


DraftChoice = TinyModel | str | None


@functools.cache
def tiny_plan(
    target: ModelSpec, draft: ModelSpec | str | None, options: PlanOptions, invariant_prefill: bool = False
) -> Plan:
    """`compile_plan`, once for each choice; `invariant_prefill` hides kernels whose rows are not kept apart."""
    backend = row_by_row() if invariant_prefill else uneven()
    with mock.patch("slotwise.plans.compile.load_backend", return_value=backend):
        return compile_plan(target, draft=draft, options=options)


@functools.cache
def row_by_row() -> Backend:
    """The reference without kernels that do not keep rows apart."""
    reference = load_backend("reference")
    return replace(reference, kernels=tuple(k for k in reference.kernels if k.invariant_rows != 0))


@functools.cache
def uneven() -> Backend:
    """The reference, but where a projection need not keep rows apart it shows: each result depends on its row's place.

    At these sizes PyTorch seldom rounds by the number of rows; here any chunk that begins elsewhere changes bits.
    """
    reference = load_backend("reference")
    return replace(reference, kernels=tuple(_uneven(k) if k.invariant_rows == 0 else k for k in reference.kernels))


def _uneven(kernel: Kernel) -> Kernel:
    if not kernel.op.startswith("linear"):
        return kernel

    def bind(inputs: Tensors, outputs: tuple[torch.Tensor, ...], attrs: Any, workspace: torch.Tensor | None) -> Launch:
        launch, rows = kernel.bind(inputs, outputs, attrs, workspace), len(outputs[0])
        factor = 1 + 0.01 * torch.sin(torch.arange(rows) + rows)

        def launch_unevenly() -> None:
            launch()
            for output in outputs:
                output.mul_(factor.view(-1, *[1] * (output.dim() - 1)))

        return launch_unevenly

    return replace(kernel, bind=bind)


def tiny_engine(
    target: TinyModel,
    draft: DraftChoice = None,
    *,
    pieces: TokenPieces | None = None,
    eos_ids: Iterable[int] = (),
    drafter: Drafter | None = None,
    invariant_prefill: bool = False,
    overlap: bool | None = None,
    **options: Any,
) -> Engine:
    """An engine over tiny models; `options` are the plan's."""
    chosen = PlanOptions(**{"max_sequences": 4, "decode_rows": 8, "page_size": 3, "prefill_chunk": 7, **options})
    drafting = draft.spec if isinstance(draft, TinyModel) else draft
    plan = tiny_plan(target.spec, drafting, chosen, invariant_prefill)
    weights = {TARGET: target.weights} | ({DRAFT: draft.weights} if isinstance(draft, TinyModel) else {})
    with mock.patch("slotwise.engine.executor.load_backend", return_value=uneven()):
        return Engine(plan, weights, pieces=pieces, eos_ids=eos_ids, drafter=drafter, overlap=overlap)


def request(prompt: Sequence[int], max_new_tokens: int = 8, **sampling: Any) -> Request:
    """A request that reports log-probabilities and has a seed, unless told otherwise."""
    return Request(tuple(prompt), Sampling(**{"max_new_tokens": max_new_tokens, "logprobs": 2, "seed": 1, **sampling}))


def prompt_of(length: int, seed: int = 0, vocab: int = 31) -> tuple[int, ...]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, vocab, (length,), generator=generator).tolist())


def finish(engine: Engine, limit: int = 20_000) -> None:
    """Step until idle; a run of `limit` steps is taken for one that never ends."""
    for _ in range(limit):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError(f"still busy after {limit} steps\n{engine.show_history()}")


def run(engine: Engine, requests: Iterable[Request]) -> list[Completion]:
    """Serve `requests` together, check that every slot came back, return what they gave."""
    sequences = [engine.add(each) for each in requests]
    finish(engine)
    assert_all_returned(engine)
    return [sequence.completion() for sequence in sequences]


def alone(target: TinyModel, one: Request, **options: Any) -> Completion:
    """What `one` gives by itself, without speculation, sharing, or a small pool."""
    return _alone(target, one, tuple(sorted(options.items())))


@functools.lru_cache(maxsize=4096)
def _alone(target: TinyModel, one: Request, options: tuple[tuple[str, Any], ...]) -> Completion:
    settings = {"page_size": 16, **dict(options), "max_sequences": 1, "share_prefixes": False}
    pieces, eos_ids = settings.pop("pieces", None), settings.pop("eos_ids", ())
    (completion,) = run(tiny_engine(target, pieces=pieces, eos_ids=eos_ids, **settings), [one])
    return completion


def outcome(completion: Completion) -> tuple[object, ...]:
    """What speculation, batching and sharing may never change."""
    return completion.token_ids, completion.logprobs, completion.text, completion.finish_reason


def assert_all_returned(engine: Engine) -> None:
    """Nothing is held in any role once an engine is idle, counted from the pages and from the lanes themselves."""
    assert engine.is_idle
    assert engine.lanes.free == engine.lanes.count
    for role in engine.ledger.roles.values():
        pool = role.pool
        assert not role.is_open.any()
        assert not role.committed.any()
        assert not role.reserved.any()
        assert not pool.references.any()
        assert (role.page_table == SCRATCH_PAGE).all()
        assert pool.available == pool.total == role.pool.count().free + role.pool.count().cached
        assert role.flow.reserved == role.flow.committed + role.flow.released


def stream(engine: Engine, sequence: Running) -> list[Chunk]:
    """Every chunk of one sequence, taken after each step."""
    chunks: list[Chunk] = []
    while not chunks or chunks[-1].completion is None:
        if sequence.state != "done":
            engine.step()
        chunk = sequence.take_chunk()
        if chunk is not None:
            chunks.append(chunk)
    return chunks
