"""Rotary tables are those of transformers, row p is a function of p alone, and a config without meaning is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slotwise.core.errors import CheckpointError
from slotwise.models.config import ConfigReader
from slotwise.models.rope import Rope, read_rope, rope_section

MAX_POSITIONS = 512
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
}


def read(fields: dict[str, Any], head_dim: int = 24, max_positions: int = MAX_POSITIONS) -> Rope:
    config = ConfigReader(fields, "config.json")
    return read_rope(config, rope_section(config), head_dim=head_dim, max_positions=max_positions, theta=10_000.0)


def parameters(kind: str, theta: float = 500_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **KINDS[kind], **more}}


@pytest.mark.parametrize("head_dim", [8, 24, 128])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3", "yarn"])
def test_tables_equal_transformers(kind: str, head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, max_position_embeddings=MAX_POSITIONS, **parameters(kind))
    rows = 2 * MAX_POSITIONS
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(rows).unsqueeze(0))
    rope = read(parameters(kind), head_dim)
    for function, theirs in (("cos", cos), ("sin", sin)):
        ours = rope.table("cos" if function == "cos" else "sin", rows)
        assert ours.shape == (rows, head_dim // 2)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def test_dynamic_rows_equal_transformers_at_the_length_they_end() -> None:
    config = LlamaConfig(head_dim=24, max_position_embeddings=MAX_POSITIONS, **parameters("dynamic"))
    ours = read(parameters("dynamic")).table("cos", 2 * MAX_POSITIONS)
    for position in (0, 1, MAX_POSITIONS - 1, MAX_POSITIONS, MAX_POSITIONS + 1, 700, 2 * MAX_POSITIONS - 1):
        cos, _ = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor([[position]]))
        # The base is a power taken in float32, whose last bit depends on the shape; an angle of 100 multiplies it.
        torch.testing.assert_close(ours[position], cos[0, 0, :12], rtol=0, atol=2e-5)


@given(st.sampled_from(sorted(KINDS)), st.integers(1, 1100), st.integers(1, 1100))
def test_a_row_does_not_depend_on_how_many_rows_the_table_has(kind: str, rows: int, more: int) -> None:
    rope = read(parameters(kind))
    short, long = rope.table("sin", min(rows, more)), rope.table("sin", max(rows, more))
    assert torch.equal(short, long[: len(short)]), "bit for bit, so that a capacity cannot change what is generated"


def test_both_generations_of_config_mean_the_same() -> None:
    for kind, values in KINDS.items():
        new = read(parameters(kind))
        for key in ("type", "rope_type"):
            assert read_version_4({key: kind, **values}) == new
    assert read_version_4(None) == read(parameters("default"))


def read_version_4(scaling: dict[str, Any] | None) -> Rope:
    config = ConfigReader({"rope_scaling": scaling}, "config.json")
    section = rope_section(config)
    return read_rope(config, section, head_dim=24, max_positions=MAX_POSITIONS, theta=500_000.0)


@pytest.mark.parametrize(
    ("kind", "reach"), [("default", 512), ("linear", 2048), ("dynamic", 1024), ("llama3", 512), ("yarn", 512)]
)
def test_scaling_reaches_further_where_the_config_does_not_count_it(kind: str, reach: int) -> None:
    assert read(parameters(kind)).reach == reach


def test_yarn_reaches_what_it_stretches_to() -> None:
    fields = parameters("yarn", original_max_position_embeddings=512)
    assert read(fields).reach == 2048


def test_yarn_without_a_factor_takes_the_ratio_of_lengths() -> None:
    fields = parameters("yarn")
    del fields["rope_parameters"]["factor"]
    assert read(fields) == read(parameters("yarn"))


def test_an_original_length_beside_the_parameters_wins() -> None:
    fields = parameters("llama3") | {"original_max_position_embeddings": 64}
    assert read(fields).positions == 64


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": (
        {"rope_scaling": {"type": "yarrn"}},
        r"'?\"?yarrn\"?'? is not supported \(did you mean 'yarn'\?\)",
    ),
    "longrope": ({"rope_parameters": {"rope_type": "longrope"}}, r"rope type .*longrope.* is not supported"),
    "type is no string": ({"rope_scaling": {"type": 3}}, "'type' must be a string, found 3"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
    "factor 0": ({"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' must be a number from 1 to"),
    "negative factor": ({"rope_scaling": {"type": "dynamic", "factor": -2}}, "'factor' must be a number from 1 to"),
    "theta 0": ({"rope_parameters": {"rope_theta": 0}}, "'rope_theta' must be a number from 2 to"),
    "theta is text": ({"rope_parameters": {"rope_theta": "1e4"}}, "'rope_theta' must be a number"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' must be 1, found 0.5"),
    "partial rotation inside": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "'partial_rotary_factor' must be 1, found 0.25",
    ),
    "per layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope parameters per layer type"),
    "no band": (parameters("llama3", high_freq_factor=1.0), "'high_freq_factor' must be above 'low_freq_factor'"),
    "original length 0": (
        parameters("yarn", original_max_position_embeddings=0),
        "'original_max_position_embeddings' must be an integer from 1",
    ),
    "scaling is a list": ({"rope_scaling": [1, 2]}, r"'rope_scaling' must be an object, found \[1, 2\]"),
}


@pytest.mark.parametrize("case", REFUSED, ids=REFUSED)
def test_settings_without_meaning_are_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as refusal:
        read(fields)
    assert str(refusal.value).startswith("config.json")


def test_dynamic_scaling_of_a_head_of_two_is_refused() -> None:
    with pytest.raises(CheckpointError, match="needs a head_dim above 2, found 2"):
        read(parameters("dynamic"), head_dim=2)


_NUMBERS = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**40), 2**40))
_VALUES = st.one_of(_NUMBERS, st.none(), st.booleans(), st.text(max_size=5), st.lists(st.integers(), max_size=2))
_KEYS = (
    "rope_theta",
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@given(
    st.sampled_from(sorted(KINDS)),
    st.dictionaries(st.sampled_from(_KEYS), _VALUES, max_size=5),
    st.integers(1, 64).map(lambda half: 2 * half),
    st.integers(1, 2**31),
)
def test_any_settings_give_finite_tables_or_a_clear_error(
    kind: str, values: dict[str, Any], head_dim: int, max_positions: int
) -> None:
    try:
        rope = read({"rope_parameters": {"rope_type": kind, **KINDS[kind], **values}}, head_dim, max_positions)
    except CheckpointError:
        return
    assert rope.reach >= max_positions
    for function in ("cos", "sin"):
        assert torch.isfinite(rope.table("cos" if function == "cos" else "sin", 40)).all()
