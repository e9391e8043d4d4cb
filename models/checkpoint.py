"""A checkpoint folder on disk: its config, what tensors it has, and the tensors themselves as memory-mapped views.

What always holds: opening reads headers only and checks all of them (of a tensor that lies in several files the data
too: all copies are the same bytes); nothing is unpickled; a tensor is a view of the mapped file, so reading the weights
commits no memory until they are used. Whatever is in the folder, the outcome is a `Checkpoint` or a `CheckpointError`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from slotwise.core.errors import CheckpointError, nearest
from slotwise.models.config import CONFIG_BYTES, ConfigReader, parse_json_object, read_bounded, read_json_object, shown
from slotwise.models.folder import existing_folder
from slotwise.models.safetensors_file import (
    INDEX,
    INDEX_BYTES,
    SINGLE,
    SafetensorsHeader,
    TensorInfo,
    read_header,
    same_bytes,
)

WEIGHT_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPARED = 4096  # names looked through for the nearest; a hostile header can have millions
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pickle", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; make one with `Checkpoint.open`.

    `config` is the parsed config.json, `tensors` what the safetensors headers declare, `absent` what the index lists
    beyond that, with the shard it names: harmless where nothing needs it. The files' handles are opened when their
    first tensor is asked for and live as long as this record.
    """

    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    absent: Mapping[str, str]
    _fingerprint: str = field(repr=False)
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a Hugging Face folder: config.json with model.safetensors, or with the shards of its index.

        Where both a single file and an index exist the single file is read. Raises `CheckpointError`.
        """
        folder = existing_folder(path)
        config_file = folder / "config.json"
        if not _lies_in(folder, "config.json"):
            raise CheckpointError(
                f"{folder}: expected a config.json, found {_listing(folder)}; give the folder of one model"
            )
        config_bytes = read_bounded(config_file, CONFIG_BYTES)
        config = parse_json_object(config_bytes, config_file)

        headers = {file: read_header(file) for file in _weight_files(folder)}
        tensors = _merged(headers)
        absent = _checked_index(folder, headers, tensors) if _is_sharded(folder) else {}

        digest = hashlib.sha256(config_bytes)
        for file, header in headers.items():
            digest.update(f"\n{file.name} {header.file_size} {header.digest}".encode("utf-8", "surrogateescape"))
        return cls(
            folder, MappingProxyType(config), MappingProxyType(tensors), MappingProxyType(absent), digest.hexdigest()
        )

    def reader(self) -> ConfigReader:
        """Return typed, bounded access to config.json."""
        return ConfigReader(self.config, str(self.folder / "config.json"))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors on disk."""
        return sum(info.nbytes for info in self.tensors.values())

    def hint(self, name: str) -> str:
        """What to say of a tensor `name` that is not there: where the index lists it, or the nearest name."""
        if name in self.absent:
            return f" (the index lists it in {self.absent[name]}, which does not have it; fetch that file again)"
        return nearest(name, islice(self.tensors, _COMPARED))

    def fingerprint(self) -> str:
        """Return the SHA-256 of config.json, every safetensors header and the file sizes; the data is not read."""
        return self._fingerprint

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as a CPU view of its memory-mapped file: no copy, in the dtype and shape of its header.

        Raises `CheckpointError` for a name that the checkpoint lacks, a dtype other than F32, F16 and BF16, and a file
        that changed since it was opened.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: has no tensor '{name}'{self.hint(name)}; among {len(self.tensors)}")
        expected = WEIGHT_DTYPES.get(info.dtype)
        if expected is None:
            raise CheckpointError(
                f"{info.file}: tensor '{name}' is {info.dtype}, expected a weight in {', '.join(WEIGHT_DTYPES)}; "
                "convert the checkpoint, quantised weights are not read"
            )
        try:
            if info.file not in self._handles:
                self._handles[info.file] = safe_open(info.file, framework="pt", device="cpu")
            tensor: torch.Tensor = self._handles[info.file].get_tensor(name)
        except Exception as error:  # whatever a foreign parser raises over a foreign file
            raise CheckpointError(f"{info.file}: tensor '{name}' cannot be mapped: {error}") from error
        if tensor.dtype != expected or tuple(tensor.shape) != info.shape:
            raise CheckpointError(
                f"{info.file}: tensor '{name}' was {info.dtype} {list(info.shape)} when the checkpoint was opened, "
                f"found {tensor.dtype} {list(tensor.shape)}; the file was replaced, open the checkpoint again"
            )
        return tensor


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in _entries(folder))
    return (", ".join(names[:8]) + (", ..." if len(names) > 8 else "")) if names else "an empty folder"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error


def _lies_in(folder: Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except OSError as error:
        raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from error


def _is_sharded(folder: Path) -> bool:
    return not _lies_in(folder, SINGLE)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, in a fixed order."""
    if not _is_sharded(folder):
        return [folder / SINGLE]
    if _lies_in(folder, INDEX):
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    pickled = sorted(entry.name for entry in _entries(folder) if entry.suffix in _PICKLED)
    if pickled:
        raise CheckpointError(
            f"{folder}: expected {SINGLE}, found only pickled weights ({', '.join(pickled[:4])}). Pickled weights are "
            "never read, since a pickle can run any code. Where you trust the file, convert it once: "
            "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)` with transformers"
        )
    raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {_listing(folder)}")


def _weight_map(folder: Path) -> dict[str, str]:
    index_file = folder / INDEX
    entries = read_json_object(index_file, INDEX_BYTES).get("weight_map")
    if not isinstance(entries, dict) or not entries:
        raise CheckpointError(f"{index_file}: 'weight_map' must map tensor names to files, found {shown(entries)}")
    for name, shard in entries.items():
        # A plain file name: what has a separator, a drive or a leading dot could lead out of the folder.
        plain = isinstance(shard, str) and re.fullmatch(r"[^./\\:\x00-\x1f][^/\\:\x00-\x1f]*\.safetensors", shard)
        if not plain:
            raise CheckpointError(
                f"{index_file}: tensor {shown(name)} must lie in a .safetensors file of this folder, "
                f"found {shown(shard)}; paths are refused"
            )
        if not _lies_in(folder, shard):
            raise CheckpointError(
                f"{folder}: the shard {shard} is missing; the index lists it for {shown(name)}; fetch it again"
            )
    return entries


def _merged(headers: Mapping[Path, SafetensorsHeader]) -> dict[str, TensorInfo]:
    """Every tensor by name; one that lies in several files must be the same in all of them."""
    tensors: dict[str, TensorInfo] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            first = tensors.setdefault(name, info)
            if first is info:
                continue
            if (first.dtype, first.shape) != (info.dtype, info.shape):
                raise CheckpointError(
                    f"{file}: tensor {shown(name)} is {info.dtype} {list(info.shape)}, but {first.dtype} "
                    f"{list(first.shape)} in {first.file.name}; expected one tensor a name, fetch the files again"
                )
            if not same_bytes(first, info):
                raise CheckpointError(
                    f"{file}: tensor {shown(name)} is also in {first.file.name}, with other values; expected one "
                    "tensor a name, fetch the files again"
                )
    return tensors


def _checked_index(
    folder: Path, headers: Mapping[Path, SafetensorsHeader], tensors: Mapping[str, TensorInfo]
) -> dict[str, str]:
    """What the index lists and no shard has, with the shard it names; a shard may hold more than the index lists.

    Whether a model can do without, whoever knows the model says. A tensor that lies in another shard than the index
    says is refused.
    """
    absent = {}
    for name, shard in _weight_map(folder).items():
        if name not in tensors:
            absent[name] = shard
        elif name not in headers[folder / shard].tensors:
            raise CheckpointError(
                f"{folder / INDEX}: lists tensor {shown(name)} in {shard}, but it is in {tensors[name].file.name}; "
                "fetch the index and the shards again"
            )
    return absent
