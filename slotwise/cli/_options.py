"""Options that several commands share: which model, how it is planned, how it samples.

What always holds: an option left out is not passed on, so that presets, checkpoints and defaults decide.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from slotwise.cli._interrupt import leave_in_order
from slotwise.core.errors import OptionError
from slotwise.engine.sampling import Sampling
from slotwise.plans.presets import preset_names

if TYPE_CHECKING:
    from slotwise.llm import LLM
    from slotwise.plans.options import BackendChoice

PLAN_OPTIONS = (
    "draft",
    "backend",
    "capacity",
    "page_size",
    "pages",
    "max_sequences",
    "speculate",
    "acceptance",
    "adaptive",
    "prefill_chunk",
    "decode_rows",
    "dtype",
    "weights",
    "memory",
    "preset",
)
SAMPLING_OPTIONS = (
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "n",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "no_repeat_ngram_size",
    "logit_bias",
    "sequence_bias",
    "bad_words",
    "banned_tokens",
    "begin_suppress_tokens",
    "allowed_token_ids",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_ids",
    "stop",
    "stop_token_ids",
    "include_stop",
    "skip_special_tokens",
    "ignore_eos",
    "seed",
    "logprobs",
    "prompt_logprobs",
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """MODEL and how to plan it."""
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, or ORG/NAME from the cache (see get)")
    group = add_plan_options(parser)
    group.add_argument(
        "--plan", metavar="F", help="run exactly this saved plan, which has all options above but --memory in it"
    )
    group.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads that compute (default: one for each core; 1 is best for tiny models)",
    )
    group.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="launch a step without drafts before the one before it is read (default: on a GPU)",
    )


def add_plan_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How to plan a model; returns the group of these options."""
    group = parser.add_argument_group("plan")
    group.add_argument("--draft", metavar="D", help="a draft model's folder, or 'ngram'")
    group.add_argument("--backend", metavar="B", help="backends in order (a,b), or per op (*=a,attention=b)")
    group.add_argument("--capacity", type=int, metavar="N", help="most tokens of a sequence, prompt included")
    group.add_argument("--page-size", type=int, metavar="N", help="slots of a page")
    group.add_argument("--pages", type=int, metavar="N", help="pages of each role's pool")
    group.add_argument("--max-sequences", type=int, metavar="N", help="sequences that run at once")
    group.add_argument("--speculate", type=int, metavar="K", help="most tokens drafted a step; 0 for none")
    group.add_argument("--acceptance", metavar="RULE", help="which drafts become tokens: coupled or rejection")
    group.add_argument(
        "--no-adaptive", dest="adaptive", action="store_false", default=None, help="always draft K tokens"
    )
    group.add_argument("--prefill-chunk", type=int, metavar="N", help="most prompt tokens of one prefill call")
    group.add_argument("--decode-rows", type=int, metavar="N", help="most rows of one decode or verification call")
    group.add_argument("--dtype", metavar="T", help="what to compute in: float32, bfloat16, float16")
    group.add_argument(
        "--weights",
        metavar="W",
        help="how matrices are held: native, or made at load: int8, int4, int4_zp",
    )
    group.add_argument(
        "--memory", metavar="M", help="all that may be taken: 24GiB, 512MiB, 24GB, bytes; sets capacity or pages to fit"
    )
    group.add_argument("--preset", metavar="P", help=f"a TOML file, or one of {', '.join(preset_names())}")
    return group


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How to sample; what is left out follows the checkpoint's generation_config."""
    group = parser.add_argument_group("sampling")
    default = Sampling()
    group.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"most tokens to generate (default {default.max_new_tokens})"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 takes the most likely token")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K most likely tokens; 0 for all")
    group.add_argument("--top-p", type=float, metavar="P", help="choose among the fewest tokens that reach P together")
    group.add_argument(
        "--min-p", type=float, metavar="P", help="leave out tokens less than P times as likely as the best"
    )
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1, discourage what was said before")
    group.add_argument("--frequency-penalty", type=float, metavar="F", help="lower a token each time it comes")
    group.add_argument("--presence-penalty", type=float, metavar="F", help="lower a token once it has come")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text (may be repeated)")
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", help="end after one of these, beside the model's own"
    )
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end-of-text token")
    group.add_argument("--include-stop", action="store_true", default=None, help="end the text after what stopped it")
    group.add_argument(
        "--show-special-tokens", dest="skip_special_tokens", action="store_false", default=None, help="in the text"
    )
    group.add_argument("--max-length", type=int, metavar="N", help="most tokens, the prompt's included")
    group.add_argument("--min-new-tokens", type=int, metavar="N", help="nothing ends the text before it has N tokens")
    group.add_argument("--min-length", type=int, metavar="N", help="the same, the prompt's tokens included")
    group.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no run of N tokens comes twice")
    group.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID=X", help="add X to a token's logit (may be repeated)"
    )
    group.add_argument(
        "--sequence-bias",
        type=_sequence_bias,
        action="append",
        metavar="ID,ID=X",
        help="add X to a token's logit behind others (may be repeated)",
    )
    group.add_argument("--bad-words", action="append", metavar="TEXT", help="a word that never comes (may be repeated)")
    group.add_argument(
        "--bad-words-ids",
        dest="bad_words",
        type=_token_ids,
        action="append",
        metavar="ID,ID",
        help="the same, as token ids (may be repeated)",
    )
    group.add_argument("--banned-tokens", type=int, nargs="+", metavar="ID", help="tokens that never come")
    group.add_argument(
        "--begin-suppress-tokens", type=int, nargs="+", metavar="ID", help="tokens that never come first"
    )
    group.add_argument("--allowed-token-ids", type=int, nargs="+", metavar="ID", help="the only tokens to choose from")
    group.add_argument(
        "--exponential-decay-length-penalty",
        type=_decay,
        metavar="START,FACTOR",
        help="make ends likelier by FACTOR with each token after START",
    )
    group.add_argument("--forced-bos-token-id", type=int, metavar="ID", help="the token behind a prompt of one token")
    group.add_argument(
        "--forced-eos-token-ids", type=int, nargs="+", metavar="ID", help="the budget's last token is one of these"
    )
    group.add_argument(
        "--ignore-generation-config", action="store_true", help="start from plain greedy, not from the checkpoint's"
    )
    group.add_argument("--seed", type=int, metavar="S", help="makes sampling repeatable")


def _bias(text: str) -> tuple[int, float]:
    """`ID=X`."""
    try:
        token, number = text.split("=")
        return int(token), float(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ID=X, such as 42=-1.5 or 42=-inf, found {text!r}") from None


def _sequence_bias(text: str) -> tuple[tuple[int, ...], float]:
    """`ID,ID=X`."""
    try:
        ids, number = text.split("=")
        return _token_ids(ids), float(number)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"expected ID,ID=X, such as 42,7=-1.5, found {text!r}") from None


def _token_ids(text: str) -> tuple[int, ...]:
    """`ID,ID`."""
    try:
        return tuple(int(token) for token in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids such as 42,7, found {text!r}") from None


def _decay(text: str) -> tuple[int, float]:
    """`START,FACTOR`."""
    try:
        start, factor = text.split(",")
        return int(start), float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected START,FACTOR, such as 50,1.05, found {text!r}") from None


def load(parsed: argparse.Namespace) -> LLM:
    """The model that the options describe; once it stands, Ctrl-C is an exception for whoever runs it."""
    from slotwise.llm import LLM

    llm = LLM(parsed.model, plan=parsed.plan, threads=parsed.threads, overlap=parsed.overlap, **plan_values(parsed))
    leave_in_order()
    return llm


def plan_values(parsed: argparse.Namespace) -> dict[str, Any]:
    """The plan options that were given."""
    values = {name: getattr(parsed, name) for name in PLAN_OPTIONS if getattr(parsed, name) is not None}
    if "backend" in values:
        values["backend"] = parse_backend(values["backend"])
    return values


def parse_backend(text: str) -> BackendChoice:
    """`a`, `a,b`, or `*=a,attention=b` (repeat an op for its second choice)."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    table: dict[str, list[str]] = {}
    for part in parts:
        op, equals, name = part.partition("=")
        if not equals:
            raise OptionError(
                f"--backend {text!r}: {part!r} names no op; write OP=BACKEND, and *=BACKEND for the others"
            )
        table.setdefault(op, []).append(name)
    return table


def sampling_of(parsed: argparse.Namespace, llm: LLM) -> Sampling:
    """The checkpoint's sampling with the given options in place."""
    given = {name: value for name in SAMPLING_OPTIONS if (value := getattr(parsed, name, None)) is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    defaults = Sampling() if parsed.ignore_generation_config else llm.default_sampling
    values = {name: getattr(defaults, name) for name in SAMPLING_OPTIONS}
    if "max_new_tokens" in given:  # it stands for the checkpoint's limit, whichever that names
        values["max_length"] = None
    return Sampling(**{**values, **given})
