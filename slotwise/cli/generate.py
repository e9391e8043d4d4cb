"""`slotwise generate`: complete prompts.

What always holds: with one prompt the text streams as it is made; with `--json` the output is one JSON object a line
and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from slotwise.cli._options import add_model_options, add_sampling_options, load, sampling_of
from slotwise.cli._prompts import add_prompt_options, prompts_of
from slotwise.core.errors import OptionError, RequestError
from slotwise.engine.sampling import Sampling

if TYPE_CHECKING:
    from slotwise.engine.request import Completion
    from slotwise.engine.sampling.logprobs import TokenLogprobs
    from slotwise.llm import LLM


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("generate", help="complete a prompt", description="Complete one prompt or several.")
    add_model_options(parser)
    add_prompt_options(parser)
    add_sampling_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--n", type=int, metavar="N", help="completions of each prompt, with seeds S, S+1, ...")
    output.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json, log-probabilities of tokens and of the N likeliest"
    )
    output.add_argument(
        "--prompt-logprobs", type=int, metavar="N", help="with --json, log-probabilities of the prompt's tokens too"
    )
    output.add_argument("--json", action="store_true", help="one JSON object a prompt")
    output.add_argument("--stats", action="store_true", help="print speed and acceptance afterwards")
    output.add_argument("--ledger", action="store_true", help="print the last steps and the slot ledger afterwards")
    output.add_argument(
        "--record", metavar="F", help="write every step's binding, seeds and tokens to a file, to be replayed"
    )
    output.add_argument("--tensors", action="store_true", help="with --record, keep logits too, in F.safetensors")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Load, generate, print; exit code 1 when a request failed."""
    prompts = prompts_of(parsed)
    if parsed.tensors and not parsed.record:
        raise OptionError("--tensors says what --record keeps; give --record F too")
    for option in ("logprobs", "prompt_logprobs"):
        if getattr(parsed, option) is not None and not parsed.json:
            raise OptionError(f"--{option.replace('_', '-')} says what --json reports; give --json too")
    llm = load(parsed)
    sampling = sampling_of(parsed, llm)
    recording = llm.record(parsed.record, tensors=parsed.tensors) if parsed.record else contextlib.nullcontext()
    with recording:
        if len(prompts) == 1 and not parsed.json and sampling.n == 1:
            completions = [_stream(llm, prompts[0], sampling)]
        else:
            completions = llm.generate(prompts, sampling)
            for prompt, completion in zip(prompts, completions, strict=True):
                for each in (completion, *completion.alternatives):
                    print(json.dumps(as_json(prompt, each)) if parsed.json else f"{prompt}{each.text}\n")
    if parsed.record:
        print(f"recorded in {parsed.record}", file=sys.stderr)
    for number, completion in enumerate(completions, 1):
        report(completion, parsed.stats, name=f"prompt {number}: " if len(prompts) > 1 else "")
    if parsed.ledger:
        print(llm.ledger(), file=sys.stderr)
    return 1 if any(completion.error is not None for completion in completions) else 0


def _stream(llm: LLM, prompt: str, sampling: Sampling) -> Completion:
    """Print the prompt, once it is taken, and the text as it comes."""
    with llm.stream(prompt, sampling) as stream:
        before = prompt
        for chunk in stream:
            print(before + chunk.text, end="", flush=True)
            before = ""
            if chunk.completion is not None:
                print(flush=True)
                return chunk.completion
    raise RequestError("the stream ended without a completion")


def report(completion: Completion, with_stats: bool, *, name: str = "") -> None:
    """Say on the error stream what went wrong or was clamped, and what it cost if asked."""
    stats = completion.stats
    if completion.error is not None:
        print(f"{name}error: {completion.error}", file=sys.stderr)
        return
    if stats.clamped:
        print(
            f"{name}note: {stats.requested} tokens were asked for; after a prompt of {stats.prompt_tokens} the "
            f"capacity leaves {stats.granted}",
            file=sys.stderr,
        )
    if with_stats:
        print(f"{name}{stats_line(completion)}", file=sys.stderr)


def stats_line(completion: Completion) -> str:
    """Speed, acceptance and slots in one line."""
    stats = completion.stats
    slots = ", ".join(f"{role} {count}" for role, count in stats.slots.items())
    drafts = f", {stats.accepted} of {stats.drafted} drafts accepted ({stats.acceptance:.0%})" if stats.drafted else ""
    return (
        f"[{stats.new_tokens} tokens, {completion.finish_reason}; {stats.tokens_per_second:.1f} tok/s after "
        f"{stats.seconds_to_first_token * 1000:.0f} ms to the first; {stats.verifications} verifications{drafts}; "
        f"most slots: {slots}; seed {stats.seed}]"
    )


def as_json(prompt: str, completion: Completion) -> dict[str, Any]:
    """A completion as JSON values; `error` and `logprobs` are null where there are none."""
    stats = completion.stats
    return {
        "prompt": prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "error": None if completion.error is None else str(completion.error),
        "logprobs": None if completion.logprobs is None else [_logprobs(each) for each in completion.logprobs],
        "prompt_logprobs": None
        if completion.prompt_logprobs is None
        else [None if each is None else _logprobs(each) for each in completion.prompt_logprobs],
        "stats": {
            **{field.name: getattr(stats, field.name) for field in fields(stats)},
            "slots": dict(stats.slots),
            "clamped": stats.clamped,
            "acceptance": stats.acceptance,
            "tokens_per_second": stats.tokens_per_second,
        },
    }


def _logprobs(each: TokenLogprobs) -> dict[str, Any]:
    spoken = each.top_bytes or {}
    top = [_token(token, logprob, spoken.get(token)) for token, logprob in each.top.items()]
    return {**_token(each.token_id, each.logprob, each.bytes), "rank": each.rank, "top": top}


def _token(token_id: int, logprob: float, said: bytes | None) -> dict[str, Any]:
    """A token with its log-probability; `bytes` are numbers, for a part of a character is no text."""
    return {
        "token_id": token_id,
        "logprob": _finite(logprob),
        "text": None if said is None else said.decode(errors="replace"),
        "bytes": None if said is None else list(said),
    }


def _finite(value: float) -> float | None:
    """A number that JSON has: it knows no infinity."""
    return value if math.isfinite(value) else None
