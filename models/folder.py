"""What a caller names as a model, as a folder that exists.

Owns `existing_folder` and `is_repository`. What always holds: a folder that exists is meant before a repository of a
hub; of a repository, what the hub's cache holds is meant, and nothing is downloaded here; whatever else is named, the
error says what it is and which command leads on.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from slotwise.core.errors import CheckpointError

_REPOSITORY = re.compile(r"(?!\.)([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_PLAN_BEGINS = re.compile(rb'\s*\{\s*"slotwise_plan"')
_RECORDING_BEGINS = re.compile(rb'\s*\{\s*"slotwise_recording"')


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder that `path` names: one that exists, else what the cache holds of the repository `org/name`.

    `org/name@revision` is another revision than `main`. Raises `CheckpointError` for all else.
    """
    if not os.fspath(path):
        raise CheckpointError("the model's name is empty; give a checkpoint folder ('.' for this one), or ORG/NAME")
    folder = Path(path)
    try:
        mode = folder.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        named = _REPOSITORY.fullmatch(str(path))
        if named is None:
            raise CheckpointError(
                f"{path}: expected a checkpoint folder, found nothing that can be opened; check the path, or give the "
                "ORG/NAME of a model that `slotwise get` has downloaded"
            ) from error
        from slotwise.models.hub import cached_folder  # the library takes a moment to import, and few need it

        return cached_folder(named[1], named[2])
    if stat.S_ISDIR(mode):
        return folder
    raise CheckpointError(f"{folder}: expected a checkpoint folder, found {_what_file(folder)}")


def is_repository(text: str) -> bool:
    """Whether `text` may be the name of a repository: `org/name` or `org/name@revision`."""
    return _REPOSITORY.fullmatch(text) is not None


def _what_file(file: Path) -> str:
    """What a file is that was given for a folder, and what to do."""
    if file.suffix.lower() == ".gguf":
        return (
            "a GGUF file, which is not read; give the folder of the same model in safetensors, as its makers publish "
            "it (`slotwise get ORG/NAME` downloads one)"
        )
    begin = b""
    try:
        if stat.S_ISREG(file.stat().st_mode):
            with file.open("rb") as opened:
                begin = opened.read(64)
    except OSError:
        begin = b""  # it is only asked what it may be
    if _PLAN_BEGINS.match(begin):
        return (
            f"a plan, which says how a model is run and has no weights: give the checkpoint's folder, and the plan as "
            f"`--plan {file}`, in Python LLM(folder, plan={str(file)!r}); `slotwise plan show {file}` prints it"
        )
    if _RECORDING_BEGINS.match(begin):
        return f"a recording; `slotwise replay {file}` runs it again"
    if (file.parent / "config.json").exists():
        return f"a file; give the folder that it lies in, {file.parent}"
    return "a file; give the folder of a model, which has a config.json and the weights in safetensors"
