"""`slotwise generate`: complete prompts.

What always holds: with one prompt the text streams as it is made; with `--json` the output is one JSON object a line
and nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from slotwise.cli._options import add_model_options, add_sampling_options, load, sampling_of
from slotwise.core.errors import OptionError
from slotwise.engine.request import Completion
from slotwise.engine.sampling import Sampling
from slotwise.llm import LLM


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("generate", help="complete a prompt", description="Complete one prompt or several.")
    add_model_options(parser)
    prompt = parser.add_argument_group("prompt (one or more)")
    prompt.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt (may be repeated)")
    prompt.add_argument(
        "--prompt-file", action="append", default=[], metavar="F", help="a file with a prompt; - for standard input"
    )
    add_sampling_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object a prompt")
    output.add_argument("--stats", action="store_true", help="print speed and acceptance afterwards")
    output.add_argument("--ledger", action="store_true", help="print the last steps and the slot ledger afterwards")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Load, generate, print; exit code 1 when a request failed."""
    prompts = [*parsed.prompt, *(_read(name) for name in parsed.prompt_file)]
    if not prompts:
        raise OptionError("there is nothing to complete; give --prompt TEXT or --prompt-file F")
    llm = load(parsed)
    sampling = sampling_of(parsed, llm)
    if len(prompts) == 1 and not parsed.json:
        completions = [_stream(llm, prompts[0], sampling)]
    else:
        completions = llm.generate(prompts, sampling)
        for prompt, completion in zip(prompts, completions, strict=True):
            print(json.dumps(as_json(completion)) if parsed.json else f"{prompt}{completion.text}\n")
    for completion in completions:
        _report(completion, parsed.stats)
    if parsed.ledger:
        print(llm.ledger(), file=sys.stderr)
    return 1 if any(completion.error is not None for completion in completions) else 0


def _stream(llm: LLM, prompt: str, sampling: Sampling) -> Completion:
    print(prompt, end="", flush=True)
    for chunk in llm.stream(prompt, sampling):
        print(chunk.text, end="", flush=True)
        if chunk.completion is not None:
            print(flush=True)
            return chunk.completion
    raise OptionError("the stream ended without a completion")


def _report(completion: Completion, with_stats: bool) -> None:
    stats = completion.stats
    if completion.error is not None:
        print(f"error: {completion.error}", file=sys.stderr)
        return
    if stats.clamped:
        print(
            f"note: {stats.requested} tokens were asked for, the capacity leaves {stats.granted} after a prompt of "
            f"{stats.prompt_tokens}",
            file=sys.stderr,
        )
    if with_stats:
        print(stats_line(completion), file=sys.stderr)


def stats_line(completion: Completion) -> str:
    """Speed, acceptance and slots in one line."""
    stats = completion.stats
    slots = ", ".join(f"{role} {count}" for role, count in stats.slots.items())
    return (
        f"[{stats.new_tokens} tokens, {completion.finish_reason}; {stats.tokens_per_second:.1f} tok/s after "
        f"{stats.seconds_to_first_token * 1000:.0f} ms to the first; {stats.verifications} verifications, "
        f"{stats.accepted} of {stats.drafted} drafts accepted ({stats.acceptance:.0%}); most slots: {slots}; seed {stats.seed}]"
    )


def as_json(completion: Completion) -> dict[str, Any]:
    """A completion as JSON values."""
    stats = completion.stats
    found: dict[str, Any] = {
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stats": {
            **{name: getattr(stats, name) for name in stats.__slots__ if name != "slots"},
            "slots": dict(stats.slots),
            "clamped": stats.clamped,
            "acceptance": stats.acceptance,
            "tokens_per_second": stats.tokens_per_second,
        },
    }
    if completion.logprobs is not None:
        found["logprobs"] = [
            {"token_id": each.token_id, "logprob": each.logprob, "top": dict(each.top)} for each in completion.logprobs
        ]
    if completion.error is not None:
        found["error"] = str(completion.error)
    return found


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"prompt file {name} cannot be read: {error}") from error
