"""Greedy tokens of a whole model under each field of a generation_config are those of transformers' `generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from slotwise import LLM
from slotwise.models.generation_config import GenerationDefaults
from slotwise.models.generation_fields import FIELDS
from slotwise.requests import default_sampling

from .conftest import write_tokenizer

VOCABULARY = 61
PROMPT = [7, 3, 50, 3, 11, 7, 3]
BUDGET = 24
END_AT = 5  # the place of the first end in the plain output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that says much, and whose end is a token that it soon says."""
    folder = tmp_path_factory.mktemp("checkpoints") / "ends"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(8)
    model = LlamaForCausalLM(config)
    plain = model.generate(torch.tensor([PROMPT]), max_new_tokens=BUDGET, do_sample=False)[0, len(PROMPT) :].tolist()
    assert plain[END_AT] not in plain[:END_AT]
    model.config.eos_token_id = plain[END_AT]
    model.generation_config = GenerationConfig(eos_token_id=plain[END_AT])
    model.save_pretrained(folder)
    write_tokenizer(folder, [f"w{index}" for index in range(VOCABULARY)])
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> LLM:
    return LLM(folder, threads=1, backend="reference")


def expected(theirs: Any, prompt: list[int], fields: dict[str, Any]) -> list[int]:
    """The new tokens of transformers."""
    end = theirs.config.eos_token_id
    config = GenerationConfig(**{"max_new_tokens": BUDGET, **fields}, eos_token_id=end, pad_token_id=end)
    ids = torch.tensor([prompt])
    found = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    new: list[int] = found[0, len(prompt) :].tolist()
    return new


def given(ours: LLM, prompt: list[int], fields: dict[str, Any]) -> list[int]:
    """The new tokens of ours, with the fields as a file has them."""
    read = json.loads(json.dumps({"max_new_tokens": BUDGET, **fields}))
    return list(ours.generate(prompt, default_sampling(GenerationDefaults(read), ours.eos_ids)).token_ids)


def test_the_plain_model_ends_where_it_should(theirs: Any, ours: LLM) -> None:
    plain = expected(theirs, PROMPT, {})
    assert given(ours, PROMPT, {}) == plain
    assert len(plain) == END_AT + 1


def fields_that_act(plain: list[int]) -> dict[str, dict[str, Any]]:
    """For each field values that change what this model says."""
    end = plain[END_AT]
    return {
        "repetition_penalty": {"repetition_penalty": 3.0},
        "a rewarded repetition": {"repetition_penalty": 0.5},
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 2, "min_new_tokens": 20},
        "suppress_tokens": {"suppress_tokens": [end, plain[1]]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [plain[0]]},
        "bad_words_ids": {"bad_words_ids": [[plain[0]], [plain[1], plain[2]], [end]]},
        "a longer bad word": {"bad_words_ids": [[PROMPT[-2], PROMPT[-1], plain[0]], plain[1:4]]},
        "sequence_bias": {"sequence_bias": [[[plain[2]], -20.0], [[plain[0], 9], 30.0]]},
        "min_new_tokens": {"min_new_tokens": 12},
        "min_length": {"min_length": len(PROMPT) + 11},
        "max_new_tokens": {"max_new_tokens": 3},
        "max_length": {"max_length": len(PROMPT) + 4, "max_new_tokens": None},
        "max_length beside max_new_tokens": {"max_length": len(PROMPT) + 4, "max_new_tokens": 3},
        "forced_eos_token_id": {"forced_eos_token_id": end, "max_new_tokens": 4},
        "one of several forced ends": {"forced_eos_token_id": [9, end], "max_new_tokens": 4},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [0, 1.8], "suppress_tokens": plain},
        "an end that fades": {"exponential_decay_length_penalty": [1, 0.3]},
        "a file that samples and says greedy": {"do_sample": False, "temperature": 0.3, "repetition_penalty": 3.0},
        "all at once": {
            "repetition_penalty": 1.1,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[plain[1], plain[2]]],
            "sequence_bias": [[[plain[0], 9], 4.0], [[13], 1.0]],
            "min_new_tokens": 10,
            "suppress_tokens": [plain[3]],
            "begin_suppress_tokens": [plain[0]],
            "forced_eos_token_id": end,
            "max_new_tokens": 20,
        },
    }


NAMES = list(fields_that_act(list(range(END_AT + 1))))


@pytest.mark.parametrize("name", NAMES)
def test_a_field_acts_on_tokens_as_it_does_in_transformers(name: str, theirs: Any, ours: LLM) -> None:
    plain = expected(theirs, PROMPT, {})
    fields = fields_that_act(plain)[name]
    found = expected(theirs, PROMPT, fields)
    assert found != plain
    assert given(ours, PROMPT, fields) == found


@pytest.mark.parametrize("prompt", [[5], [5, 6]], ids=["one token", "two"])
def test_a_token_is_forced_behind_a_prompt_of_one(prompt: list[int], theirs: Any, ours: LLM) -> None:
    fields = {"forced_bos_token_id": 44}
    found = expected(theirs, prompt, fields)
    assert (found[0] == 44) == (len(prompt) == 1)
    assert given(ours, prompt, fields) == found


def test_a_stop_string_ends_at_the_token_at_which_it_ends_in_transformers(stories: Path, llm: LLM) -> None:
    # From the bundled model: transformers 5 fails on stop strings for a tokenizer of whole words.
    theirs = LlamaForCausalLM.from_pretrained(stories, dtype=torch.float32)
    prompt = llm.tokenizer.encode("Once upon a time, there was")
    plain = given(llm, prompt, {"max_new_tokens": 20})
    text = llm.tokenizer.decode(plain)
    stop = text[len(text) // 2 - 2 : len(text) // 2 + 2]
    config = GenerationConfig(max_new_tokens=20, stop_strings=[stop], eos_token_id=2, pad_token_id=2)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    found = theirs.generate(torch.tensor([prompt]), generation_config=config, tokenizer=tokenizer)[0, len(prompt) :]
    assert len(found) < len(plain)
    assert given(llm, prompt, {"max_new_tokens": 20, "stop_strings": [stop]}) == found.tolist()


def test_every_field_that_acts_on_greedy_tokens_is_tried() -> None:
    tried = {field for fields in fields_that_act(list(range(END_AT + 1))).values() for field in fields}
    elsewhere = {"top_k", "top_p", "min_p", "bos_token_id", "eos_token_id"}
    elsewhere |= {"forced_bos_token_id", "stop_strings"}
    assert {name for name, field in FIELDS.items() if field.kind == "acts"} == tried | elsewhere
