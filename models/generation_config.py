"""What a checkpoint says about generating: how its authors would sample.

What always holds: sampling values are finite and in range, or loading raised a `CheckpointError`; a value that nothing
would use is not looked at. Read from generation_config.json; its token ids are read with those of all other files, in
`declared_tokens.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from slotwise.models.config import ConfigReader, read_json_object
from slotwise.models.folder import existing_folder


@dataclass(frozen=True)
class GenerationDefaults:
    """Suggested sampling; a field is None where the checkpoint is silent, or greedy."""

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> GenerationDefaults:
        """Read the defaults of a checkpoint folder, whose file may be absent. Raises `CheckpointError`."""
        file = existing_folder(folder) / "generation_config.json"
        generation = ConfigReader(read_json_object(file) if file.exists() else {}, str(file))
        if not generation.boolean("do_sample", default=False):
            return cls()  # what the fields of sampling say is never used
        return cls(
            do_sample=True,
            temperature=generation.optional_number("temperature", at_least=0.0, at_most=1e6),
            top_k=generation.integer("top_k", at_least=0, at_most=2**31) if generation.has("top_k") else None,
            top_p=generation.optional_number("top_p", at_least=0.0, at_most=1.0),
            min_p=generation.optional_number("min_p", at_least=0.0, at_most=1.0),
            repetition_penalty=generation.optional_number("repetition_penalty", at_least=1e-6, at_most=1e6),
        )
