"""What quantised weights cost in quality: perplexity of a text under native, int8, int4 and int4_zp weights.

    python benchmarks/perplexity.py TEXT CHECKPOINT [CHECKPOINT ...] [--backend B] [--json FILE]

The text is cut into windows of `--window` tokens, the checkpoint's own first tokens (such as <s>) before each; every
token of a window is predicted from those before it in the window, by `LLM.logits`. Perplexity is e to the mean negative
log-probability. A checkpoint that cannot be held in a scheme is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

from slotwise import LLM
from slotwise.core.errors import PlanError
from slotwise.plans.options import NATIVE, WEIGHTS


def windows_of(llm: LLM, text: str, window: int, tokens: int) -> tuple[list[list[int]], int]:
    """Windows of at most `window` token ids, `tokens` of the text in all (0: all), and how many are given in each.

    Given are the checkpoint's own first tokens, or, where it has none, the first of the window.
    """
    first = llm.tokenizer.encode("")
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    ids = ids[:tokens] if tokens else ids
    size = window - len(first)
    return [first + ids[start : start + size] for start in range(0, len(ids), size)], max(1, len(first))


def perplexity(llm: LLM, text: str, window: int, tokens: int) -> tuple[float, int]:
    """The perplexity and how many tokens were predicted."""
    total, count = 0.0, 0
    windows, given = windows_of(llm, text, window, tokens)
    for ids in windows:
        wanted = torch.tensor(ids[given:])
        if not len(wanted):
            continue
        scores = llm.logits(ids)[given - 1 : -1].double().log_softmax(-1)
        total -= float(scores[torch.arange(len(wanted)), wanted].sum())
        count += len(wanted)
    return math.exp(total / count), count


def measure(folder: Path, weights: str, text: str, parsed: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; `refused` holds the reason where the checkpoint cannot be held so."""
    row: dict[str, Any] = {"checkpoint": folder.name, "weights": weights}
    options = {"backend": parsed.backend, "capacity": parsed.window, "max_sequences": 1, "threads": parsed.threads}
    started = time.perf_counter()
    try:
        llm = LLM(folder, weights=weights, **options)
    except PlanError as error:
        return {**row, "refused": str(error)}
    loaded = time.perf_counter()
    value, count = perplexity(llm, text, parsed.window, parsed.tokens)
    return {
        **row,
        "perplexity": value,
        "tokens": count,
        "weight_bytes": llm.plan().target.parameter_bytes,
        "backends": list(llm.plan().backends),
        "seconds_to_load": loaded - started,
        "seconds": time.perf_counter() - loaded,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Perplexity of each checkpoint in each scheme, with the change against native."""
    lines = ["| checkpoint | weights | KiB | perplexity | against native |", "|---|---|---|---|---|"]
    native = {row["checkpoint"]: row.get("perplexity") for row in rows if row["weights"] == NATIVE}
    for row in rows:
        head = f"| {row['checkpoint']} | {row['weights']} |"
        base = native.get(row["checkpoint"])
        if "refused" in row:
            lines.append(f"{head} | refused: {row['refused']} | |")
            continue
        change = "" if base is None else f"{100 * (row['perplexity'] / base - 1):+.2f}%"
        lines.append(f"{head} {row['weight_bytes'] / 1024:.0f} | {row['perplexity']:.4f} | {change} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS)
    parser.add_argument("--backend", help="default: what LLM takes")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window (default 256)")
    parser.add_argument("--tokens", type=int, default=0, help="take this many tokens of the text (default: all)")
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parsed = parser.parse_args()
    text = parsed.text.read_text(encoding="utf-8")
    rows = [measure(folder, weights, text, parsed) for folder in parsed.checkpoints for weights in parsed.weights]
    print(table(rows))
    if parsed.json:
        about = {
            "text": parsed.text.name,
            "window": parsed.window,
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        parsed.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
