"""Whatever a request says, its text, tokens and log-probabilities are those of plain decoding, and of its stream."""

from __future__ import annotations

from typing import Any

import pytest

from slotwise import LLM, Completion, Sampling

STORY = "Once upon a time, there was a little girl"


def fields(first: int, second: int) -> dict[str, dict[str, Any]]:
    """Fields that change the text which begins with two tokens."""
    return {
        "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
        "bad_words": {"bad_words": ["named", [first, second]]},
        "sequence_bias": {"sequence_bias": {(first, second): -25.0, (first, 283): 3.0}},
        "min_new_tokens": {"min_new_tokens": 20, "stop": ["he"], "logit_bias": {2: 25.0}},
        "min_length": {"min_length": 25, "max_length": 30, "logit_bias": {2: 8.0}},
        "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.4)},
        "forced_eos_token_ids": {"forced_eos_token_ids": [2]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "allowed_token_ids": {"allowed_token_ids": range(600)},
        "penalties": {"repetition_penalty": 1.4, "frequency_penalty": 2.5, "presence_penalty": -30.0},
        "log-probabilities": {"prompt_logprobs": 2, "logprobs": 2},
        "special tokens": {"skip_special_tokens": False, "logit_bias": {2: 14.0}, "ignore_eos": True},
        "a stop that is kept": {
            "stop": ["e", "<|end|>"],
            "include_stop": True,
            "min_new_tokens": 5,
            "temperature": 1.5,
        },
        "n": {"n": 3, "logprobs": 0},
    }


def outcome(completion: Completion) -> list[tuple[object, ...]]:
    return [
        (each.text, each.token_ids, each.logprobs, each.prompt_logprobs, each.finish_reason)
        for each in (completion, *completion.alternatives)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_field_lets_drafts_batches_or_streams_change_the_outcome(
    llm: LLM, drafting: LLM, counting: LLM, temperature: float
) -> None:
    base = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    unlike = llm.generate(STORY, Sampling(**base))
    named = fields(*unlike.token_ids[:2])
    asked = [Sampling(**{**base, **each}) for each in named.values()]
    plain = [llm.generate(STORY, each) for each in asked]
    expected = [outcome(each) for each in plain]
    for model in (llm, drafting, counting):
        assert [outcome(each) for each in model.generate([STORY] * len(asked), asked)] == expected
    for model in (llm, drafting):
        for each, completion in zip(asked, plain, strict=True):
            if each.n == 1:
                chunks = list(model.stream(STORY, each))
                assert "".join(chunk.text for chunk in chunks) == completion.text
                assert [token for chunk in chunks for token in chunk.token_ids] == list(completion.token_ids)
    same = {name for name, completion in zip(named, plain, strict=True) if completion.text == unlike.text}
    assert same == {"log-probabilities", "n"}
