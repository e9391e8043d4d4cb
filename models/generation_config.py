"""What a checkpoint says about generating: how its authors would sample.

What always holds: loading looks at no value, for nothing may use it; `suggested` gives the keywords of a `Sampling`
for every field that is in force, or a `CheckpointError` that names one that is not done here. Read from
generation_config.json; its token ids are read with those of all other files, in `declared_tokens.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from slotwise.core.errors import CheckpointError
from slotwise.models.config import ConfigReader, is_there, read_json_object
from slotwise.models.folder import existing_folder
from slotwise.models.generation_fields import FIELDS

SILENT_TOP_K: Final = 50
"""What transformers 5.23 takes for `top_k` where a generation_config.json that samples does not say."""

_SAME_NAME: Final = (
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "forced_bos_token_id",
    "exponential_decay_length_penalty",
    "begin_suppress_tokens",
    "sequence_bias",
)


@dataclass(frozen=True)
class GenerationDefaults:
    """The fields of a generation_config.json, as they stand there; none where there is no file."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = "generation_config.json"

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> GenerationDefaults:
        """Read the file of a checkpoint folder, which may be absent. Raises `CheckpointError` where it is no object."""
        file = existing_folder(folder) / "generation_config.json"
        return cls(read_json_object(file) if is_there(file) else {}, str(file))

    def suggested(self, eos_ids: tuple[int, ...]) -> dict[str, Any]:
        """The keywords of a `Sampling` that samples so; `eos_ids` are the model's ends.

        Raises CheckpointError for a field that is in force and refused, or not known.
        """
        given = {name: value for name, value in self.fields.items() if value is not None}
        samples = ConfigReader(self.fields, self.source).boolean("do_sample", default=False)
        for name, value in given.items():
            known = FIELDS.get(name)
            # A field that transformers has not either means nothing to it, and nothing here.
            if known is None or known.kind != "refused" or (known.sampled and not samples) or not known.in_force(value):
                continue
            raise CheckpointError(f"{self.source}: '{name}' is {value!r:.80}: {known.note}; give a Sampling")
        found: dict[str, Any] = {name: given[name] for name in _SAME_NAME if name in given}
        if "max_length" in given and "max_new_tokens" not in given:
            found |= {"max_length": given["max_length"], "max_new_tokens": None}
        if samples:
            found |= {"temperature": given.get("temperature", 1.0), "top_k": given.get("top_k", SILENT_TOP_K)}
            found |= {name: given[name] for name in ("top_p", "min_p") if name in given}
        if "stop_strings" in given:
            found["stop"] = given["stop_strings"]
        if "suppress_tokens" in given:
            found["banned_tokens"] = given["suppress_tokens"]
        if "forced_eos_token_id" in given:
            forced = given["forced_eos_token_id"]
            found["forced_eos_token_ids"] = forced if isinstance(forced, list) else [forced]
        if "bad_words_ids" in given:
            words = given["bad_words_ids"]
            found["bad_words"] = (
                [word for word in words if word not in [[end] for end in eos_ids]] if isinstance(words, list) else words
            )
        return found
