"""`slotwise chat`: a conversation in the terminal.

What always holds: Ctrl-C ends the answer, not the conversation; an answer that failed is not remembered; end of input
ends the conversation.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from slotwise.cli._options import add_model_options, add_sampling_options, load, sampling_of
from slotwise.cli.generate import report
from slotwise.core.errors import OptionError, SlotwiseError, nearest
from slotwise.engine.sampling import Sampling

if TYPE_CHECKING:
    from slotwise.llm import LLM

COMMANDS = ("/reset", "/quit")
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer."


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("chat", help="talk to a model", description=f"Talk to a model. {HELP}")
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    parser.add_argument(
        "--chat-template", metavar="T", help="another chat template: a file, or the name of one of the checkpoint's"
    )
    parser.add_argument(
        "--template-variable",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false (JSON, else text; may be repeated)",
    )
    parser.add_argument("--stats", action="store_true", help="print speed and acceptance after each answer")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Read, answer, repeat."""
    template = _template_of(parsed)
    llm = load(parsed)
    sampling = sampling_of(parsed, llm)
    opening = [{"role": "system", "content": parsed.system}] if parsed.system is not None else []
    # A checkpoint without a template is refused before anyone types.
    llm.chat_prompt([*opening, {"role": "user", "content": "?"}], **template)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin is not None and sys.stdin.isatty()
    if interactive:
        print(HELP, file=sys.stderr)
    messages = list(opening)
    while (line := _read_line(interactive)) is not None:
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(f"{line.split()[0]} is not a command{nearest(line, COMMANDS)}. {HELP}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            answer = _answer(llm, messages, sampling, template, parsed.stats)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})
    return 0


class Template(TypedDict):
    """What of a chat's keywords the command line gives."""

    chat_template: str | None
    template_variables: dict[str, object]


def _template_of(parsed: argparse.Namespace) -> Template:
    """The chat template and its variables as they were given; a template that is a file is read."""
    template = parsed.chat_template
    if template is not None and Path(template).is_file():
        try:
            template = Path(template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OptionError(f"--chat-template {template}: the file cannot be read as UTF-8 text: {error}") from error
    variables: dict[str, object] = {}
    for given in parsed.template_variable:
        name, equals, value = given.partition("=")
        if not name or not equals:
            raise OptionError(f"--template-variable {given!r}: expected NAME=VALUE, such as enable_thinking=false")
        try:
            variables[name] = json.loads(value)
        except ValueError:
            variables[name] = value
    return {"chat_template": template, "template_variables": variables}


def _read_line(interactive: bool) -> str | None:
    """What the user says; None at the end."""
    if interactive:
        print("> ", end="", flush=True)
    line = "" if sys.stdin is None else sys.stdin.readline()
    if not line and interactive:
        print()
    return line.strip() if line and line.strip() != "/quit" else None


def _answer(
    llm: LLM, messages: list[dict[str, str]], sampling: Sampling, template: Template, with_stats: bool
) -> str | None:
    """Stream one answer; None when it failed."""
    parts: list[str] = []
    try:
        with llm.stream_chat(messages, sampling, **template) as stream:
            for chunk in stream:
                parts.append(chunk.text)
                print(chunk.text, end="", flush=True)
                if chunk.completion is not None:
                    print(flush=True)
                    report(chunk.completion, with_stats)
    except KeyboardInterrupt:
        print(" [stopped]", flush=True)
    except SlotwiseError as error:
        print("\n" if parts else "", end="", flush=True)
        print(f"error: {error}; /reset begins anew", file=sys.stderr)
        return None
    return "".join(parts)
