"""Every sampling option of `slotwise generate` and `slotwise chat` acts, and says what it expects."""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Sampling
from slotwise.cli._options import SAMPLING_OPTIONS, add_sampling_options
from slotwise.cli._prompts import add_prompt_options, requests_of

from .commands import Run

STORY = "Once upon a time"
BASE: dict[str, Any] = {"max_new_tokens": 12, "seed": 5, "temperature": 1.2}

# The words of an option, and the fields that they mean; `{first}` is the first token of the plain text, and so on.
OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "max_new_tokens": (["--max-new-tokens", "3"], {"max_new_tokens": 3}),
    "max_length": (["--max-length", "9"], {"max_length": 9}),
    "min_new_tokens": (["--stop-token-ids", "{second}", "--min-new-tokens", "8"], {"min_new_tokens": 8, "stop": True}),
    "min_length": (["--stop-token-ids", "{second}", "--min-length", "16"], {"min_length": 16, "stop": True}),
    "temperature": (["--temperature", "0"], {"temperature": 0.0}),
    "top_k": (["--top-k", "2"], {"top_k": 2}),
    "top_p": (["--top-p", "0.3"], {"top_p": 0.3}),
    "min_p": (["--min-p", "0.5"], {"min_p": 0.5}),
    "repetition_penalty": (["--repetition-penalty", "0.4"], {"repetition_penalty": 0.4}),
    "frequency_penalty": (["--frequency-penalty", "-6"], {"frequency_penalty": -6.0}),
    "presence_penalty": (["--presence-penalty", "-9.5"], {"presence_penalty": -9.5}),
    "no_repeat_ngram_size": (
        ["--frequency-penalty", "-30", "--no-repeat-ngram-size", "1"],
        {"frequency_penalty": -30.0, "no_repeat_ngram_size": 1},
    ),
    "logit_bias": (
        ["--logit-bias", "{first}=-inf", "--logit-bias", "9=0.5"],
        {"logit_bias": {0: -float("inf"), 9: 0.5}},
    ),
    "sequence_bias": (["--sequence-bias", "{first},{second}=-50"], {"sequence_bias": -50.0}),
    "bad_words": (["--bad-words", "{word}"], {"bad_words": "{word}"}),
    "bad_words, by ids": (["--bad-words-ids", "{first},{second}"], {"bad_words": None}),
    "banned_tokens": (["--banned-tokens", "{first}", "{second}"], {"banned_tokens": None}),
    "begin_suppress_tokens": (["--begin-suppress-tokens", "{first}"], {"begin_suppress_tokens": None}),
    "allowed_token_ids": (["--allowed-token-ids", "300", "301", "302"], {"allowed_token_ids": [300, 301, 302]}),
    "exponential_decay_length_penalty": (
        ["--exponential-decay-length-penalty", "1,90"],
        {"exponential_decay_length_penalty": (1, 90.0)},
    ),
    "forced_eos_token_ids": (["--forced-eos-token-ids", "300", "2"], {"forced_eos_token_ids": [2, 300]}),
    "stop": (["--stop", "{word}"], {"stop": "{word}"}),
    "stop_token_ids": (["--stop-token-ids", "{second}"], {"stop": True}),
    "include_stop": (["--stop", "{word}", "--include-stop"], {"stop": "{word}", "include_stop": True}),
    "skip_special_tokens": (
        ["--logit-bias", "1=30", "--show-special-tokens"],
        {"logit_bias": {1: 30.0}, "skip_special_tokens": False},
    ),
    "ignore_eos": (["--logit-bias", "2=16", "--ignore-eos"], {"logit_bias": {2: 16.0}, "ignore_eos": True}),
    "seed": (["--seed", "6"], {"seed": 6}),
}


@pytest.fixture(scope="module")
def model(stories: Path) -> LLM:
    return LLM(stories, capacity=96, max_sequences=2, prefill_chunk=32, threads=1)


@pytest.fixture
def generate(run: Run, model: LLM, stories: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The objects that `slotwise generate --json` prints, of a model that is loaded once."""
    monkeypatch.setattr("slotwise.cli.generate.load", lambda parsed: model)

    def call(*words: object, prompt: str = STORY) -> list[dict[str, Any]]:
        base = [word for name, value in BASE.items() for word in (f"--{name.replace('_', '-')}", value)]
        done = run("generate", stories, "--prompt", prompt, "--json", *base, *words)
        assert (done.code, done.err) == (0, "")
        return [json.loads(line) for line in done.out.splitlines()]

    return call


def meant(given: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    """The fields of an option, with what they take from the plain text."""
    first, second = int(names["first"]), int(names["second"])
    found = {name: names["word"] if value == "{word}" else value for name, value in given.items()}
    if found.get("stop") is True:
        found = {**found, "stop": (), "stop_token_ids": [second]}
    if found.get("logit_bias", {}).get(0):
        found["logit_bias"] = {first: -float("inf"), 9: 0.5}
    if "sequence_bias" in found:
        found["sequence_bias"] = [((first, second), -50.0)]
    for name, value in {"bad_words": [[first, second]], "banned_tokens": [first, second]}.items():
        found |= {name: value} if name in found and found[name] is None else {}
    found |= {"begin_suppress_tokens": [first]} if "begin_suppress_tokens" in found else {}
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_generate_acts_as_its_field(option: str, generate: Any, model: LLM) -> None:
    (plain,) = generate()
    first, second = plain["token_ids"][:2]
    names = {"first": first, "second": second, "word": max(plain["text"].split()[:3], key=len)}
    words, given = OPTIONS[option]
    (found,) = generate(*(word.format(**names) for word in words))
    expected = model.generate(STORY, Sampling(**{**BASE, **meant(given, names)}))
    assert (found["token_ids"], found["text"]) == (list(expected.token_ids), expected.text)
    assert (found["token_ids"], found["text"]) != (plain["token_ids"], plain["text"])
    if len(given) > 1:  # the last option acts beside the others
        (without,) = generate(*(word.format(**names) for word in words[: 2 * (len(given) - 1)]))
        assert (found["token_ids"], found["text"]) != (without["token_ids"], without["text"])


def test_a_token_is_forced_behind_a_prompt_of_one(generate: Any, model: LLM) -> None:
    (found,) = generate("--forced-bos-token-id", 300, prompt="")
    assert found["token_ids"][0] == 300


def test_what_is_reported_and_how_often_is_said_beside_json(generate: Any) -> None:
    first, second = generate("--n", 2, "--logprobs", 2, "--prompt-logprobs", 1)
    assert (first["stats"]["seed"], second["stats"]["seed"]) == (5, 6)
    assert first["token_ids"] != second["token_ids"]
    for found in (first, second):
        assert [each["token_id"] for each in found["logprobs"]] == found["token_ids"]
        assert [len(each["top"]) for each in found["logprobs"]] == [2] * len(found["token_ids"])
        assert found["prompt_logprobs"][0] is None
        assert all(len(each["top"]) == 1 for each in found["prompt_logprobs"][1:])
        said = b"".join(bytes(each["bytes"]) for each in found["prompt_logprobs"][1:])
        assert said.decode().strip() == STORY


@pytest.mark.parametrize("option", ["--logprobs", "--prompt-logprobs"])
def test_what_only_json_reports_is_refused_without_it(run: Run, stories: Path, option: str) -> None:
    done = run("generate", stories, "--prompt", STORY, option, 2)
    assert done.code != 0
    assert f"{option} says what --json reports; give --json too" in done.err


def test_every_field_has_an_option_that_is_tried() -> None:
    told = {"n", "logprobs", "prompt_logprobs", "forced_bos_token_id"}  # by the tests above
    assert {name.split(",")[0] for name in OPTIONS} | told == {field.name for field in fields(Sampling)}
    assert set(SAMPLING_OPTIONS) == {field.name for field in fields(Sampling)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--logit-bias", "5"], "expected ID=X, such as 42=-1.5 or 42=-inf, found '5'"),
        (["--logit-bias", "a=1"], "expected ID=X"),
        (["--sequence-bias", "5,x=1"], "expected ID,ID=X, such as 42,7=-1.5, found '5,x=1'"),
        (["--bad-words-ids", "the"], "expected token ids such as 42,7, found 'the'"),
        (["--exponential-decay-length-penalty", "5"], "expected START,FACTOR, such as 50,1.05, found '5'"),
    ],
)
def test_an_option_says_what_it_expects(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert said in capsys.readouterr().err


CHAT = [name for name in OPTIONS if name not in ("max_length", "min_length")]


@pytest.mark.parametrize("option", CHAT)
def test_every_option_of_chat_acts_as_its_field(
    option: str, run: Run, talkative: Path, model: LLM, monkeypatch: pytest.MonkeyPatch, chats: LLM
) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    plain = chats.chat(messages, Sampling(**BASE))
    first, second = plain.token_ids[:2]
    names = {"first": first, "second": second, "word": max(plain.text.split()[:3], key=len)}
    words, given = OPTIONS[option]
    monkeypatch.setattr("slotwise.cli.chat.load", lambda parsed: chats)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    base = [word for name, value in BASE.items() for word in (f"--{name.replace('_', '-')}", value)]
    done = run("chat", talkative, *base, *(word.format(**names) for word in words))
    expected = chats.chat(messages, Sampling(**{**BASE, **meant(given, names)}))
    assert (done.code, done.out) == (0, f"{expected.text}\n")
    assert expected.text != plain.text


@pytest.fixture(scope="module")
def chats(talkative: Path) -> LLM:
    return LLM(talkative, capacity=96, max_sequences=1, threads=1)


def test_commands_that_run_requests_themselves_spell_bad_words_too(model: LLM) -> None:
    parser = argparse.ArgumentParser()
    add_prompt_options(parser)
    add_sampling_options(parser)
    (request,) = requests_of(parser.parse_args(["--prompt", STORY, "--bad-words", "cat"]), model)
    assert request.sampling.bad_words
    request.sampling.validate_for_vocabulary(model.plan().target.vocab_size)


def test_chat_has_no_option_that_only_json_reports(run: Run, talkative: Path) -> None:
    done = run("chat", talkative, "--logprobs", 2)
    assert done.code == 2
    assert "--logprobs" in done.err
