"""Rotary embedding: what a config says about it, and the cosine and sine tables that follow.

Owns `Rope` and `read_rope`. What always holds: row p of a table is a function of p alone; frequencies and angles are
taken in float32, operation by operation as transformers takes them, so that logits agree; the attention factor of yarn
is in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from slotwise.core.errors import CheckpointError, nearest
from slotwise.models.config import ConfigReader, shown
from slotwise.models.config_fields import ROPE_KEYS, unknown_rope_keys

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_MAX_FACTOR = 1e6
_BLOCK = 64  # rows; small enough for PyTorch to stay on one thread


@dataclass(frozen=True, slots=True)
class Rope:
    """A rotary embedding over all `head_dim` dimensions; `kind` is one of `ROPE_TYPES`.

    `positions` is the length it stretches from: max_position_embeddings for `dynamic`, what was trained on before
    scaling for `llama3` and `yarn`. `reach` is the number of positions it serves.
    """

    kind: str
    head_dim: int
    theta: float
    positions: int
    reach: int
    factor: float = 1.0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def table(self, function: Literal["cos", "sin"], rows: int) -> torch.Tensor:
        """The cosine or sine table, float32 [rows, head_dim / 2].

        A longer table starts with the very bits of a shorter one. Blocks of one size see to that: how PyTorch rounds a
        power depends on an element's place in its tensor.
        """
        table = torch.empty(-(-rows // _BLOCK) * _BLOCK, self.head_dim // 2)
        for start in range(0, rows, _BLOCK):
            position = torch.arange(start, start + _BLOCK).unsqueeze(1)
            angles = position.float() * self._inverse_frequencies(position)
            table[start : start + _BLOCK] = (
                angles.cos() if function == "cos" else angles.sin()
            ) * self.attention_factor
        return table[:rows]

    def _inverse_frequencies(self, position: torch.Tensor) -> torch.Tensor:
        """Float32 [1, W], or a row for each `position` [n, 1] where the frequencies depend on it."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim
        plain = (1.0 / (self.theta**exponents)).unsqueeze(0)
        if self.kind == "linear":
            return plain / self.factor
        if self.kind == "dynamic":
            return self._dynamic(plain, exponents, position)
        if self.kind == "llama3":
            return self._llama3(plain)
        if self.kind == "yarn":
            return self._yarn(exponents).unsqueeze(0)
        return plain

    def _dynamic(self, plain: torch.Tensor, exponents: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """NTK-aware scaling: position p beyond `positions` turns with the base for a sequence of p + 1 tokens.

        That equals transformers decoding token by token. (Its prefill turns a whole prompt with the base of its length;
        a key's rotation would then depend on how the prompt was cut, so it is not followed.)
        """
        length = position + 1
        stretched = self.factor * length / self.positions - (self.factor - 1)
        base = self.theta * stretched ** (self.head_dim / (self.head_dim - 2))
        # Below `positions` the stretched base can be negative and its power NaN; torch.where drops those rows.
        return torch.where(length > self.positions, 1.0 / base**exponents, plain)

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
        wavelength = 2 * math.pi / plain
        longest, shortest = self.positions / self.low_freq_factor, self.positions / self.high_freq_factor
        scaled = torch.where(wavelength > longest, plain / self.factor, plain)
        smooth = (self.positions / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        between = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)

    def _yarn(self, exponents: torch.Tensor) -> torch.Tensor:
        """YaRN (Peng et al., 2023), section 3.2: a ramp over the dimensions between the two numbers of rotations."""

        def dimension(rotations: float) -> float:
            turns = math.log(self.positions / (rotations * 2 * math.pi))
            return (self.head_dim * turns) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        width = high - low if high != low else 0.001
        kept = 1 - ((torch.arange(self.head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        frequencies = self.theta**exponents
        return (1.0 / (self.factor * frequencies)) * (1 - kept) + (1.0 / frequencies) * kept


def rope_section(config: ConfigReader) -> ConfigReader:
    """The flat rope settings of a config: `rope_scaling` (transformers 4), else `rope_parameters` (5), else none."""
    for key in ("rope_scaling", "rope_parameters"):
        section = config.optional_mapping(key)
        if section is not None and section.fields:
            nested = [name for name, value in section.fields.items() if isinstance(value, Mapping)]
            if nested:
                raise CheckpointError(
                    f"{section.source}: has rope parameters per layer type ({', '.join(map(shown, nested[:4]))}), "
                    "which is not supported for this architecture; expected one set for all layers"
                )
            return section
    return ConfigReader({}, config.source)


def read_rope(config: ConfigReader, section: ConfigReader, *, head_dim: int, max_positions: int, theta: float) -> Rope:
    """The rotary embedding that `section` describes, within `config`; `theta` is used where the section has none.

    The type `mrope`, of models that see, splits a head among the three numbers of a position (time, height, width); in
    text all three are the same, so it is `default`.
    Raises CheckpointError for a type that is not in `ROPE_TYPES`, a key that no type has, partial rotation, and values
    without meaning.
    """
    kind = section.string("rope_type", default=section.string("type", default="default"))
    kind = "default" if kind == "mrope" else kind
    unknown = next(unknown_rope_keys(section.fields), None)
    if unknown is not None:
        raise CheckpointError(
            f"{section.source}: the rotary setting {shown(unknown)} is not supported"
            f"{nearest(unknown[:80], ROPE_KEYS)}; known are {', '.join(ROPE_KEYS)}"
        )
    if kind not in ROPE_TYPES:
        raise CheckpointError(
            f"{section.source}: rope type {shown(kind)} is not supported{nearest(kind[:80], ROPE_TYPES)}; expected one "
            f"of {', '.join(ROPE_TYPES)}"
        )
    for reader in (section, config):
        if reader.number("partial_rotary_factor", default=1.0) != 1.0:
            raise CheckpointError(
                f"{reader.source}: 'partial_rotary_factor' must be 1, found "
                f"{shown(reader.fields['partial_rotary_factor'])}; rotating a part of the head is not supported"
            )
    theta = section.number("rope_theta", default=theta, at_least=2.0, at_most=1e15)
    rope = Rope(kind, head_dim, theta, max_positions, max_positions)
    if kind == "default":
        return rope
    if kind in ("linear", "dynamic"):
        factor = section.number("factor", at_least=1.0, at_most=_MAX_FACTOR)
        if kind == "dynamic" and head_dim < 4:
            raise CheckpointError(f"{section.source}: dynamic rope scaling needs a head_dim above 2, found {head_dim}")
        return Rope(kind, head_dim, theta, max_positions, int(factor * max_positions), factor)
    source = config if config.has("original_max_position_embeddings") else section
    original = source.positive_int("original_max_position_embeddings", default=max_positions)
    if kind == "llama3":
        factor = section.number("factor", at_least=1.0, at_most=_MAX_FACTOR)
        low = section.number("low_freq_factor", at_least=1e-3, at_most=_MAX_FACTOR)
        high = section.number("high_freq_factor", at_least=1e-3, at_most=_MAX_FACTOR)
        if high <= low:
            raise CheckpointError(
                f"{section.source}: 'high_freq_factor' must be above 'low_freq_factor', found {high:g} and {low:g}"
            )
        return Rope(kind, head_dim, theta, original, max_positions, factor, low_freq_factor=low, high_freq_factor=high)
    return _read_yarn(section, head_dim, theta, original, max_positions)


def _read_yarn(section: ConfigReader, head_dim: int, theta: float, original: int, max_positions: int) -> Rope:
    factor = section.number("factor", default=max(1.0, max_positions / original), at_least=1.0, at_most=_MAX_FACTOR)
    attention_factor = section.optional_number("attention_factor", at_least=1e-6, at_most=_MAX_FACTOR)
    if attention_factor is None:
        mscale = section.number("mscale", default=0.0, at_least=0.0, at_most=_MAX_FACTOR)
        mscale_all_dim = section.number("mscale_all_dim", default=0.0, at_least=0.0, at_most=_MAX_FACTOR)
        if mscale and mscale_all_dim:
            attention_factor = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
        else:
            attention_factor = _mscale(factor, 1.0)
    return Rope(
        "yarn",
        head_dim,
        theta,
        original,
        max(max_positions, int(factor * original)),
        factor,
        attention_factor,
        beta_fast=section.number("beta_fast", default=32.0, at_least=1e-3, at_most=_MAX_FACTOR),
        beta_slow=section.number("beta_slow", default=1.0, at_least=1e-3, at_most=_MAX_FACTOR),
        truncate=section.boolean("truncate", default=True),
    )


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
