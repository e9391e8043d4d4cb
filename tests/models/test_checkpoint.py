"""A checkpoint folder is read whole and lazily, single or sharded; its config and generation defaults are typed."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from slotwise.core.errors import CheckpointError
from slotwise.models import safetensors_file
from slotwise.models.checkpoint import Checkpoint
from slotwise.models.config import ConfigReader
from slotwise.models.generation_config import GenerationDefaults

BUNDLED = Path(__file__).parents[2] / "examples" / "models"
TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.full((2, 1, 3), 0.25, dtype=torch.float16),
    "d": torch.arange(5),
}


def folder_with(root: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    for name, tensors in shards.items():
        save_file(tensors, str(root / name))
    if index is not None:
        (root / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return root


def test_a_single_file_gives_its_tensors_as_saved(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, {"model.safetensors": TENSORS}))
    assert set(checkpoint.tensors) == set(TENSORS)
    assert checkpoint.config == {"model_type": "llama"}
    for name in "abc":
        assert torch.equal(checkpoint.tensor(name), TENSORS[name])
        assert checkpoint.tensor(name).dtype == TENSORS[name].dtype
        assert checkpoint.tensors[name].shape == tuple(TENSORS[name].shape)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert checkpoint.tensors["b"].dtype == "BF16"


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    shards = {"s-1.safetensors": {"a": TENSORS["a"], "extra": TENSORS["c"]}, "s-2.safetensors": {"b": TENSORS["b"]}}
    root = folder_with(tmp_path, shards, {"a": "s-1.safetensors", "b": "s-2.safetensors"})
    checkpoint = Checkpoint.open(root)
    assert set(checkpoint.tensors) == {"a", "b", "extra"}
    assert torch.equal(checkpoint.tensor("b"), TENSORS["b"])
    assert checkpoint.tensors["b"].file == root / "s-2.safetensors"


def test_reading_weights_commits_no_memory() -> None:
    checkpoint = Checkpoint.open(BUNDLED / "stories")
    name, info = max(checkpoint.tensors.items(), key=lambda item: item[1].nbytes)
    first, second = checkpoint.tensor(name), checkpoint.tensor(name)
    assert first.data_ptr() == second.data_ptr()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list a process's mapped files")
    file = os.path.realpath(info.file)
    mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(file)]
    assert any(int(start, 16) <= first.data_ptr() < int(end, 16) for start, end in mapped)


def test_another_dtype_is_known_but_not_a_weight(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(folder_with(tmp_path, {"model.safetensors": TENSORS}))
    assert checkpoint.tensors["d"].dtype == "I64"
    with pytest.raises(CheckpointError, match=r"'d' is I64, expected a weight in F32, F16, BF16"):
        checkpoint.tensor("d")


def test_an_unknown_tensor_suggests_the_nearest(tmp_path: Path) -> None:
    root = folder_with(tmp_path, {"model.safetensors": {"model.norm.weight": TENSORS["a"]}})
    with pytest.raises(CheckpointError, match=r"did you mean 'model\.norm\.weight'"):
        Checkpoint.open(root).tensor("norm.weight")


def test_a_file_replaced_after_opening_is_noticed(tmp_path: Path) -> None:
    root = folder_with(tmp_path, {"model.safetensors": TENSORS})
    checkpoint = Checkpoint.open(root)
    save_file({"a": torch.zeros(2, 2)}, str(root / "model.safetensors"))
    with pytest.raises(CheckpointError, match="was replaced"):
        checkpoint.tensor("a")


def test_the_fingerprint_follows_config_shapes_and_sizes_but_not_the_place(tmp_path: Path) -> None:
    def fingerprint(name: str, tensors: dict[str, torch.Tensor], config: str = "{}") -> str:
        root = folder_with(tmp_path / name, {"model.safetensors": tensors})
        (root / "config.json").write_text(config)
        return Checkpoint.open(root).fingerprint()

    base = fingerprint("one", {"a": torch.zeros(2, 3)})
    assert base == fingerprint("two", {"a": torch.zeros(2, 3)})
    others = [
        fingerprint("three", {"a": torch.zeros(3, 2)}),
        fingerprint("four", {"b": torch.zeros(2, 3)}),
        fingerprint("five", {"a": torch.zeros(2, 3)}, '{"x": 1}'),
    ]
    assert len({base, *others}) == 4


SHARDS = {"s1.safetensors": {"a": TENSORS["a"]}, "s2.safetensors": {"b": TENSORS["b"]}}


@pytest.mark.parametrize(
    ("shards", "index", "message"),
    [
        (SHARDS, {"a": "s1.safetensors", "b": "s3.safetensors"}, r"shard s3\.safetensors is missing"),
        (SHARDS, {"a": "s2.safetensors", "b": "s2.safetensors", "z": "s1.safetensors"}, r"\"a\" in s2.*it is in s1"),
        (
            {"s1.safetensors": {"a": TENSORS["a"]}, "s2.safetensors": {"a": TENSORS["a"] + 1, "b": TENSORS["b"]}},
            {"a": "s1.safetensors", "b": "s2.safetensors"},
            r"\"a\" is also in s1\.safetensors, with other values",
        ),
        (
            {"s1.safetensors": {"a": TENSORS["a"]}, "s2.safetensors": {"a": TENSORS["a"].T.contiguous()}},
            {"a": "s1.safetensors", "b": "s2.safetensors"},
            r"\"a\" is F32 \[.*\], but F32 \[.*\] in s1\.safetensors",
        ),
        (SHARDS, {"a": "../s1.safetensors"}, "paths are refused"),
        (SHARDS, {"a": "/etc/s1.safetensors"}, "paths are refused"),
        (SHARDS, {"a": "sub/s1.safetensors"}, "paths are refused"),
        (SHARDS, {"a": "..\\s1.safetensors"}, "paths are refused"),
        (SHARDS, {"a": ".safetensors"}, "paths are refused"),
        (SHARDS, {"a": "weights.bin"}, "paths are refused"),
        (SHARDS, {"a": 3}, "paths are refused"),
        (SHARDS, {}, "'weight_map' must map tensor names to files"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(
    tmp_path: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder_with(tmp_path / "model", shards, index))


@given(data=st.binary(min_size=1, max_size=64), place=st.integers(0, 63), shards=st.integers(2, 4))
def test_a_tensor_in_several_shards_is_used_where_all_bytes_are_equal(data: bytes, place: int, shards: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_file, "_COMPARED_BYTES", 16)  # so that small tensors take several reads
        files = {f"s{i}.safetensors": {f"own.{i}": torch.zeros(i), "t": _bytes(data)} for i in range(shards)}
        root = folder_with(Path(folder), files, {"t": "s1.safetensors", "own.0": "s0.safetensors"} | _owned(shards))
        assert Checkpoint.open(root).tensors["t"].nbytes == len(data)
        changed = bytearray(data)
        changed[place % len(data)] ^= 1
        save_file({"own.1": torch.zeros(1), "t": _bytes(bytes(changed))}, str(root / "s1.safetensors"))
        with pytest.raises(CheckpointError, match="with other values"):
            Checkpoint.open(root)


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _owned(shards: int) -> dict[str, str]:
    return {f"own.{i}": f"s{i}.safetensors" for i in range(shards)}


def test_what_the_index_lists_and_no_shard_holds_is_said_when_it_is_needed(tmp_path: Path) -> None:
    index = {"a": "s1.safetensors", "zz": "s2.safetensors"}
    checkpoint = Checkpoint.open(folder_with(tmp_path / "model", SHARDS, index))
    assert checkpoint.absent == {"zz": "s2.safetensors"}
    with pytest.raises(CheckpointError, match=r"'zz'.*the index lists it in s2\.safetensors, which does not have it"):
        checkpoint.tensor("zz")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pickle", "consolidated.00.pth"])
def test_pickled_weights_are_never_read(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match=r"Pickled weights are never read.*save_pretrained"):
        Checkpoint.open(tmp_path)
    assert not (tmp_path / "sprung").exists()


def test_what_is_not_a_checkpoint_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    cases = {
        tmp_path / "missing": "found nothing that can be opened",
        tmp_path / "dangling": "found nothing that can be opened",
        tmp_path / "file": "found a file",
        tmp_path / "empty": r"expected a config\.json, found an empty folder",
        tmp_path / "bare": r"expected model\.safetensors or model\.safetensors\.index\.json, found config\.json",
        "meta-llama/Llama-3.2-1B": r"no such folder, and the cache .*`slotwise get meta-llama/Llama-3\.2-1B`",
        "nul\0byte": "found nothing that can be opened",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(path)


def test_a_pipe_in_place_of_a_file_is_refused_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Checkpoint.open(tmp_path)


def test_a_reader_gives_typed_fields_and_defaults() -> None:
    reader = ConfigReader(
        {"n": 3, "x": 2, "flag": False, "kind": "silu", "inner": {"n": 1}, "ids": [1, 2], "names": ["a"], "none": None},
        "config.json",
    )
    assert reader.positive_int("n") == 3
    assert reader.positive_int("absent", default=7) == 7
    assert reader.positive_int("none", default=7) == 7
    assert reader.optional_positive_int("absent") is None
    assert reader.optional_positive_int("n") == 3
    assert reader.number("x") == 2.0
    assert isinstance(reader.number("x"), float)
    assert reader.optional_number("none") is None
    assert reader.boolean("flag") is False
    assert reader.boolean("absent", default=True) is True
    assert reader.choice("kind", ("silu", "gelu")) == "silu"
    assert reader.string("kind") == "silu"
    assert reader.mapping("inner").integer("n", at_least=0, at_most=1) == 1
    assert reader.optional_mapping("absent") is None
    assert reader.int_list("ids", at_least=0, at_most=9, length=2) == (1, 2)
    assert reader.number_list("ids") == (1.0, 2.0)
    assert reader.str_list("names", options=("a", "b")) == ("a",)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("positive_int('hiden_size')", r"config\.json: 'hiden_size' is missing.*did you mean 'hidden_size'"),
        ("positive_int('hidden_size')", "'hidden_size' must be an integer from 1 to 1048576, found 1099511627776"),
        ("positive_int('text')", "'text' must be an integer.*found \"64\""),
        ("positive_int('flag')", "found true"),
        ("positive_int('half')", r"found 0\.5"),
        ("positive_int('minus')", "from 1 to 2147483648, found -4"),
        ("number('text')", "must be a number"),
        ("number('flag')", "must be a number"),
        ("number('half', at_least=1.0)", "from 1 to inf"),
        ("boolean('one')", "must be true or false, found 1"),
        ("string('one')", "must be a string"),
        ("choice('act', ('silu', 'gelu'))", "one of silu, gelu.*did you mean 'silu'"),
        ("mapping('one')", "must be an object"),
        ("mapping('inner').positive_int('x')", r"config\.json, in 'inner': 'x' must be"),
        ("int_list('ids', at_least=0, at_most=9)", "one entry is true"),
        ("int_list('ids', at_least=0, at_most=9, length=3)", "a list of 3 integers"),
        ("number_list('names')", "a list of numbers"),
        ("str_list('names', options=('a',))", "each one of a .one entry is 5"),
        ("str_list('one')", "must be a list of strings"),
    ],
)
def test_a_reader_names_the_field_and_what_was_found(call: str, message: str) -> None:
    fields: dict[str, object] = {
        "hidden_size": 2**40,
        "text": "64",
        "flag": True,
        "half": 0.5,
        "minus": -4,
        "one": 1,
        "act": "sillu",
        "inner": {"x": 0},
        "ids": [1, True],
        "names": ["a", 5],
    }
    reader = ConfigReader(fields, "config.json")
    with pytest.raises(CheckpointError, match=message):
        eval("reader." + call, {"reader": reader})


@pytest.mark.parametrize("name", ["stories", "stories-draft"])
def test_the_bundled_checkpoints_open(name: str) -> None:
    checkpoint = Checkpoint.open(BUNDLED / name)
    assert checkpoint.reader().positive_int("vocab_size") == 2048
    assert checkpoint.total_bytes == sum(info.nbytes for info in checkpoint.tensors.values()) > 0
    assert GenerationDefaults.load(BUNDLED / name).suggested(()) == {}
