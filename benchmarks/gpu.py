"""What the GPU backends do on the GPU at hand: correct first, then fast, beside peers in the same run.

    python benchmarks/gpu.py [--backend cuda_triton|numba_cuda|both] [--json FILE] [--skip tests,kernels,decode,host]
                             [--shapes 0.6B,1B,8B]

One command, made for nine minutes of an H100 with one backend: (1) its tests, natively, with compute-sanitizer
on a sample where it is installed; (2) each decode kernel's bandwidth in % of a device copy measured here, prefill's
product against torch.matmul, attention against scaled_dot_product_attention; (3) decode tokens/s of random-weight Llama
shapes in % of the time that reading the weights once would take, beside transformers (static cache, torch.compile); (4)
host time a step with and without CUDA graphs. With `both`, also each kernel's time in one backend over that in the
other, and decoding with attention from one and the rest from the other. Ratios are what counts; absolute numbers are
this GPU's.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from triton.testing import do_bench

import slotwise
from slotwise.core.backend import load_backend
from slotwise.core.ops import contract_of
from slotwise.proving.validate import call_of

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    # hidden, inner, layers, query heads, kv heads, head dim, vocabulary
    "0.6B": (1024, 3072, 28, 16, 8, 64, 151936),
    "1B": (2048, 8192, 16, 32, 8, 64, 128256),
    "8B": (4096, 14336, 32, 32, 8, 128, 128256),
}
BATCHES = (1, 8, 64, 256)
CONTEXT = 512
STEPS = 32
BACKENDS = ("cuda_triton", "numba_cuda")
MIXED = {"*": "cuda_triton", "attention": "numba_cuda"}
SANITIZED = "tests/backends/test_{}.py::test_attention_tiles_take_long_contexts"
Backends = str | dict[str, str]


def run_tests(backend: str) -> dict[str, Any]:
    found: dict[str, Any] = {"backend": backend}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x"]
    files = ["tests/gpu", f"tests/backends/test_{backend}.py", "tests/backends/test_kernels.py"]
    (other,) = set(BACKENDS) - {backend}
    chosen = ["-k", f"{backend} or (native and not {other})"]
    done = subprocess.run([*pytest, *files, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    found["tests"] = {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:]}
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        command = [sanitizer, "--error-exitcode", "9", *pytest, SANITIZED.format(backend)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found["sanitizer"] = {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-3:]}
    else:
        found["sanitizer"] = "compute-sanitizer is not installed"
    return found


def seconds(launch: Callable[[], Any]) -> float:
    """Median seconds of a launch, with the L2 cache flushed before each."""
    return float(do_bench(launch, return_mode="median")) / 1e3


def copy_bandwidth() -> float:
    """Bytes a second that a device copy reads and writes together."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


def bound(
    backend: str, name: str, inputs: tuple[torch.Tensor | None, ...], **attrs: Any
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A launch of a kernel with its outputs."""
    kernel = load_backend(backend).kernel(name)
    call = call_of(contract_of(kernel.op), inputs, attrs)
    outputs = [torch.empty(s.sizes(), dtype=s.dtype.torch, device="cuda") for s in call.outputs]
    scratch = torch.empty(max(1, kernel.workspace(call)), dtype=torch.uint8, device="cuda")
    return kernel.bind(inputs, tuple(outputs), call.attrs, scratch), outputs


def kernels(backend: str, shape: str, copied: float) -> Iterator[dict[str, Any]]:
    hidden, inner, _, q_heads, kv_heads, dim, vocab = SHAPES[shape]

    def bf16(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16)

    width = (q_heads + 2 * kv_heads) * dim
    for rows in (1, 8, 64):
        x, wide = bf16(rows, hidden), bf16(rows, inner)
        heads = {"q_heads": q_heads, "kv_heads": kv_heads, "head_dim": dim}
        for name, inputs, attrs in (
            ("linear_qkv.rows", (x, bf16(width, hidden), None), heads),
            ("linear_gated.rows", (x, bf16(2 * inner, hidden)), {"activation": "silu"}),
            ("linear.rows", (wide, bf16(hidden, inner), None), {}),
            ("logits.rows", (x, bf16(vocab, hidden)), {}),
        ):
            launch, outputs = bound(backend, name, inputs, **attrs)
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs) if t is not None)
            took, peer = seconds(launch), seconds(lambda a=inputs: F.linear(a[0], a[1]))
            yield {
                "backend": backend, "kernel": name, "shape": shape, "rows": rows, "us": took * 1e6,
                "percent of copy": 100 * moved / took / copied, "torch us": peer * 1e6,
            }  # fmt: skip
    for rows in (256, 2048):
        x, weight = bf16(rows, hidden), bf16(inner, hidden)
        launch, _ = bound(backend, "linear.tiles", (x, weight, None))
        took, peer = seconds(launch), seconds(lambda a=x, b=weight: torch.matmul(a, b.T))
        yield {
            "backend": backend, "kernel": "linear.tiles", "shape": shape, "rows": rows, "us": took * 1e6,
            "of torch.matmul": peer / took,
        }  # fmt: skip
    yield from attentions(backend, shape)


def attentions(backend: str, shape: str) -> Iterator[dict[str, Any]]:
    _, _, _, q_heads, kv_heads, dim, _ = SHAPES[shape]
    for kind, batch, rows, length in (("split", 1, 1, 4096), ("split", 32, 1, 2048), ("tiles", 1, 2048, 2048)):
        pages = -(-length // 16)
        q = torch.randn(batch * rows, q_heads, dim, device="cuda", dtype=torch.bfloat16)
        cache = torch.randn(2, (batch * pages + 1) * 16, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * rows
        table = torch.randperm(batch * pages, device="cuda").to(torch.int32).view(batch, pages) + 1
        lengths = torch.full((batch,), length, device="cuda", dtype=torch.int32)
        attrs = {"layer": 0, "page_size": 16, "scale": dim**-0.5}
        launch, _ = bound(backend, f"attention.{kind}", (q, cache[0], cache[1], starts, lengths, table), **attrs)
        dense = q.view(batch, rows, q_heads, dim).transpose(1, 2)
        k, v = (torch.randn(batch, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        causal = rows > 1
        peer = seconds(
            lambda a=dense, b=k, c=v, d=causal: F.scaled_dot_product_attention(a, b, c, is_causal=d, enable_gqa=True)
        )
        took = seconds(launch)
        yield {
            "backend": backend, "kernel": f"attention.{kind}", "shape": shape, "batch": batch, "rows": rows,
            "keys": length, "us": took * 1e6, "of sdpa": peer / took,
        }  # fmt: skip


def checkpoint(shape: str, folder: Path) -> Path:
    """A Llama folder with random bf16 weights and the bundled tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, q_heads, kv_heads, dim, vocab = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=q_heads,
        num_key_value_heads=kv_heads, head_dim=dim, vocab_size=vocab, tie_word_embeddings=shape != "8B",
        max_position_embeddings=4096, eos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples" / "models" / "stories" / name, folder / shape / name)
    return folder / shape


def ratios(lines: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each kernel measured with both backends: Triton's time over Numba's (above 1, Numba's is the faster)."""
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for line in lines:
        call = tuple((key, line[key]) for key in ("kernel", "shape", "batch", "rows", "keys") if key in line)
        times.setdefault(call, {})[line["backend"]] = line["us"]
    for call, us in times.items():
        if len(us) == len(BACKENDS):
            yield {**dict(call), "cuda_triton / numba_cuda": us["cuda_triton"] / us["numba_cuda"]}


def decode(backend: Backends, shape: str, path: Path, copied: float) -> Iterator[dict[str, Any]]:
    weight_bytes = sum(f.stat().st_size for f in path.glob("*.safetensors"))
    floor = weight_bytes / (copied / 2)  # reading alone moves half of what a copy moves in the same time
    rng = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        prompts = torch.randint(5, 2000, (batch, CONTEXT), generator=rng).tolist()
        llm = slotwise.LLM(
            path, backend=backend, capacity=CONTEXT + STEPS + 16, max_sequences=batch,
            decode_rows=max(64, batch), speculate=0, share_prefixes=False,
        )  # fmt: skip
        times = {}
        for count in (1, STEPS + 1):
            sampling = slotwise.Sampling(max_new_tokens=count)
            llm.generate(prompts, sampling)
            start = time.perf_counter()
            llm.generate(prompts, sampling)
            times[count] = time.perf_counter() - start
        step = (times[STEPS + 1] - times[1]) / STEPS
        del llm
        torch.cuda.empty_cache()
        yield {
            "backend": "mixed" if isinstance(backend, dict) else backend,
            "shape": shape, "batch": batch, "ms a step": step * 1e3, "tokens/s": batch / step,
            "percent of weight roofline": 100 * floor / step,
        }  # fmt: skip


def peers(shape: str, path: Path) -> Iterator[dict[str, Any]]:
    from transformers import AutoModelForCausalLM, StaticCache

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map="cuda").eval()
    for batch in BATCHES[:3]:
        cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS + 16)
        with torch.inference_mode():
            model(torch.randint(5, 2000, (batch, CONTEXT), device="cuda"), past_key_values=cache, use_cache=True)
            compiled = torch.compile(model, mode="reduce-overhead", fullgraph=False)
            token = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
            for step in range(STEPS):
                if step == STEPS // 2:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                at = torch.tensor([CONTEXT + step], device="cuda")
                out = compiled(token, past_key_values=cache, cache_position=at, use_cache=True)
                token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
        took = (time.perf_counter() - start) / (STEPS - STEPS // 2)
        yield {"shape": shape, "batch": batch, "transformers ms a step": took * 1e3, "tokens/s": batch / took}


def host_time(backend: str, path: Path) -> dict[str, Any]:
    """Milliseconds a step with graphs, each started ahead or waited for, and launch by launch (under a probe)."""
    models = {
        overlap: slotwise.LLM(path, backend=backend, capacity=256, max_sequences=1, speculate=0, overlap=overlap)
        for overlap in (True, False)
    }
    found: dict[str, Any] = {"backend": backend}
    for name in ("graphs", "graphs, waiting", "launches"):
        llm = models[name == "graphs"]
        executor = llm.engine.executor
        executor.probe = (lambda *_: None) if name == "launches" else None
        llm.generate("Once", slotwise.Sampling(max_new_tokens=4))
        start = time.perf_counter()
        out = llm.generate("Once", slotwise.Sampling(max_new_tokens=65))
        found[f"ms a step, {name}"] = 1e3 * (time.perf_counter() - start) / len(out.token_ids)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", default="cuda_triton", choices=(*BACKENDS, "both"))
    parser.add_argument("--json", type=Path, help="write all results here")
    parser.add_argument("--skip", default="", help="parts to leave out: tests, kernels, decode, host")
    parser.add_argument("--shapes", default="0.6B,1B,8B")
    parsed = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs an NVIDIA GPU; `slotwise doctor` says what is missing", file=sys.stderr)
        return 2
    skip, shapes = parsed.skip.split(","), parsed.shapes.split(",")
    backends = BACKENDS if parsed.backend == "both" else (parsed.backend,)
    decoders: list[Backends] = [*backends, *([MIXED] if parsed.backend == "both" else [])]
    properties = torch.cuda.get_device_properties(0)
    copied = copy_bandwidth()
    results: dict[str, Any] = {"gpu": properties.name, "torch": torch.__version__, "copy GB/s": copied / 1e9}

    def note(part: str, line: dict[str, Any]) -> None:
        results.setdefault(part, []).append(line)
        print(part, json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}), flush=True)

    print(json.dumps({k: str(v) for k, v in results.items()}), flush=True)
    for backend in backends if "tests" not in skip else ():
        note("tests", run_tests(backend))
    for backend in backends if "kernels" not in skip else ():
        for line in kernels(backend, shapes[-1], copied):
            note("kernels", line)
    for line in ratios(results.get("kernels", [])):
        note("ratios", line)
    with tempfile.TemporaryDirectory(prefix="slotwise-gpu-") as folder:
        for shape in shapes if "decode" not in skip else ():
            path = checkpoint(shape, Path(folder))
            parts = [("decode", decode(decoder, shape, path, copied)) for decoder in decoders]
            for part, lines in (*parts, ("transformers", peers(shape, path))):
                try:
                    for line in lines:
                        note(part, line)
                except Exception as error:  # a peer that fails, or a batch that does not fit, does not end the run
                    note(part, {"shape": shape, "failed": f"{type(error).__name__}: {error}"[:300]})
            torch.cuda.empty_cache()
    for backend in backends if "host" not in skip else ():
        note("host", host_time(backend, ROOT / "examples" / "models" / "stories"))
    if parsed.json:
        parsed.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
