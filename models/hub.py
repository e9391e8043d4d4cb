"""Checkpoints of a hub: what is needed of a repository, fetched into the cache that Hugging Face's tools share.

Owns `cached_folder` and `download`. What always holds: only the files that are read here are fetched (no pickled, GGUF,
ONNX, TensorFlow or consolidated copies of the weights), and a model that its config rules out is refused before its
weights are; a fetch that was cut short goes on where it stopped. `huggingface_hub` does the transfers and reads
`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE`; it is imported when it is needed.
"""

from __future__ import annotations

import errno
import glob
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slotwise.core.errors import CheckpointError, HubError
from slotwise.models.config import read_json_object
from slotwise.models.safetensors_file import INDEX, INDEX_BYTES, SINGLE

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    INDEX,
)
TEMPLATES = "additional_chat_templates/"
"""A folder of named chat templates, each a `.jinja`."""


def cached_folder(repository: str, revision: str | None = None) -> Path:
    """The folder of `repository`, `org/name`, in the cache; nothing is fetched.

    Raises `CheckpointError` where it is not there, or only a part of it.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    command = f"`slotwise get {repository}{'' if revision is None else f' --revision {revision}'}`"
    with _told(repository, revision):
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    if not isinstance(found, str):
        raise CheckpointError(
            f"{repository}: there is no such folder, and the cache of models, {constants.HF_HUB_CACHE}, has none of "
            f"that name{'' if revision is None else f' at revision {revision}'}; {command} downloads one from "
            f"{constants.ENDPOINT}"
        )
    folder = Path(found).parent
    missing = [name for name in weight_files(folder) if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{repository}: only a part of it is in the cache, {folder}: {missing[0]} is missing"
            f"{f', and {len(missing) - 1} more' if len(missing) > 1 else ''}; {command} goes on where it stopped"
        )
    return folder


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names of the files that hold the weights of a folder, there or not: the single file where there is one."""
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        return (SINGLE,)
    shards = read_json_object(folder / INDEX, INDEX_BYTES).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else ()
    return tuple(sorted({name for name in names if isinstance(name, str) and name.endswith(".safetensors")}))


def download(repository: str, revision: str | None = None, check: Callable[[Path], object] | None = None) -> Path:
    """Fetch what is needed of `repository` into the cache; returns its folder there.

    `check` is called with the folder when all but the weights is there, and may refuse it. Bars show the progress on a
    terminal. Raises `HubError` where the hub has no such model, does not give it, or cannot be reached, and where the
    disk is full.
    """
    from huggingface_hub import HfApi, constants

    with _told(repository, revision):
        hub = HfApi(endpoint=constants.ENDPOINT)
        info = hub.model_info(repository, revision=revision)
        names = [each.rfilename for each in info.siblings or ()]
        small = [n for n in names if n in SMALL_FILES or (n.startswith(TEMPLATES) and n.endswith(".jinja"))]
        _check_listing(repository, names)
        folder = Path(hub.snapshot_download(repository, revision=revision, allow_patterns=_exactly(small)))
        if check is not None:
            check(folder)
        # A single file is what is read where both forms are there.
        weights = (SINGLE,) if SINGLE in names else weight_files(folder)
        lacking = [name for name in weights if name not in names]
        if lacking:
            raise HubError(f"{repository}: its index lists {lacking[0]}, which the repository does not have")
        hub.snapshot_download(repository, revision=folder.name, allow_patterns=_exactly([*small, *weights]))
    return folder


def _exactly(names: list[str]) -> list[str]:
    """Patterns that match these names alone."""
    return [glob.escape(name) for name in names]


def _check_listing(repository: str, names: list[str]) -> None:
    """Raise HubError for a repository that holds no checkpoint to be read, before anything is fetched."""
    if "config.json" not in names:
        kinds = "GGUF files" if any(name.endswith(".gguf") for name in names) else f"{len(names)} other files"
        raise HubError(
            f"{repository}: has no config.json, only {kinds}; give the repository of the model in safetensors"
        )
    if SINGLE not in names and INDEX not in names:
        raise HubError(
            f"{repository}: has no {SINGLE} and no {INDEX}; pickled weights are never read, so give a repository "
            "(or, with --revision, a revision) that has the model in safetensors"
        )


@contextmanager
def _told(repository: str, revision: str | None) -> Iterator[None]:
    """What the library raises, as a `HubError` that says what to do."""
    from huggingface_hub import constants, errors

    hub, again = constants.ENDPOINT, "the same command goes on where it stopped"
    try:
        yield
    except (HubError, CheckpointError):
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repository}: is gated; accept its terms at {hub}/{repository}, then set HF_TOKEN to a token of that "
            "account"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repository}: has no revision {revision!r}; {hub}/{repository}/tree/main lists them"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repository}: {hub} has no model of that name, or it is private; check the name, and for a private one "
            "set HF_TOKEN to a token that may read it"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repository}: is no name of a repository, expected ORG/NAME ({error})") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if constants.HF_HUB_OFFLINE:
            raise HubError(f"{repository}: HF_HUB_OFFLINE is set; unset it to download") from error
        raise HubError(f"{repository}: {hub} cannot be reached ({_cause(error)}); {again}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "; HF_TOKEN is not accepted there" if status in (401, 403) else f"; try later: {again}"
        raise HubError(f"{repository}: {hub} answered with status {status}{hint}") from error
    except OSError as error:
        full = "; free some space, or set HF_HOME to a folder on another disk" if error.errno == errno.ENOSPC else ""
        where = error.filename or constants.HF_HUB_CACHE
        raise HubError(f"{repository}: {where} cannot be written: {error.strerror or error}{full}; {again}") from error
    except Exception as error:  # whatever the library's client raises when a connection breaks
        what = "cannot be reached" if type(error).__name__.startswith(("Connect", "Proxy")) else "stopped answering"
        raise HubError(f"{repository}: {hub} {what} ({_cause(error)}); {again}") from error


def _cause(error: BaseException) -> str:
    """The first cause of an error, in a few words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"[:200]
