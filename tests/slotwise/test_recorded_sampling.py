"""A recording holds every field of a request's sampling, as JSON that any reader takes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from slotwise import LLM, Sampling
from slotwise.inspect.replay import replay
from slotwise.recording.file import sampling_from_json


def test_every_field_of_a_sampling_comes_back_from_a_line_of_json(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    asked = Sampling(
        max_new_tokens=5,
        seed=4,
        logit_bias={3: -math.inf, 5: 1.5},
        sequence_bias={(1, 2): -math.inf, (2, 1): 0.5},
        bad_words=["cat", [3, 4]],
        allowed_token_ids=range(3, 1500),
        exponential_decay_length_penalty=(1, 1.5),
        stop=["zzz"],
        prompt_logprobs=1,
        min_new_tokens=2,
    )
    llm = LLM(stories, backend="reference", capacity=64, threads=1, progress=False)
    with llm.record(path):
        completion = llm.generate("Once upon a time", asked)

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    (request,) = [line for line in lines if "sampling" in line]
    found = sampling_from_json(request["sampling"])
    assert replace(found, bad_words=()) == replace(asked, bad_words=())
    assert (3, 4) in found.bad_words
    assert llm.generate("Once upon a time", found).token_ids == completion.token_ids
    assert replay(path).is_same
