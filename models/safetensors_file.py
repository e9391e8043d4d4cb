"""The header of a safetensors file, parsed strictly before anything else touches the file.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON object that maps each
tensor name to dtype, shape and data offsets, then the data. What always holds for a header that this module returns:
the tensors cover the data exactly, without gap or overlap, and each one's bytes are its shape times its dtype. Only
the header is read, and only once its length is known to lie within the file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from slotwise.core.errors import CheckpointError
from slotwise.models.config import parse_json_object, shown

SINGLE = "model.safetensors"
"""The file that holds all weights of a checkpoint, where they are not split."""
INDEX = "model.safetensors.index.json"
"""The file that says which shard holds which tensor, where they are."""
INDEX_BYTES = 100 * 2**20
HEADER_BYTES = 100 * 2**20
_MAX_RANK = 16
_MAX_ELEMENTS = 2**62
_NAME_CHARACTERS = 1024
_COMPARED_BYTES = 2**20

# Bits, because the format has dtypes of less than a byte.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header declares it; its data are the `nbytes` bytes at `offset` of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A validated header: the tensors by name, the file's size in bytes and the SHA-256 of the header's bytes."""

    tensors: Mapping[str, TensorInfo]
    file_size: int
    digest: str


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header of a safetensors file; every fault is a `CheckpointError` that names the file."""
    data, file_size = _header_bytes(path)
    if not data.startswith(b"{"):
        raise CheckpointError(f"{path}: expected a header that starts with '{{', found {data[:8]!r}")
    entries = parse_json_object(data, f"{path}, header")
    _check_metadata(entries.pop("__metadata__", {}), path)

    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, TensorInfo] = {}
    for name, entry in entries.items():
        info, begin, end = _tensor(name, entry, path, data_start=8 + len(data))
        tensors[name] = info
        spans.append((begin, end, name))

    data_size = file_size - 8 - len(data)
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            fault = "overlaps the tensor before it" if begin < covered else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {shown(name)} {fault}: expected its data at offset {covered}, found {begin}; "
                "the file is damaged, fetch it again"
            )
        covered = end
    if covered != data_size:
        kind = "truncated" if covered > data_size else "too long"
        raise CheckpointError(
            f"{path}: is {kind}: its header describes {covered} bytes of data, found {data_size}; fetch it again"
        )
    return SafetensorsHeader(MappingProxyType(tensors), file_size, hashlib.sha256(data).hexdigest())


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of one dtype and shape have the same data; reads both files, a little at a time."""
    try:
        with one.file.open("rb") as a, other.file.open("rb") as b:
            a.seek(one.offset)
            b.seek(other.offset)
            left = one.nbytes
            while left:
                size = min(left, _COMPARED_BYTES)
                chunk = a.read(size)
                if len(chunk) < size or chunk != b.read(size):
                    return False
                left -= size
    except OSError as error:
        raise CheckpointError(f"{one.file} and {other.file}: cannot be read ({error.strerror})") from error
    return True


def _header_bytes(path: Path) -> tuple[bytes, int]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path}: expected a regular file, found something else")
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: expected a safetensors file, found {file_size} bytes; fetch it again")
            length = int.from_bytes(prefix, "little")
            if length < 2 or length > HEADER_BYTES or length > file_size - 8:
                raise CheckpointError(
                    f"{path}: expected a header of 2 to {min(HEADER_BYTES, file_size - 8)} bytes, "
                    f"found a length of {length}; the file is truncated or not a safetensors file"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check that it exists and is readable") from (
            error
        )
    if len(data) != length:
        raise CheckpointError(f"{path}: expected a header of {length} bytes, found {len(data)}; fetch the file again")
    return data, file_size


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' must map strings to strings, found {shown(metadata)}")


def _tensor(name: str, entry: object, path: Path, data_start: int) -> tuple[TensorInfo, int, int]:
    where = f"{path}: tensor {shown(name)}"
    if not 0 < len(name) <= _NAME_CHARACTERS:
        raise CheckpointError(f"{where} has a name of {len(name)} characters, expected 1 to {_NAME_CHARACTERS}")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have exactly 'dtype', 'shape' and 'data_offsets', found {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(dim) for dim in shape):
        raise CheckpointError(f"{where} must have up to {_MAX_RANK} dimensions, each >= 0, found {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise CheckpointError(f"{where} must have two data offsets, each >= 0, found {shown(offsets)}")
    elements = 1
    for dim in shape:
        elements *= dim
        if elements > _MAX_ELEMENTS:
            raise CheckpointError(f"{where} has shape {shown(shape)}, which has more elements than any file can hold")
    begin, end = offsets
    if elements * bits % 8 or end - begin != elements * bits // 8:
        raise CheckpointError(
            f"{where} is {dtype} of shape {shown(shape)}, which takes {elements * bits / 8:g} bytes, "
            f"found offsets [{begin}, {end}) which hold {end - begin}"
        )
    return TensorInfo(name, str(dtype), tuple(shape), path, data_start + begin, end - begin), begin, end


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_ELEMENTS
