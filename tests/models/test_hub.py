"""A checkpoint of a hub: what is fetched, what a cut leaves behind, what is told where it cannot be had.

The hub is a stand-in on loopback (`hub_stand_in.py`); nothing here reaches a network.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from safetensors.torch import load_file, save

from slotwise.core.errors import CheckpointError, HubError
from slotwise.models.folder import existing_folder
from slotwise.models.hub import cached_folder, download
from slotwise.models.load import check_config, load_model

from .hub_stand_in import COMMIT, Hub, serving

NAME = "someone/model"
NOT_NEEDED = {
    "pytorch_model.bin": b"pickle",
    "model-q4.gguf": b"GGUF",
    "consolidated.safetensors": b"again",
    "model.fp16.safetensors": b"again",
    "onnx/model.onnx": b"onnx",
    "onnx/config.json": b"{}",
    "flax_model.msgpack": b"flax",
    "tf_model.h5": b"tf",
    "original/params.json": b"{}",
    "README.md": b"# A model",
    "vocab.json": b"{}",
    ".gitattributes": b"",
}


@pytest.fixture
def files(stories_draft: Path) -> dict[str, bytes]:
    """The bundled draft model, as a hub holds it."""
    return {file.name: file.read_bytes() for file in stories_draft.iterdir() if file.name != "README.md"}


@pytest.fixture
def hub(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that holds the bundled draft model and much that is not needed, and an empty cache."""
    with serving(Hub({**files, **NOT_NEEDED})) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what came before a cut is kept in whole chunks
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("time.sleep", lambda _: None)
        huggingface_hub.close_session()
        yield found
        huggingface_hub.close_session()


def in_shards(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The same model with its tensors in two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
    rest = {name: data for name, data in files.items() if name != "model.safetensors"}
    shards = {part: save({name: tensors[name] for name in held}) for part, held in parts.items()}
    return {**rest, **shards, "model.safetensors.index.json": json.dumps(index).encode()}


def test_what_is_needed_is_fetched_and_nothing_else(hub: Hub, files: dict[str, bytes]) -> None:
    folder = download(NAME, check=check_config)
    assert hub.fetched() == files.keys()
    assert {name: (folder / name).read_bytes() for name in files} == files
    assert {file.name for file in folder.iterdir()} == files.keys()
    assert load_model(NAME).spec.name == "model", "a cached model is called by its name, not by its commit"
    assert existing_folder(f"{NAME}@{COMMIT}") == cached_folder(NAME) == folder


def test_of_several_shards_those_of_the_index_are_fetched(
    hub: Hub, files: dict[str, bytes], stories_draft: Path
) -> None:
    sharded = in_shards(files, stories_draft)
    hub.files = {**sharded, "model-00003-of-00003.safetensors": b"of another time", **NOT_NEEDED}
    folder = download(NAME)
    assert hub.fetched() == sharded.keys()
    assert load_model(folder).checkpoint.tensors.keys() == load_model(stories_draft).checkpoint.tensors.keys()


def test_a_single_file_is_fetched_without_the_shards_beside_it(
    hub: Hub, files: dict[str, bytes], stories_draft: Path
) -> None:
    hub.files = {**in_shards(files, stories_draft), **files}
    download(NAME)
    assert not {name for name in hub.fetched() if "-of-" in name}


def test_named_chat_templates_are_fetched(hub: Hub) -> None:
    hub.files |= {
        "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
        "chat_template.jinja": b"{{ messages }}",
    }
    folder = download(NAME)
    assert (folder / "additional_chat_templates" / "tool_use.jinja").read_bytes() == b"{{ messages }}"


@pytest.mark.parametrize("cuts", [1, 3])
def test_a_transfer_that_is_cut_goes_on_where_it_stopped(hub: Hub, files: dict[str, bytes], cuts: int) -> None:
    hub.cut = {"model.safetensors": cuts}
    folder = download(NAME)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [r for method, path, r in hub.asked if method == "GET" and path.endswith("/model.safetensors")]
    assert ranges[0] is None
    assert all(r is not None for r in ranges[1:]), "only what is missing is asked for"
    assert len(ranges) == cuts + 1


def test_a_download_that_stopped_is_told_and_the_next_goes_on(hub: Hub, files: dict[str, bytes]) -> None:
    hub.cut = {"model.safetensors": 10_000}
    with pytest.raises(HubError, match=rf"{NAME}: .*the same command goes on where it stopped"):
        download(NAME)
    with pytest.raises(
        CheckpointError, match=r"only a part of it is in the cache.*model\.safetensors is missing; `slot"
    ):
        cached_folder(NAME)
    hub.cut.clear()
    hub.asked.clear()
    assert (download(NAME) / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert hub.fetched() == {"model.safetensors"}, "what was there is not fetched again"


def test_what_is_there_is_not_fetched_again(hub: Hub) -> None:
    first = download(NAME)
    hub.asked.clear()
    assert download(NAME) == first
    assert hub.fetched() == set()


def test_a_model_that_cannot_be_run_is_refused_before_its_weights(hub: Hub) -> None:
    hub.files["config.json"] = json.dumps({"model_type": "mamba"}).encode()
    with pytest.raises(CheckpointError, match='model_type "mamba" is not supported'):
        download(NAME, check=check_config)
    assert "model.safetensors" not in hub.fetched()


def test_a_token_is_sent_where_one_is_set(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubError, match=r"no model of that name, or it is private; .* set HF_TOKEN") as refusal:
        download(NAME)
    assert "hf_secret" not in str(refusal.value)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert (download(NAME) / "config.json").exists()


def _without(*names: str) -> Callable[[Hub], object]:
    return lambda hub: [hub.files.pop(name) for name in names]


REFUSALS: dict[str, tuple[Callable[[Hub], object], str]] = {
    "no such model": (lambda hub: setattr(hub, "repository", "another/model"), "has no model of that name"),
    "gated": (
        lambda hub: (setattr(hub, "token", "hf_other"), setattr(hub, "gated", True)),
        r"is gated; accept its terms at http://127\.0\.0\.1:\d+/someone/model, then set HF_TOKEN",
    ),
    "a server in trouble": (lambda hub: setattr(hub, "status", 500), "status 500"),
    "no safetensors": (_without("model.safetensors"), "pickled weights are never read"),
    "no config": (_without("config.json"), "has no config.json, only GGUF files"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_had_is_told(case: str, hub: Hub) -> None:
    change, message = REFUSALS[case]
    change(hub)
    with pytest.raises(HubError, match=message):
        download(NAME)


def test_a_revision_that_is_not_there_is_told(hub: Hub) -> None:
    with pytest.raises(HubError, match=r"has no revision 'v9'"):
        download(NAME, "v9")
    assert download(NAME, COMMIT).name == COMMIT


def test_an_index_that_lists_what_is_not_there_is_told(hub: Hub, files: dict[str, bytes], stories_draft: Path) -> None:
    hub.files = in_shards(files, stories_draft)
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(HubError, match=r"lists model-00002-of-00002\.safetensors, which the repository does not have"):
        download(NAME)


def test_a_full_disk_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr("huggingface_hub.HfApi.snapshot_download", full)
    with pytest.raises(
        HubError, match="/cache/blob cannot be written: No space left on device; free some space, or set"
    ):
        download(NAME)


def test_nobody_at_the_other_end_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"http://127\.0\.0\.1:9"):
        download(NAME)


def test_a_model_that_is_cached_is_read_with_no_hub_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = download(NAME)
    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert existing_folder(NAME) == folder
    assert hub.asked == [], "what is named is looked for in the cache alone"


@pytest.mark.parametrize(
    ("named", "command"),
    [("someone/other", "slotwise get someone/other"), ("someone/model@v1", "slotwise get someone/model --revision v1")],
)
def test_a_model_that_is_not_cached_is_told_with_the_command(hub: Hub, named: str, command: str) -> None:
    with pytest.raises(CheckpointError, match=rf"there is no such folder, and the cache of models.*`{command}` down"):
        existing_folder(named)
    assert hub.asked == []


def test_a_folder_that_exists_is_meant_before_a_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(NAME)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir(parents=True)
    assert existing_folder(NAME) == Path(NAME)


def test_download_mode_off_is_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it to download"):
        download(NAME)


FILES: dict[str, tuple[str, bytes, str]] = {
    "GGUF": ("model.Q4_K_M.gguf", b"GGUF\3\0\0\0", r"a GGUF file, which is not read; .*`slotwise get ORG/NAME`"),
    "a plan": (
        "plan.json",
        b'{\n "slotwise_plan": 5,',
        r"a plan, .*: give the checkpoint's folder, and the plan as `--plan .*plan\.json`",
    ),
    "a recording": ("run.jsonl", b'{"slotwise_recording": 1', r"a recording; `slotwise replay .*run\.jsonl` runs it"),
    "weights alone": ("model.safetensors", b"\0", "give the folder of a model, which has a config.json"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_given_for_a_folder_is_told_what_it_is(case: str, tmp_path: Path) -> None:
    name, data, message = FILES[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        existing_folder(tmp_path / name)


def test_a_file_beside_a_config_leads_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"give the folder that it lies in, {tmp_path}"):
        existing_folder(tmp_path / "model.safetensors")
