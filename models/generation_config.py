"""What a checkpoint says about generating: where text ends, and how its authors would sample.

What always holds: token ids lie in [0, 2**24) and sampling values are finite and in range, or loading raised a
`CheckpointError`; a value that nothing would use is not looked at. Read from
generation_config.json; token ids that it does not give come from config.json.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from slotwise.core.errors import CheckpointError
from slotwise.models.checkpoint import existing_folder
from slotwise.models.config import ConfigReader, read_json_object, shown

_MAX_TOKEN_ID = 2**24 - 1


@dataclass(frozen=True)
class GenerationDefaults:
    """Ends of text and suggested sampling; a sampling field is None where the checkpoint is silent, or greedy."""

    eos_token_ids: tuple[int, ...] = ()
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> GenerationDefaults:
        """Read the defaults of a checkpoint folder; both files may be absent. Raises `CheckpointError`."""
        root = existing_folder(folder)
        generation, config = (
            ConfigReader(read_json_object(file) if file.exists() else {}, str(file))
            for file in (root / "generation_config.json", root / "config.json")
        )
        eos = _token_ids(generation if generation.has("eos_token_id") else config, "eos_token_id")
        if not generation.boolean("do_sample", default=False):
            return cls(eos)  # what the fields of sampling say is never used
        return cls(
            eos,
            do_sample=True,
            temperature=generation.optional_number("temperature", at_least=0.0, at_most=1e6),
            top_k=generation.integer("top_k", at_least=0, at_most=2**31) if generation.has("top_k") else None,
            top_p=generation.optional_number("top_p", at_least=0.0, at_most=1.0),
            min_p=generation.optional_number("min_p", at_least=0.0, at_most=1.0),
            repetition_penalty=generation.optional_number("repetition_penalty", at_least=1e-6, at_most=1e6),
        )


def _token_id(reader: ConfigReader, key: str) -> int | None:
    return reader.integer(key, at_least=0, at_most=_MAX_TOKEN_ID) if reader.has(key) else None


def _token_ids(reader: ConfigReader, key: str) -> tuple[int, ...]:
    """One id, or a list of ids; order kept, repeats dropped."""
    value = reader.fields.get(key)
    if isinstance(value, list):
        return tuple(dict.fromkeys(reader.int_list(key, at_least=0, at_most=_MAX_TOKEN_ID)))
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise CheckpointError(f"{reader.source}: '{key}' must be a token id or a list of them, found {shown(value)}")
    single = _token_id(reader, key)
    return () if single is None else (single,)
