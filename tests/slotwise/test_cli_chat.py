"""What `slotwise chat` promises: a conversation from a terminal or a pipe, which ends when its user wants."""

from __future__ import annotations

import io
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Sampling
from slotwise.core.errors import SequenceFault

from .commands import Outcome, Run, pipe, start

SHORT = ("--max-new-tokens", 6, "--capacity", 96, "--max-sequences", 1, "--prefill-chunk", 32, "--threads", 1)


@pytest.fixture
def chat(run: Run, talkative: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`chat("Hello", ...)` says lines to the model, then ends the input."""

    def call(*lines: str, options: tuple[object, ...] = ()) -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", talkative, *SHORT, *options)

    return call


@pytest.fixture
def answer(talkative: Path) -> Any:
    """What the model says after these messages, alternately the user's and its own."""
    llm = LLM(talkative, capacity=96, threads=1)

    def call(*contents: str, system: str | None = None) -> str:
        roles = ("user", "assistant")
        opening = [] if system is None else [{"role": "system", "content": system}]
        messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
        return llm.chat([*opening, *messages], Sampling(max_new_tokens=6)).text

    return call


def test_each_line_is_answered_with_all_before_it(chat: Any, answer: Any) -> None:
    first = answer("Hello")
    second = answer("Hello", first, "And then?")
    done = chat("Hello", "", "And then?")
    assert (done.code, done.out, done.err) == (0, f"{first}\n{second}\n", "")


def test_reset_forgets_and_quit_ends(chat: Any, answer: Any) -> None:
    done = chat("Hello", "/reset", "And then?", "/quit", "never read")
    assert done.code == 0
    assert done.out == f"{answer('Hello')}\n{answer('And then?')}\n"


def test_a_system_message_opens_every_conversation(chat: Any, answer: Any) -> None:
    done = chat("Hello", "/reset", "Hello", options=("--system", "Be kind"))
    assert done.out == f"{answer('Hello', system='Be kind')}\n" * 2


def test_a_system_message_without_text_is_one(chat: Any, answer: Any) -> None:
    done = chat("Hello", options=("--system", ""))
    assert done.out == f"{answer('Hello', system='')}\n"
    assert answer("Hello", system="") != answer("Hello")


def test_a_chat_template_and_its_variables_can_be_given(chat: Any, talkative: Path, tmp_path: Path) -> None:
    source = "{{ mood }}{% if loud %}!{% endif %} {% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "mine.jinja").write_text(source)
    given = ("--chat-template", tmp_path / "mine.jinja", "--template-variable", "mood=glad", "--template-variable")
    done = chat("Hello", options=(*given, "loud=true"))
    llm = LLM(talkative, capacity=96, threads=1)
    expected = llm.generate(llm.tokenizer.encode("glad! Hello", add_special_tokens=False), Sampling(max_new_tokens=6))
    assert (done.code, done.out) == (0, f"{expected.text}\n")
    assert chat("Hello", options=(*given, "loud=false")).out != done.out


def test_what_the_template_cannot_be_given_is_refused_before_anyone_types(chat: Any, tmp_path: Path) -> None:
    wrong: dict[tuple[object, ...], str] = {
        ("--template-variable", "mood"): "expected NAME=VALUE",
        ("--template-variable", "moood=1"): "reads no variable 'moood'",
        ("--template-variable", "messages=1"): "'messages' is no variable",
        ("--chat-template", "tool_use"): "no template 'tool_use', only default",
        ("--chat-template", "{{ 1"): "the chat template is broken",
    }
    for options, message in wrong.items():
        done = chat("Hello", options=options)
        assert done.code != 0
        assert message in done.err


def test_an_unknown_command_is_not_said_to_the_model(chat: Any) -> None:
    done = chat("/rest")
    assert (done.code, done.out) == (0, "")
    assert "/rest is not a command (did you mean '/reset'?)" in done.err


def test_stats_follow_each_answer(chat: Any) -> None:
    assert chat("Hello", options=("--stats",)).err.startswith("[6 tokens, length;")


def test_a_message_that_cannot_be_answered_is_forgotten(chat: Any, answer: Any) -> None:
    done = chat("word " * 200, "Hello")
    assert done.code == 0
    assert done.out == f"{answer('Hello')}\n"
    assert "error: the prompt has" in done.err
    assert "the capacity is 96" in done.err


def test_an_answer_that_fails_midway_is_forgotten(chat: Any, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from slotwise.stream import Stream

    real, calls = Stream.__next__, [0]

    def fail_once(self: Stream) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise SequenceFault("a kernel raised")
        return real(self)

    monkeypatch.setattr(Stream, "__next__", fail_once)
    done = chat("Bye", "Hello")
    assert done.out.endswith(f"\n{answer('Hello')}\n")
    assert done.err == "error: a kernel raised; /reset begins anew\n"


def test_a_model_without_a_template_is_refused_before_anyone_types(run: Run, stories: Path) -> None:
    done = run("chat", stories, *SHORT)  # standard input is not read: under pytest that would raise
    assert done.code == 1
    assert "no chat template" in done.err


def test_bytes_that_are_no_text_do_not_end_the_conversation(talkative: Path) -> None:
    process = start("chat", talkative, *SHORT)
    pipe(process.stdin).buffer.write(b"caf\xe9\n")  # type: ignore[attr-defined]
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.count("\n") == 1


def test_an_interrupt_stops_the_answer_and_a_second_the_conversation(talkative: Path) -> None:
    # The slowest backend: an answer must not be over before it can be stopped.
    words = ("--max-new-tokens", 400, "--ignore-eos", "--backend", "reference")
    process = start("chat", talkative, *words)
    patience = threading.Timer(100, process.kill)  # what never comes ends the wait for it
    patience.start()
    pipe(process.stdin).write("Hello\n")
    pipe(process.stdin).flush()
    said = pipe(process.stdout).read(5)
    process.send_signal(signal.SIGINT)
    while not said.endswith("[stopped]\n"):
        line = pipe(process.stdout).readline()
        assert line, "it ended, or its answer did, before it was stopped"
        said += line
    pipe(process.stdin).write("And then?\n")
    pipe(process.stdin).flush()
    assert pipe(process.stdout).read(5)
    process.send_signal(signal.SIGINT)
    while "[stopped]" not in (line := pipe(process.stdout).readline()):
        assert line
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    patience.cancel()
    assert (process.returncode, err) == (130, "\ninterrupted\n")
