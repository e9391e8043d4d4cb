"""Whatever bytes lie in a checkpoint folder, the outcome is a checkpoint or our own error, and little memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotwise.core.errors import CheckpointError
from slotwise.models.checkpoint import WEIGHT_DTYPES, Checkpoint
from slotwise.models.config import parse_json_object, read_bounded
from slotwise.models.safetensors_file import DTYPE_BITS

FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@contextmanager
def modest_memory() -> Iterator[None]:
    """Fail where the body's peak of Python allocations passes 16 MB, whatever sizes the input names."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20


def written(root: Path, weights: bytes, config: bytes = b"{}") -> Path:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "config.json").write_bytes(config)
    (root / "model.safetensors").write_bytes(weights)
    return root


def file_of(header: object, data: bytes = bytes(8)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def test_a_header_of_the_format_is_read(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "t": ONE}).encode() + b"   "
    checkpoint = Checkpoint.open(written(tmp_path / "m", file_of(header)))
    assert torch.equal(checkpoint.tensor("t"), torch.zeros(2))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (b"", "expected a safetensors file, found 0 bytes"),
        (bytes(7), "found 7 bytes"),
        ((2**63).to_bytes(8, "little") + b"{}", "found a length of 9223372036854775808"),
        ((3).to_bytes(8, "little") + b"{}", "truncated or not a safetensors file"),
        (bytes(8), "found a length of 0"),
        (file_of(b"[1]", b""), "starts with"),
        (file_of(b"{]"), "expected JSON"),
        (file_of(b'{"\xff": 1}'), "expected UTF-8 text, found a bad byte at 2"),
        (file_of(b"{" + b'"a":[' * 200_000), "nesting too deep|expected JSON"),
        (file_of(b'{"t": 1, "t": 1}'), 'the key "t" twice'),
        (file_of(b'{"t": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'), "twice"),
        (file_of({"t": ONE}, bytes(7)), "is truncated: its header describes 8 bytes of data, found 7"),
        (file_of({"t": ONE}, bytes(9)), "is too long"),
        (file_of({"t": ONE, "u": ONE}), r"tensor \"u\" overlaps the tensor before it"),
        (file_of({"t": ONE, "u": {**ONE, "data_offsets": [12, 20]}}, bytes(20)), "leaves a gap before it"),
        (file_of({"t": {**ONE, "shape": [3]}}), "takes 12 bytes, found offsets"),
        (file_of({"t": {**ONE, "data_offsets": [8, 0]}}), "which hold -8"),
        (file_of({"t": {**ONE, "data_offsets": [-8, 0]}}), "each >= 0"),
        (file_of({"t": {**ONE, "data_offsets": [0, 8, 8]}}), "two data offsets"),
        (file_of({"t": {**ONE, "shape": [-2]}}), "each >= 0"),
        (file_of({"t": {**ONE, "shape": [2**40, 2**40]}}), "more elements than any file can hold"),
        (file_of({"t": {**ONE, "shape": [2**70]}}), "each >= 0"),
        (file_of({"t": {**ONE, "shape": [True, 2]}}), "each >= 0"),
        (file_of({"t": {**ONE, "shape": [2.0]}}), "each >= 0"),
        (file_of({"t": {**ONE, "shape": [1] * 17}}), "up to 16 dimensions"),
        (file_of({"t": {**ONE, "shape": "2"}}), "dimensions"),
        (file_of({"t": {**ONE, "dtype": "F31"}}), 'unknown dtype "F31"'),
        (file_of({"t": {**ONE, "dtype": ["F32"]}}), "unknown dtype"),
        (file_of({"t": {**ONE, "more": 1}}), "exactly 'dtype', 'shape' and 'data_offsets'"),
        (file_of({"t": []}), "exactly"),
        (file_of({"": ONE}), "name of 0 characters"),
        (file_of({"t": ONE, "__metadata__": {"a": 1}}), "must map strings to strings"),
        (file_of({"t": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, bytes(1)), "takes 1.5 bytes"),
    ],
)
def test_a_damaged_weights_file_is_named(tmp_path: Path, weights: bytes, message: str) -> None:
    root = written(tmp_path / "m", weights)
    with modest_memory(), pytest.raises(CheckpointError, match=message):
        Checkpoint.open(root)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "expected JSON"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'{"a": NaN}', "found NaN, which is not JSON"),
        (b'{"a": -Infinity}', "found -Infinity, which is not JSON"),
        (b'{"a": 1e400}', "not finite"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": 0.' + b"9" * 5000 + b"}", "not finite or too long"),
        (b'{"a": 1, "a": 2}', 'the key "a" twice'),
        (b'{"a": ' + b"[" * 100_000, "nesting too deep|expected JSON"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b"\xef\xbb\xbf{}", "expected JSON"),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, config: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)config\.json.*({message})"):
        Checkpoint.open(written(tmp_path / "m", file_of({"t": ONE}), config))


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    root = written(tmp_path / "m", file_of({"t": ONE}))
    with (root / "config.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no disk
    with modest_memory(), pytest.raises(CheckpointError, match="expected at most 10485760 bytes"):
        Checkpoint.open(root)
    (root / "config.json").write_bytes(b"{}")
    with (root / "model.safetensors").open("wb") as file:
        file.write((2**35).to_bytes(8, "little"))
        file.truncate(2**40)
    with modest_memory(), pytest.raises(CheckpointError, match="found a length of 34359738368"):
        Checkpoint.open(root)


@pytest.mark.parametrize("padding", range(8))
def test_a_tensor_off_its_alignment_has_its_values(tmp_path: Path, padding: int) -> None:
    header = {
        "odd": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]},
        "t": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    values = torch.tensor([1.5, -3.0])
    data = b"\1" + values.numpy().tobytes()
    weights = file_of(json.dumps(header).encode() + b" " * padding, data)
    assert torch.equal(Checkpoint.open(written(tmp_path / "m", weights)).tensor("t"), values)


def opened(root: Path) -> Checkpoint | None:
    """Open and map everything; only `CheckpointError` may come out of it."""
    try:
        checkpoint = Checkpoint.open(root)
    except CheckpointError:
        return None
    for name, info in checkpoint.tensors.items():
        if info.dtype in WEIGHT_DTYPES:
            assert tuple(checkpoint.tensor(name).shape) == info.shape
        else:
            with pytest.raises(CheckpointError, match="expected a weight in"):
                checkpoint.tensor(name)
    return checkpoint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.one_of(st.integers(0, 6), st.integers(-2, 2**80), JSON)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BITS)) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)


@FUZZ
@given(weights=st.binary(max_size=200), config=st.binary(max_size=100) | st.just(b"{}"))
def test_any_bytes(tmp_path: Path, weights: bytes, config: bytes) -> None:
    with modest_memory():
        opened(written(tmp_path / "m", weights, config))


@FUZZ
@given(header=st.binary(max_size=120).map(lambda rest: b"{" + rest), data=st.binary(max_size=32))
def test_any_header_bytes(tmp_path: Path, header: bytes, data: bytes) -> None:
    with modest_memory():
        opened(written(tmp_path / "m", file_of(header, data)))


@FUZZ
@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=4) | JSON, size=st.integers(0, 64))
def test_any_header_of_roughly_the_right_form(tmp_path: Path, header: object, size: int) -> None:
    with modest_memory():
        opened(written(tmp_path / "m", file_of(header, bytes(size))))


@FUZZ
@given(data=st.data(), shapes=st.lists(st.tuples(st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 3)))))
def test_a_right_header_opens_and_one_changed_byte_does_no_harm(
    tmp_path: Path, data: st.DataObject, shapes: list[tuple[str, list[int]]]
) -> None:
    header: dict[str, object] = {}
    end = 0
    for number, (dtype, shape) in enumerate(shapes):
        shape = [*shape[:3], 4]
        begin, end = end, end + int(torch.tensor(shape).prod()) * DTYPE_BITS[dtype] // 8
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    whole = file_of(header, bytes(end))
    checkpoint = opened(written(tmp_path / "m", whole))
    assert checkpoint is not None
    assert checkpoint.total_bytes == end
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with modest_memory():
        opened(written(tmp_path / "m", bytes(changed)))
        opened(written(tmp_path / "m", whole[: data.draw(st.integers(0, len(whole)))]))


@FUZZ
@given(index=st.dictionaries(st.text(max_size=4), st.text(max_size=20) | st.just("s.safetensors") | JSON) | JSON)
def test_any_index(tmp_path: Path, index: object) -> None:
    root = written(tmp_path / "m", b"")
    (root / "model.safetensors").unlink()
    (root / "s.safetensors").write_bytes(file_of({"t": ONE}))
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    checkpoint = opened(root)
    assert checkpoint is None or {info.file.parent for info in checkpoint.tensors.values()} == {root}


@FUZZ
@given(value=st.dictionaries(st.text(), JSON))
def test_json_means_what_it_says_or_is_refused(value: dict[str, object]) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        with pytest.raises(CheckpointError, match="not JSON"):
            parse_json_object(json.dumps(value).encode(), "x")
        return
    assert parse_json_object(text.encode(), "x") == value


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a regular file"):
        read_bounded(tmp_path, 10)
