"""`slotwise get` as a command: the folder on its output, the cache that every MODEL reads, errors in a line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slotwise.models import hub as hub_module

from ..models.hub_stand_in import COMMIT, Hub, serving

NAME = "someone/model"


@pytest.fixture(scope="module")
def hub(stories: Path) -> Iterator[Hub]:
    """A hub that holds the bundled target."""
    with serving(Hub({file.name: file.read_bytes() for file in stories.iterdir()})) as found:
        yield found


def slotwise(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command with a hub and a cache of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "slotwise", *arguments],
        env={**kept, **told},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_what_is_got_is_a_model_to_every_command(hub: Hub, tmp_path: Path) -> None:
    got = slotwise(hub, tmp_path, "get", NAME)
    assert got.returncode == 0, got.stderr
    assert got.stderr == f"getting {NAME} from {hub.url}\n", "bars are for a terminal"
    folder = Path(got.stdout.strip())
    assert folder == tmp_path / "hub" / "models--someone--model" / "snapshots" / COMMIT
    hub.asked.clear()
    shown = slotwise(
        hub, tmp_path, "plan", "show", NAME, "--capacity", "64", "--backend", "reference", HF_HUB_OFFLINE="1"
    )
    assert shown.returncode == 0, shown.stderr
    assert "model" in shown.stdout
    again = slotwise(hub, tmp_path, "plan", "show", str(folder), "--capacity", "64", "--backend", "reference")
    assert again.stdout == shown.stdout
    assert hub.asked == [], "only `get` speaks to a hub"


def test_a_model_that_was_not_got_is_told_with_the_command(hub: Hub, tmp_path: Path) -> None:
    for arguments in (("generate", NAME, "--prompt", "x"), ("plan", "verify", NAME)):
        found = slotwise(hub, tmp_path, *arguments)
        assert found.returncode == 1
        assert found.stderr.count("\n") == 1, found.stderr
        assert f"`slotwise get {NAME}` downloads one from {hub.url}" in found.stderr


def test_what_cannot_be_had_is_one_line_and_code_1(hub: Hub, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    cases = {
        "has no model of that name": slotwise(hub, tmp_path, "get", "nobody/model"),
        "has no revision 'v2'": slotwise(hub, tmp_path, "get", NAME, "--revision", "v2"),
        "HF_HUB_OFFLINE is set": slotwise(hub, tmp_path, "get", NAME, HF_HUB_OFFLINE="1"),
        "cannot be reached": slotwise(hub, tmp_path, "get", NAME, HF_ENDPOINT="http://127.0.0.1:9"),
        "cannot be written": slotwise(hub, blocked, "get", NAME),
    }
    for message, found in cases.items():
        assert found.returncode == 1
        assert message in found.stderr.splitlines()[-1], found.stderr
        assert found.stderr.splitlines()[-1].startswith("slotwise get: error: ")
        assert "Traceback" not in found.stderr
        assert found.stdout == ""


def test_only_names_that_a_model_is_found_by_later_are_fetched(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    for name, hint in (("a/b/c", "ORG/NAME\n"), ("model", "ORG/NAME\n"), (f"{NAME}@v2", "; say --revision v2\n")):
        found = slotwise(hub, tmp_path, "get", name)
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr.startswith(f"slotwise get: error: {name!r} is no name of a model on a hub")
        assert found.stderr.endswith(hint)
    assert hub.asked == []


def test_the_module_that_looks_models_up_imports_no_library_by_itself() -> None:
    code = f"import sys, {hub_module.__name__}; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
