"""Every field of transformers' GenerationConfig: whether it acts here, is refused, or means nothing when generating.

Owns `FIELDS`. What always holds: the table has each field that transformers 5 has, which a test compares; a field that
acts says by which keywords of a `Sampling`, one that is refused when it is in force, and why the others mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

Kind = Literal["acts", "refused", "no meaning"]


@dataclass(frozen=True)
class Field:
    """What becomes of one field: `note` says how it acts or why it means nothing.

    A refused one is in force where `in_force(value)` says so; `sampled` ones only where `do_sample` is true.
    """

    kind: Kind
    note: str = ""
    in_force: Callable[[Any], bool] = bool
    sampled: bool = False


def _acts(note: str, *, sampled: bool = False) -> Field:
    return Field("acts", note, sampled=sampled)


def _none(note: str) -> Field:
    return Field("no meaning", note)


def _refused(note: str, in_force: Callable[[Any], bool] = bool, *, sampled: bool = False) -> Field:
    return Field("refused", note, in_force, sampled)


def _unlike(neutral: object) -> Callable[[Any], bool]:
    return lambda value: value != neutral


def _within(value: Any) -> bool:
    return not (isinstance(value, (int, float)) and not 0 < value < 1)


_CACHE = "the plan says how caches are kept"
_REPORT = "says what transformers' `generate` returns"
_BEAM = "speaks of beams alone"
_DRAFT = "speaks of transformers' own drafting; `draft` and `speculate` say how it is done here"
_TOKEN = "read with the tokens of all other files"

FIELDS: Final[Mapping[str, Field]] = {
    "max_length": _acts("`max_length`, where there is no `max_new_tokens`"),
    "max_new_tokens": _acts("`max_new_tokens`"),
    "min_length": _acts("`min_length`"),
    "min_new_tokens": _acts("`min_new_tokens`"),
    "early_stopping": _none(_BEAM),
    "max_time": _refused("a limit of time would not repeat", lambda value: True),
    "stop_strings": _acts("`stop`; the text ends before them"),
    "do_sample": _acts("false or absent is greedy, whatever temperature, top-k and others say"),
    "num_beams": _refused("there is no beam search", _unlike(1)),
    "use_mtp": _refused("heads that predict several tokens are not run"),
    "use_cache": _none(_CACHE),
    "cache_implementation": _none(_CACHE),
    "cache_config": _none(_CACHE),
    "max_cache_len": _none(_CACHE),
    "temperature": _acts("`temperature`", sampled=True),
    "top_k": _acts("`top_k`; 50 where a file that samples is silent, as in transformers", sampled=True),
    "top_p": _acts("`top_p`", sampled=True),
    "min_p": _acts("`min_p`", sampled=True),
    "top_h": _refused("there is no such sampler", lambda value: True, sampled=True),
    "typical_p": _refused(
        "there is no such sampler", lambda p: not (isinstance(p, (int, float)) and p >= 1), sampled=True
    ),
    "epsilon_cutoff": _refused("there is no such sampler", _within, sampled=True),
    "eta_cutoff": _refused("there is no such sampler", _within, sampled=True),
    "repetition_penalty": _acts("`repetition_penalty`"),
    "encoder_repetition_penalty": _refused("the prompt alone is not rewarded", _unlike(1)),
    "length_penalty": _none(_BEAM),
    "no_repeat_ngram_size": _acts("`no_repeat_ngram_size`"),
    "bad_words_ids": _acts("`bad_words`; a word that is one end of a sequence is left out, as in transformers"),
    "renormalize_logits": _none("what is drawn from is a softmax, which does not change"),
    "forced_bos_token_id": _acts("`forced_bos_token_id`"),
    "forced_eos_token_id": _acts("`forced_eos_token_ids`"),
    "remove_invalid_values": _refused("a model that gives values that are not finite ends its sequence with an error"),
    "exponential_decay_length_penalty": _acts("`exponential_decay_length_penalty`"),
    "suppress_tokens": _acts("`banned_tokens`"),
    "begin_suppress_tokens": _acts("`begin_suppress_tokens`"),
    "sequence_bias": _acts("`sequence_bias`, or `logit_bias` for sequences of one token"),
    "token_healing": _refused("a prompt is not rewritten"),
    "guidance_scale": _refused("there is no second, unguided run", _unlike(1)),
    "watermarking_config": _refused("no watermark is written", lambda value: True),
    "num_return_sequences": _refused(
        "what a call returns is not the checkpoint's to say: give Sampling(n=...)", _unlike(1)
    ),
    "output_attentions": _none(_REPORT),
    "output_hidden_states": _none(_REPORT),
    "output_scores": _none(_REPORT),
    "output_logits": _none(_REPORT),
    "return_dict_in_generate": _none(_REPORT),
    "pad_token_id": _none("prompts are not padded"),
    "bos_token_id": _acts(_TOKEN),
    "eos_token_id": _acts(_TOKEN),
    "encoder_no_repeat_ngram_size": _refused("the prompt's n-grams alone are not banned"),
    "decoder_start_token_id": _none("there is no decoder beside an encoder"),
    "is_assistant": _none(_DRAFT),
    "num_assistant_tokens": _none(_DRAFT),
    "num_assistant_tokens_schedule": _none(_DRAFT),
    "assistant_confidence_threshold": _none(_DRAFT),
    "prompt_lookup_num_tokens": _none(_DRAFT),
    "max_matching_ngram_size": _none(_DRAFT),
    "assistant_early_exit": _none(_DRAFT),
    "assistant_lookbehind": _none(_DRAFT),
    "target_lookbehind": _none(_DRAFT),
    "assistant_ensemble_weight": _refused("drafts never change the distribution", lambda value: True),
    "speculation_type": _none(_DRAFT),
    "compile_config": _none("kernels are compiled already"),
    "disable_compile": _none("kernels are compiled already"),
    "continuous_batching_config": _none("the plan says how requests share steps"),
    "low_memory": _none("the plan says what memory is used"),
    "penalty_alpha": _refused("there is no contrastive search", _unlike(0)),
    "dola_layers": _refused("layers are not contrasted", lambda value: True),
    "diversity_penalty": _refused("there are no groups of beams", _unlike(0)),
    "num_beam_groups": _refused("there are no groups of beams", _unlike(1)),
    "constraints": _refused("there is no constrained beam search"),
    "force_words_ids": _refused("there is no constrained beam search"),
    "prefill_chunk_size": _none("`prefill_chunk` says so here, and changes no token's meaning"),
    "transformers_version": _none("says who wrote the file"),
    "_from_model_config": _none("says how the file came to be"),
}
