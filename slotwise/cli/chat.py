"""`slotwise chat`: a conversation in the terminal.

What always holds: Ctrl-C ends the answer, not the conversation; an answer that failed is not remembered; end of input
ends the conversation.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from slotwise.cli._options import add_model_options, add_sampling_options, load, sampling_of
from slotwise.cli.generate import stats_line
from slotwise.core.errors import RequestError, SlotwiseError

HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("chat", help="talk to a model", description=f"Talk to a model. {HELP}")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument("--stats", action="store_true", help="print speed and acceptance after each answer")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Read, answer, repeat."""
    llm = load(parsed)
    sampling = sampling_of(parsed, llm)
    opening = [{"role": "system", "content": parsed.system}] if parsed.system else []
    # A checkpoint without a template is refused before anyone types.
    llm.chat_prompt([*opening, {"role": "user", "content": "?"}])
    messages = list(opening)
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    while True:
        if interactive:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return 0
        if line.strip() == "/reset":
            messages = list(opening)
        elif line.strip():
            messages.append({"role": "user", "content": line.rstrip("\n")})
            answer = _answer(llm, messages, sampling, parsed.stats)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(llm: Any, messages: list[dict[str, str]], sampling: Any, with_stats: bool) -> str | None:
    """Stream one answer; None when it failed."""
    parts: list[str] = []
    try:
        for chunk in llm.stream_chat(messages, sampling):
            parts.append(chunk.text)
            print(chunk.text, end="", flush=True)
            if chunk.completion is not None and with_stats:
                print(f"\n{stats_line(chunk.completion)}", end="", file=sys.stderr)
        print(flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", flush=True)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return None
    except SlotwiseError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return None
    return "".join(parts)
