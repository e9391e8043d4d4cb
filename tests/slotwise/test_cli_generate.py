"""What `slotwise generate` promises: text as it comes, JSON that is JSON, and clean ends."""

from __future__ import annotations

import io
import json
import signal
import sys
from pathlib import Path

import pytest

from slotwise import LLM, Sampling
from slotwise.cli.generate import as_json
from slotwise.engine.sampling.logprobs import TokenLogprobs

from .commands import Run, pipe, start

STORY = "Once upon a time"
SHORT = ("--max-new-tokens", 8, "--capacity", 64, "--max-sequences", 2, "--prefill-chunk", 16, "--threads", 1)


def test_one_prompt_prints_itself_and_its_text(run: Run, stories: Path, llm: LLM) -> None:
    done = run("generate", stories, "--prompt", STORY, *SHORT)
    assert done.code == 0
    assert done.out == STORY + llm.generate(STORY, Sampling(max_new_tokens=8)).text + "\n"
    assert done.err == ""


@pytest.mark.parametrize("flag", ["--overlap", "--no-overlap"])
def test_overlap_changes_nothing_that_is_printed(run: Run, stories: Path, flag: str) -> None:
    plain = run("generate", stories, "--prompt", STORY, *SHORT)
    assert run("generate", stories, "--prompt", STORY, flag, *SHORT) == plain


def test_several_prompts_are_printed_in_order(run: Run, stories: Path, llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The dog\n")
    done = run("generate", stories, "--prompt", STORY, "--prompt", "A cat", "--prompt-file", file, *SHORT)
    prompts = (STORY, "A cat", "The dog")
    texts = [llm.generate(prompt, Sampling(max_new_tokens=8)).text for prompt in prompts]
    assert done.code == 0
    assert done.out == "".join(f"{prompt}{text}\n\n" for prompt, text in zip(prompts, texts, strict=True))


def test_a_prompt_may_come_from_standard_input(
    run: Run, stories: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A red\nball\n")))
    done = run("generate", stories, "--prompt-file", "-", *SHORT)
    assert done.out == "A red\nball" + llm.generate("A red\nball", Sampling(max_new_tokens=8)).text + "\n"


def test_json_is_one_object_a_line(run: Run, stories: Path, llm: LLM) -> None:
    done = run("generate", stories, "--prompt", STORY, "--prompt", "x" * 500, "--json", "--logprobs", 2, *SHORT)
    good, bad = (json.loads(line, parse_constant=pytest.fail) for line in done.out.splitlines())
    expected = llm.generate(STORY, Sampling(max_new_tokens=8, logprobs=2))
    assert (good["prompt"], good["text"]) == (STORY, expected.text)
    assert good["token_ids"] == list(expected.token_ids)
    assert (good["finish_reason"], good["error"]) == ("length", None)
    assert [len(entry["top"]) for entry in good["logprobs"]] == [2] * 8
    assert good["stats"]["new_tokens"] == 8
    assert good["stats"]["clamped"] is False
    assert (bad["text"], bad["finish_reason"]) == ("", "error")
    assert "the capacity is 64" in bad["error"]
    assert done.code == 1
    assert done.err.startswith("prompt 2: error: the prompt has")


def test_json_has_no_number_that_json_does_not_know(llm: LLM) -> None:
    completion = llm.generate(STORY, Sampling(max_new_tokens=1, logprobs=1))
    odd = TokenLogprobs(3, float("-inf"), 2, {3: float("-inf"), 4: float("nan")}, b"\xe2", {3: b"\xe2", 4: b"a"})
    object.__setattr__(completion, "logprobs", (odd,))
    (found,) = json.loads(json.dumps(as_json(STORY, completion), allow_nan=False))["logprobs"]
    assert found == {
        "token_id": 3,
        "logprob": None,
        "rank": 2,
        "text": "\ufffd",
        "bytes": [0xE2],
        "top": [
            {"token_id": 3, "logprob": None, "text": "\ufffd", "bytes": [0xE2]},
            {"token_id": 4, "logprob": None, "text": "a", "bytes": [0x61]},
        ],
    }


def test_stats_and_ledger_go_to_the_error_stream(run: Run, stories: Path, stories_draft: Path) -> None:
    plain = run("generate", stories, "--prompt", STORY, *SHORT)
    done = run("generate", stories, "--draft", stories_draft, "--prompt", STORY, "--stats", "--ledger", *SHORT)
    assert done.out == plain.out
    assert "[8 tokens, length;" in done.err
    assert "drafts accepted" in done.err
    assert "%0 = reserve" in done.err
    assert "free" in done.err


def test_a_clamped_budget_is_noted(run: Run, stories: Path) -> None:
    words = ("--max-new-tokens", 50, "--capacity", 16, "--ignore-eos", "--threads", 1)
    done = run("generate", stories, "--prompt", STORY, *words)
    assert done.code == 0
    assert "note: 50 tokens were asked for; after a prompt of 5 the capacity leaves 11" in done.err


def test_sampling_options_reach_the_model(run: Run, stories: Path, llm: LLM) -> None:
    done = run("generate", stories, "--prompt", STORY, "--temperature", 0.9, "--seed", 3, "--stop", "and", *SHORT)
    assert (
        done.out
        == STORY + llm.generate(STORY, Sampling(max_new_tokens=8, temperature=0.9, seed=3, stop="and")).text + "\n"
    )


def test_a_backend_may_be_named_per_op(run: Run, stories: Path) -> None:
    done = run("generate", stories, "--prompt", STORY, "--backend", "*=reference,attention=reference", *SHORT)
    assert done.code == 0


@pytest.mark.parametrize("command", ["generate", "chat", "plan", "doctor", "plan show", "plan diff", "plan verify", ""])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    done = run(*command.split(), "--help")
    assert done.code == 0
    assert done.out.startswith(f"usage: slotwise {command}".rstrip())


@pytest.mark.parametrize("words", [(), ("generat",), ("generate",), ("plan",), ("generate", "m", "--top-k", "many")])
def test_wrong_use_is_exit_code_2(run: Run, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "slotwise" in done.err


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version").out == "slotwise 0.1.0\n"


# As a shell starts it


def test_a_reader_that_leaves_ends_the_command_quietly(stories: Path) -> None:
    slow = ("--backend", "reference")  # not over before it is cut short
    words = ("generate", stories, "--prompt", STORY, "--max-new-tokens", 300, "--ignore-eos", *slow)
    process = start(*words)
    assert pipe(process.stdout).read(len(STORY)) == STORY
    pipe(process.stdout).close()
    assert pipe(process.stderr).read() == ""
    assert process.wait(60) == 141


def test_an_interrupt_ends_generation_cleanly(stories: Path) -> None:
    slow = ("--backend", "reference")  # not over before it is cut short
    words = ("generate", stories, "--prompt", STORY, "--max-new-tokens", 400, "--ignore-eos", *slow)
    process = start(*words)
    pipe(process.stdout).read(len(STORY))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "\ninterrupted\n")
