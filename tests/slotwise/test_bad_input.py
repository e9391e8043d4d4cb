"""Bad input is answered with one sentence that names the thing, what was found, and what to do; never a traceback."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slotwise import LLM, Plan, Sampling, SlotwiseError

from .commands import Run
from .conftest import write_tokenizer

QUICK: dict[str, Any] = {"capacity": 32, "max_sequences": 1, "prefill_chunk": 16, "threads": 1}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, stories_draft: Path, random_checkpoint: Path) -> dict[str, Path]:
    """Folders and files with something wrong, by name."""
    root = tmp_path_factory.mktemp("bad")
    found = {"nowhere": root / "nowhere"}
    for name in ("no_tokenizer", "other_words", "fewer_words", "not_json", "cut_short"):
        found[name] = root / name
        shutil.copytree(random_checkpoint if name.endswith("words") else stories_draft, found[name])
    (found["no_tokenizer"] / "tokenizer.json").unlink()
    write_tokenizer(found["other_words"], [f"v{index}" for index in range(101)])
    write_tokenizer(found["fewer_words"], [f"w{index}" for index in range(90)])
    (found["not_json"] / "config.json").write_text("model")
    weights = found["cut_short"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    found["empty"] = root / "empty"
    found["empty"].mkdir()
    for name, text in {
        "unknown_key": "capacty = 64",
        "bad_value": "page_size = 0",
        "bad_toml": "capacity 64",
        "no_plan": json.dumps({"model_type": "llama"}),
    }.items():
        found[name] = root / f"{name}.{'json' if name == 'no_plan' else 'toml'}"
        found[name].write_text(text)
    return found


# (what is given to LLM, fragments of the message). Names in braces are files of `bad`.
LOADING = [
    ({"model": "{nowhere}"}, ["nowhere", "expected a checkpoint folder"]),
    ({"model": "{empty}"}, ["empty", "expected a config.json", "give the folder of one model"]),
    ({"model": "{bad_toml}"}, ["bad_toml", "expected a checkpoint folder"]),
    ({"model": "{not_json}"}, ["config.json", "JSON"]),
    ({"model": "{cut_short}"}, ["model.safetensors", "bytes"]),
    ({"model": "{no_tokenizer}"}, ["expected a tokenizer.json, found none"]),
    ({"model": 7}, ["model must be a checkpoint folder", "found 7"]),
    ({"backend": "referense"}, ["backend 'referense' is not known", "did you mean 'reference'?"]),
    ({"backend": {"*": "reference", "atention": "reference"}}, ["no such op", "did you mean 'attention'?"]),
    ({"backend": {"attention": "reference"}}, ["also needs '*'"]),
    ({"backend": []}, ["one or more backend names"]),
    ({"backend": 3}, ["backend must be a name", "is 3"]),
    ({"preset": "throughputt"}, ["preset 'throughputt' is not known", "did you mean 'throughput'?"]),
    ({"preset": "{nowhere}"}, ["preset file", "does not exist", "default, exact, latency, throughput"]),
    ({"preset": "{unknown_key}"}, ["unknown_key.toml", "'capacty' is not known", "did you mean 'capacity'?"]),
    ({"preset": "{bad_value}"}, ["bad_value.toml", "page_size must be an integer from 1"]),
    ({"preset": "{bad_toml}"}, ["bad_toml.toml", "cannot be read as TOML"]),
    ({"preset": 4}, ["preset must be a name or the path of a TOML file", "found 4"]),
    ({"draft": "{other_words}"}, ["does not have the target's vocabulary", "token id 0", "'v0'", "draft='ngram'"]),
    ({"draft": "{fewer_words}"}, ["does not have the target's vocabulary", "no token"]),
    ({"draft": "{nowhere}"}, ["draft model", "nowhere", "a checkpoint folder or 'ngram'"]),
    ({"draft": "ngramm"}, ["draft model", "ngramm", "a checkpoint folder or 'ngram'"]),
    ({"draft": "{no_tokenizer}"}, ["draft model", "tokenizer.json"]),
    ({"draft": 5}, ["draft must be a checkpoint folder or 'ngram'", "found 5"]),
    ({"capacity": 100_000}, ["capacity 100000 is more than the 64 positions", "capacity=64 or less"]),
    ({"capacity": -1}, ["capacity must be an integer", "is -1"]),
    ({"capacity": 64.0}, ["capacity must be an integer", "is 64.0"]),
    ({"capacity": "64"}, ["capacity must be an integer", "is '64'"]),
    ({"speculate": 64}, ["speculate must be an integer from 0 to 63"]),
    ({"speculate": -1}, ["speculate must be an integer from 0 to 63"]),
    ({"speculate": True}, ["speculate must be an integer", "is True"]),
    ({"page_size": 0}, ["page_size must be an integer from 1", "is 0"]),
    ({"pages": 1}, ["a pool of 1 pages of 16 slots cannot hold one sequence of capacity 32", "raise pages"]),
    ({"max_sequences": 0}, ["max_sequences must be an integer from 1"]),
    ({"prefill_chunk": 0}, ["prefill_chunk must be an integer from 1"]),
    ({"acceptance": "couple"}, ["acceptance must be one of coupled, rejection", "did you mean 'coupled'?"]),
    ({"adaptive": "yes"}, ["adaptive must be true or false"]),
    ({"dtype": "float33"}, ["float33", "float32"]),
    ({"dtype": "int32"}, ["dtype", "float"]),
    ({"dtype": 32}, ["dtype", "32"]),
    ({"dtype": "float8"}, ["float8"]),
    ({"dtype": "float64"}, ["one of f32, f16, bf16 to compute in, found f64"]),
    ({"progress": "bar"}, ["progress must be true, false or None, is 'bar'"]),
    ({"model": ""}, ["the model's name is empty", "'.' for this one"]),
    ({"seed": 7}, ["no keyword 'seed'", "with a prompt, as slotwise.Sampling(seed=...)"]),
    ({"max_tokens": 7}, ["no keyword 'max_tokens'", "slotwise.Sampling(max_tokens=...)"]),
    ({"plan": "{empty}"}, ["empty cannot be read: Is a directory", "`slotwise plan show MODEL --save FILE` makes one"]),
    ({"threads": 0}, ["threads must be an integer from 1 to 1024, is 0"]),
    ({"plan": "{nowhere}"}, ["plan file", "cannot be read"]),
    ({"plan": "{no_plan}"}, ["plan file", "'slotwise_plan' is missing"]),
    ({"plan": 6}, ["plan must be a Plan or the path of a plan file", "found 6"]),
]


def filled(value: Any, bad: dict[str, Path]) -> Any:
    return str(bad[value[1:-1]]) if isinstance(value, str) and value.startswith("{") else value


@pytest.mark.parametrize(("given", "fragments"), LOADING, ids=[str(given) for given, _ in LOADING])
def test_what_cannot_be_loaded_is_explained(
    random_checkpoint: Path, bad: dict[str, Path], given: dict[str, Any], fragments: list[str]
) -> None:
    options = {"model": random_checkpoint, **QUICK, **{name: filled(value, bad) for name, value in given.items()}}
    if "plan" in given:
        options = {name: value for name, value in options.items() if name in ("model", "plan")}
    check(lambda: LLM(**options), fragments)


def check(action: Callable[[], object], fragments: list[str]) -> None:
    with pytest.raises(SlotwiseError) as caught:
        action()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_real_draft_of_another_vocabulary_is_refused(stories: Path, shared_models: Path) -> None:
    check(
        lambda: LLM(stories, draft=shared_models / "babyllama", threads=1),
        ["babyllama", "does not have the target's vocabulary", "2048 and 105 tokens in all", "draft='ngram'"],
    )


def test_a_plan_of_another_checkpoint_is_refused(llm: LLM, random_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    llm.plan(capacity=32, max_sequences=1, prefill_chunk=16).save(path)
    check(lambda: LLM(random_checkpoint, plan=path), ["made for another checkpoint", "its target is stories"])
    check(lambda: LLM(random_checkpoint, plan=Plan.load(path)), ["made for another checkpoint"])


SAMPLING = [
    ({"temperature": -0.5}, ["temperature", "found -0.5"]),
    ({"temperature": math.nan}, ["temperature", "found nan"]),
    ({"temperature": math.inf}, ["temperature", "found inf"]),
    ({"temperature": "hot"}, ["temperature", "found 'hot' (str)"]),
    ({"top_k": -2}, ["top_k", "found -2", "0 or -1 keeps all"]),
    ({"top_k": 1.5}, ["top_k", "expected an integer", "found 1.5"]),
    ({"top_p": -0.1}, ["top_p", "from 0 to 1", "found -0.1"]),
    ({"top_p": math.nan}, ["top_p", "found nan"]),
    ({"min_p": 1.1}, ["min_p", "from 0 to 1", "found 1.1"]),
    ({"repetition_penalty": 0}, ["repetition_penalty", "found 0"]),
    ({"frequency_penalty": 1e39}, ["frequency_penalty", "found 1e+39"]),
    ({"presence_penalty": math.nan}, ["presence_penalty", "found nan"]),
    ({"max_new_tokens": 0}, ["max_new_tokens", "from 1", "found 0"]),
    ({"max_new_tokens": True}, ["max_new_tokens", "found True"]),
    ({"seed": -2}, ["seed", "found -2"]),
    ({"logprobs": -2}, ["logprobs", "from -1", "found -2"]),
    ({"stop": ""}, ["stop", "at least one character"]),
    ({"stop": [3]}, ["stop", "found 3"]),
    ({"stop_token_ids": [2048]}, ["stop_token_ids", "2048", "vocabulary", "0 to 2047"]),
    ({"logit_bias": {4000: 1.0}}, ["logit_bias", "4000", "vocabulary"]),
    ({"banned_tokens": range(2048)}, ["banned_tokens", "all 2048 tokens", "at least one"]),
    ({"bad_words": [[token] for token in range(2048)]}, ["bad_words: all 2048 tokens", "at least one"]),
    ({"bad_words": ["\ud800"]}, ["bad_words", "half of a surrogate pair", "remove it"]),
    ({"bad_words": ["\n"]}, ["bad_words", "more than spaces", "give such a word's token ids"]),
    ({"n": 10**9}, ["n:", "from 1 to 16384"]),
    ({"repetition_penalty": 1e-300}, ["repetition_penalty", "from 1.17549e-38", "found 1e-300"]),
    ({"max_length": 1, "prompt_logprobs": 0}, ["prompt_logprobs", "no room", "raise max_length"]),
]


@pytest.mark.parametrize(("given", "fragments"), SAMPLING, ids=[str(given)[:40] for given, _ in SAMPLING])
def test_sampling_that_makes_no_sense_is_explained(llm: LLM, given: dict[str, Any], fragments: list[str]) -> None:
    check(lambda: llm.generate("Once", Sampling(**given)), fragments)


ASKING: list[tuple[Callable[[LLM], object], list[str]]] = [
    (lambda llm: llm.generate([5] * 300), ["the prompt has 300 tokens, the capacity is 192", "a larger capacity"]),
    (lambda llm: llm.generate([5, 2048]), ["token id 2048", "0 to 2047"]),
    (lambda llm: llm.generate([5, -1]), ["token id -1", "0 to 2047"]),
    (lambda llm: llm.generate([True, False]), ["token ids must be integers, found True at place 0"]),
    (lambda llm: llm.generate([1, 2.0]), ["token ids must be integers, found 2.0 at place 1"]),
    (lambda llm: llm.generate([None]), ["token ids must be integers, found None"]),
    (lambda llm: llm.generate(7), ["prompts must be text, a list of token ids, or a list of either, found a int"]),  # type: ignore[call-overload]
    (lambda llm: llm.generate(b"Once"), ["prompts must be text", "found a bytes"]),
    (lambda llm: llm.generate({"prompt": "Once"}), ["prompts must be text", "found a dict"]),  # type: ignore[call-overload]
    (lambda llm: llm.generate(None), ["prompts must be text", "found a NoneType"]),  # type: ignore[call-overload]
    (lambda llm: llm.generate("half \ud800"), ["surrogate", "position 5"]),
    (lambda llm: llm.generate("Once", {"temperature": 1}), ["must be a slotwise.Sampling", "found {'temperature': 1}"]),  # type: ignore[call-overload]
    (lambda llm: llm.generate(["a", "b"], [Sampling()]), ["1 samplings for 2 prompts"]),
    (lambda llm: llm.stream([]), ["the prompt has no tokens"]),
    (lambda llm: llm.stream(["a", "b"]), ["token ids must be integers, found 'a'"]),  # type: ignore[list-item]
    (lambda llm: llm.logits([]), ["the prompt has no tokens"]),
    (lambda llm: llm.logits([5] * 193), ["193 tokens, the capacity is 192"]),
    (lambda llm: llm.logits("Once"), ["token ids must be integers, found 'O'"]),  # type: ignore[arg-type]
    (lambda llm: llm.tokenizer.decode(5), ["decode takes a list of token ids, found 5"]),  # type: ignore[arg-type]
    (lambda llm: llm.tokenizer.decode(None), ["decode takes a list of token ids, found None"]),  # type: ignore[arg-type]
    (lambda llm: llm.plan().save("nowhere/plan.json"), ["nowhere/plan.json cannot be written: No such file or dir"]),
    (lambda llm: llm.plan().save(None), ["a plan is saved to a path, found None"]),  # type: ignore[arg-type]
    (lambda llm: llm.plan(capacity=10**6), ["capacity 1000000 is more than the 512 positions of stories"]),
]


@pytest.mark.parametrize(("ask", "fragments"), ASKING, ids=[fragments[0] for _, fragments in ASKING])
def test_what_cannot_be_asked_is_explained(llm: LLM, ask: Callable[[LLM], object], fragments: list[str]) -> None:
    check(lambda: ask(llm), fragments)
    assert llm.generate("Once", Sampling(max_new_tokens=1)).finish_reason == "length"


# Values that make no sense are wrong use, exit code 2; what does not serve or does not fit is a failure, 1.
COMMANDS = [
    (1, "generate {nowhere} --prompt x", ["expected a checkpoint folder"]),
    (1, "generate {model} --prompt x --backend referense", ["did you mean 'reference'?"]),
    (2, "generate {model} --prompt x --backend *=reference,atention=reference", ["did you mean 'attention'?"]),
    (2, "generate {model} --prompt x --backend *=reference,attention", ["'attention' names no op; write OP=BACKEND"]),
    (2, "generate {model} --prompt x --backend ,", ["one or more backend names"]),
    (2, "generate {model} --prompt x --preset laptop", ["preset 'laptop' is not known", "there are default"]),
    (1, "generate {model} --prompt x --draft {other_words}", ["does not have the target's vocabulary"]),
    (1, "generate {model} --prompt x --draft {no_tokenizer}", ["draft model", "tokenizer.json"]),
    (1, "generate {model} --prompt x --draft {nowhere}", ["draft model", "a checkpoint folder or 'ngram'"]),
    (1, "generate {model} --prompt x --capacity 65", ["capacity=64 or less"]),
    (2, "generate {model} --prompt x --speculate 99", ["speculate must be an integer from 0 to 63"]),
    (2, "generate {model} --prompt x --page-size 0", ["page_size must be an integer from 1"]),
    (1, "generate {model} --prompt x --pages 1", ["raise pages or lower capacity"]),
    (2, "generate {model} --prompt x --dtype float8", ["float8"]),
    (2, "generate {model} --prompt x --threads 0", ["threads must be an integer from 1 to 1024"]),
    (2, "generate {model} --prompt x --temperature nan", ["temperature", "found nan"]),
    (2, "generate {model} --prompt x --temperature -1", ["temperature", "found -1.0"]),
    (2, "generate {model} --prompt x --top-p 2", ["top_p", "found 2.0"]),
    (2, "generate {model} --prompt x --stop-token-ids 101", ["stop_token_ids", "0 to 100"]),
    (1, "generate {model} --prompt-file {nowhere}", ["prompt file", "cannot be read"]),
    (1, "generate {model} --prompt-file {weights}", ["prompt file", "give a file of UTF-8 text"]),
    (1, "generate {model} --prompt=", ["the prompt has no tokens"]),
    (1, "generate {model} --prompt x --plan {no_plan}", ["'slotwise_plan' is missing"]),
    (1, "generate {model} --prompt x --plan {no_plan} --capacity 9", ["'slotwise_plan' is missing"]),
    (1, "chat {model}", ["no chat template"]),
    (1, "plan verify {no_plan}", ["'slotwise_plan' is missing"]),
    (1, "plan show {model} --capacity 99", ["capacity=64 or less"]),
]


@pytest.mark.parametrize(("code", "line", "fragments"), COMMANDS, ids=[line for _, line, _ in COMMANDS])
def test_the_command_line_says_it_in_one_sentence(
    run: Run, random_checkpoint: Path, bad: dict[str, Path], code: int, line: str, fragments: list[str]
) -> None:
    places = {**bad, "model": random_checkpoint, "weights": random_checkpoint / "model.safetensors"}
    words = [word.format(**places) for word in line.split(" ")]
    done = run(*words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"slotwise {words[0]}: error: ")
    assert done.err.count("\n") == 1
    for fragment in fragments:
        assert fragment in done.err
