"""What a `Sampling` promises: valid, normalised, immutable."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotwise.core.errors import OptionError
from slotwise.engine.sampling import Sampling
from slotwise.engine.sampling.values import LARGEST, LogitBias

NUMBERS = ["temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"]
INTEGERS = [
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "n",
    "top_k",
    "no_repeat_ngram_size",
    "seed",
    "logprobs",
    "prompt_logprobs",
    "forced_bos_token_id",
]


def refuses(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=rf"^{name}.*expected .*found "):
        Sampling(**{name: value})


def test_the_defaults_are_greedy_and_leave_logits_alone() -> None:
    sampling = Sampling()
    assert sampling.is_greedy
    assert not sampling.adjusts_logits
    assert sampling.seed is None
    assert sampling.logprobs is None


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", None, 10**400, -(10**400), 1j, [1.0]])
def test_a_number_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    refuses(name, value)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [math.nan, 1.0, True, "1", -2, 10**30, [1]])
def test_an_integer_that_makes_no_sense_is_refused(name: str, value: Any) -> None:
    refuses(name, value)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("max_new_tokens", [1, 2**31 - 1, None], [0, 2**31]),
        ("max_length", [1, None], [0]),
        ("min_new_tokens", [0, 2**31 - 1], [-1]),
        ("min_length", [0], [-1]),
        ("n", [1, 5, 16384], [0, -1, 16385]),
        ("no_repeat_ngram_size", [0, 1], [-1]),
        ("temperature", [0, 1e-5, 1, 1e30], [-0.1, 1e39]),
        ("top_k", [0, 1], [-2]),
        ("top_p", [0, 1e-9, 1], [-0.001, 1.001]),
        ("min_p", [0, 1], [-0.001, 1.001]),
        ("repetition_penalty", [1e-9, 100, 1e9], [0, -1, 1e-40]),
        ("frequency_penalty", [-1e9, 1e9], [-1e39, 1e39]),
        ("presence_penalty", [-1e9, 1e9], [-1e39, 1e39]),
        ("seed", [0, 2**64 - 1, None], [-2, 2**64]),
        ("logprobs", [0, -1, 2**31 - 1, None], [-2]),
        ("prompt_logprobs", [0, -1, 2**31 - 1, None], [-2]),
    ],
)
def test_ranges_are_closed_at_the_stated_ends(name: str, inside: list[Any], outside: list[Any]) -> None:
    for value in inside:
        assert getattr(Sampling(**{name: value}), name) == value
    for value in outside:
        refuses(name, value)


@pytest.mark.parametrize("name", ["banned_tokens", "stop_token_ids", "begin_suppress_tokens", "forced_eos_token_ids"])
@pytest.mark.parametrize("value", [5, None, "5", b"5", {5: 1}, [-1], [True], [1.0], ["5"], [None], [2**31]])
def test_token_ids_that_make_no_sense_are_refused(name: str, value: Any) -> None:
    refuses(name, value)


@pytest.mark.parametrize(
    "value",
    [None, [1], {"5": 1.0}, {True: 1.0}, {-1: 1.0}, {5: math.nan}, {5: math.inf}, {5: True}, {5: "1"}, {5: 1e39}],
)
def test_a_bias_that_makes_no_sense_is_refused(value: Any) -> None:
    refuses("logit_bias", value)


@pytest.mark.parametrize("value", ["", [""], ["a", ""], 5, b"a", [b"a"], [5], {"a": 1}, [None]])
def test_stop_strings_that_make_no_sense_are_refused(value: Any) -> None:
    refuses("stop", value)


@pytest.mark.parametrize("name", ["ignore_eos", "include_stop", "skip_special_tokens"])
@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_a_switch_is_a_bool_and_nothing_else(name: str, value: Any) -> None:
    refuses(name, value)


@pytest.mark.parametrize("value", [5, [5], [[]], [""], [" "], [["a"]], [[-1]], {"a": 1}, b"a", [None], [[1.0]]])
def test_bad_words_that_make_no_sense_are_refused(value: Any) -> None:
    refuses("bad_words", value)


@pytest.mark.parametrize("value", [5, [5], [[5]], [[[5], math.inf]], [[[], 1.0]], {5: 1.0}, "ab", [[[-1], 1.0]]])
def test_a_sequence_bias_that_makes_no_sense_is_refused(value: Any) -> None:
    refuses("sequence_bias", value)


@pytest.mark.parametrize("value", [5, [], [1], [1, 0.0], [1, -1.0], [-1, 2.0], [1.5, 2.0], "ab", [1, math.nan]])
def test_a_decay_that_makes_no_sense_is_refused(value: Any) -> None:
    refuses("exponential_decay_length_penalty", value)


def test_values_that_other_engines_have_for_off_are_off() -> None:
    for options in ({"top_k": -1}, {"temperature": 1e-6}, {"stop": None}, {"allowed_token_ids": None}, {"seed": -1}):
        assert Sampling(**options) == Sampling()


SCALARS: list[Any] = [
    (np.array(3), 3),
    (torch.tensor(3), 3),
    (torch.tensor([1, 2]), [1, 2]),
    (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    ([torch.tensor(4), np.int32(5)], [4, 5]),
    ([torch.tensor([4, 5]), np.array([6])], [[4, 5], [6]]),
    (torch.tensor(0.5), 0.5),
    (np.array(0.25), 0.25),
    (torch.tensor(math.nan), math.nan),
    (torch.tensor(True), True),
    (np.bool_(False), False),
]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
@pytest.mark.parametrize(("value", "same"), SCALARS, ids=[repr(value) for value, _ in SCALARS])
def test_an_array_is_as_good_as_what_it_holds_and_no_better(name: str, value: Any, same: Any) -> None:
    def outcome(given: Any) -> object:
        try:
            return Sampling(**{name: given})
        except OptionError as error:
            return str(error).split(":")[0].split(",")[0]

    assert outcome(value) == outcome(same)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exponential_decay_length_penalty", {1, 2}),
        ("bad_words", [{1, 2}]),
        ("sequence_bias", [({1, 2}, 1.0)]),
        ("sequence_bias", [{1, 2}]),
    ],
)
def test_a_set_is_no_sequence(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"^{name}: expected an order"):
        Sampling(**{name: value})


def test_max_tokens_is_max_new_tokens_and_both_must_agree() -> None:
    given: dict[str, Any] = {"max_tokens": 5}
    assert Sampling(**given) == Sampling(max_new_tokens=5) == Sampling(**given, max_new_tokens=5)
    with pytest.raises(OptionError, match="max_tokens and max_new_tokens mean the same, and differ: 5 and 6"):
        Sampling(**given, max_new_tokens=6)


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("temprature", "did you mean 'temperature'"),
        ("min_tokens", "did you mean 'min_new_tokens'"),
        ("include_stop_str_in_output", "did you mean 'include_stop'"),
        ("xyzzy", "there are max_new_tokens, "),
        ("best_of", "^best_of: "),
        ("num_beams", "^num_beams: "),
    ],
)
def test_an_unknown_keyword_is_refused_with_what_is_meant(keyword: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Sampling(**{keyword: 1})


def test_the_budget_is_the_least_of_what_limits_it() -> None:
    assert Sampling(max_new_tokens=5).budget(100) == 5
    assert Sampling(max_new_tokens=None).budget(100) is None
    assert Sampling(max_new_tokens=5, max_length=103).budget(100) == 3
    assert Sampling(max_new_tokens=None, max_length=103).budget(100) == 3
    assert Sampling(max_length=50).budget(100) == 0


def test_an_allowed_set_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match="allowed_token_ids: expected at least one"):
        Sampling(allowed_token_ids=[])
    with pytest.raises(OptionError, match="allowed_token_ids: all of them are banned"):
        Sampling(allowed_token_ids=[3], bad_words=[[3]]).validate_for_vocabulary(10)


def test_words_that_are_still_text_are_refused_where_there_is_no_tokenizer() -> None:
    with pytest.raises(OptionError, match="bad_words: 'no' is text"):
        Sampling(bad_words=["no"]).validate_for_vocabulary(10)


def test_fields_are_normalised() -> None:
    sampling = Sampling(
        temperature=np.float32(1),  # type: ignore[arg-type]
        top_k=np.int64(5),  # type: ignore[arg-type]
        stop="END",
        banned_tokens=np.array([7, 3, 7]),  # type: ignore[arg-type]
        stop_token_ids=[9, 9],
        logit_bias={5: 1, 2: -1},
    )
    assert type(sampling.temperature) is float
    assert type(sampling.top_k) is int
    assert sampling.stop == ("END",)
    assert sampling.banned_tokens == (3, 7)
    assert all(type(token) is int for token in sampling.banned_tokens)
    assert sampling.stop_token_ids == (9,)
    assert list(sampling.logit_bias.items()) == [(2, -1.0), (5, 1.0)]
    assert Sampling(stop=["b", "a", "b"]).stop == ("b", "a")
    moved = Sampling(sequence_bias={(5,): 1, (2, 1): 2}, logit_bias={5: 1})  # type: ignore[arg-type]
    assert moved == Sampling(sequence_bias=[([2, 1], 2.0)], logit_bias=LogitBias({5: 2.0}))
    assert Sampling(bad_words=["no", [3, 2], "no"]).bad_words == ("no", (3, 2))
    assert Sampling(frequency_penalty=LARGEST).frequency_penalty == LARGEST


def test_it_is_immutable_and_hashable_and_apart_from_what_it_was_made_of() -> None:
    bias, banned = {5: 1.0}, [3]
    sampling = Sampling(logit_bias=bias, banned_tokens=banned)
    bias[6] = 2.0
    banned.append(4)
    assert dict(sampling.logit_bias) == {5: 1.0}
    assert sampling.banned_tokens == (3,)
    assert sampling == Sampling(logit_bias={5: 1.0}, banned_tokens=(3,))
    assert hash(sampling) == hash(Sampling(logit_bias={5: 1.0}, banned_tokens=(3,)))
    assert sampling != Sampling(logit_bias={5: 1.5}, banned_tokens=(3,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampling.top_k = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        sampling.logit_bias[5] = 2.0  # type: ignore[index]


def test_it_survives_copying_pickling_and_replacing() -> None:
    sampling = Sampling(logit_bias={5: 1.0}, stop=("a",), seed=2**64 - 1)
    assert copy.deepcopy(sampling) == sampling
    assert pickle.loads(pickle.dumps(sampling)) == sampling
    assert dataclasses.replace(sampling, seed=1) == Sampling(logit_bias={5: 1.0}, stop=("a",), seed=1)
    with pytest.raises(OptionError, match=r"^seed"):
        dataclasses.replace(sampling, seed=-2)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.1},
        {"presence_penalty": -0.1},
        {"logit_bias": {1: 1.0}},
        {"banned_tokens": [1]},
        {"min_new_tokens": 1},
        {"min_length": 1},
        {"no_repeat_ngram_size": 2},
        {"sequence_bias": [([1, 2], 1.0)]},
        {"bad_words": ["a"]},
        {"begin_suppress_tokens": [1]},
        {"allowed_token_ids": [1]},
        {"exponential_decay_length_penalty": (1, 1.1)},
        {"forced_bos_token_id": 0},
        {"forced_eos_token_ids": [1]},
    ],
)
def test_each_adjustment_is_noticed(options: dict[str, Any]) -> None:
    assert Sampling(**options).adjusts_logits


@given(st.integers(1, 50), st.integers(0, 60), st.sampled_from(["logit_bias", "banned_tokens", "stop_token_ids"]))
def test_an_id_beyond_the_vocabulary_is_refused_by_name(vocab_size: int, token: int, name: str) -> None:
    sampling = Sampling(**{name: {token: 1.0} if name == "logit_bias" else [token]})  # type: ignore[arg-type]
    if token < vocab_size and not (name == "banned_tokens" and vocab_size == 1):
        sampling.validate_for_vocabulary(vocab_size)
    else:
        with pytest.raises(OptionError, match=rf"^{name}: .*{vocab_size}"):
            sampling.validate_for_vocabulary(vocab_size)


def test_at_least_one_token_must_be_left() -> None:
    Sampling(banned_tokens=range(9)).validate_for_vocabulary(10)
    with pytest.raises(OptionError, match="all 10 tokens"):
        Sampling(banned_tokens=range(10)).validate_for_vocabulary(10)
