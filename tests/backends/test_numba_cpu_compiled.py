"""Compiled kernels on disk: taken the second time, one folder a version, and said aloud; also where nothing is kept."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest

from slotwise.backends.numba_cpu import compiled


def kernel() -> Any:
    """A new function, the same for the cache each time."""

    def nothing(call: int, thread: int, workers: int) -> None:
        return

    return nothing


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """Where kernels are to be kept, two folders deep, neither there yet; what is logged is caught from `INFO` up."""
    caplog.set_level(logging.INFO, "slotwise")
    found = tmp_path / "cache" / "version"
    monkeypatch.setattr(compiled, "cache_folder", lambda: found)
    return found


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [(record.levelno, record.getMessage()) for record in caplog.records]


def hits() -> int:
    return int(compiled._alive[-1].cache_hits)


def test_a_kernel_is_taken_from_disk_the_second_time_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled.compile_kernel(kernel())
    assert hits() == 0
    assert said(caplog) == [
        (logging.INFO, f"kernels are compiled once, which takes a moment, and kept in {folder} for later starts")
    ]
    compiled.compile_kernel(kernel())
    assert hits() == 1
    assert any(path.suffix == ".nbi" for path in folder.iterdir())
    assert len(said(caplog)) == 1


def test_what_is_on_disk_is_taken_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled.compile_kernel(kernel())
    compiled._say_compiling.cache_clear()  # as in another process
    caplog.clear()
    compiled.compile_kernel(kernel())
    assert (hits(), said(caplog)) == (1, [])


def test_what_is_on_disk_belongs_to_one_version_of_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.CACHE_VARIABLE, str(tmp_path))
    find = compiled.cache_folder.__wrapped__
    first = find()
    monkeypatch.setattr("numba.__version__", "0.0")
    assert find() != first
    for version in range(compiled.KEPT_VERSIONS + 3):
        monkeypatch.setattr("numba.__version__", f"0.{version}")
        newest = find()
        assert compiled.why_not_kept(newest) is None
    kept = [path for path in newest.parent.iterdir() if path.is_dir()]
    assert newest in kept
    assert len(kept) == compiled.KEPT_VERSIONS


def test_a_folder_that_cannot_be_made_is_said_once_and_leaves_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.parent.write_text("a file where a folder is wanted")
    for _ in range(2):
        assert compiled.compile_kernel(kernel()) != 0
        assert hits() == 0
    ((level, text),) = said(caplog)
    assert level == logging.WARNING
    assert text.startswith(f"kernels are compiled at every start: they cannot be kept in {folder} (")
    assert text.endswith("with SLOTWISE_CACHE")
    assert [path.name for path in folder.parent.parent.iterdir()] == [folder.parent.name]


def refuses(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_folders_made_in_vain_are_taken_away(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    assert compiled.compile_kernel(kernel()) != 0
    assert not folder.parent.exists()
    assert [level for level, _ in said(caplog)] == [logging.WARNING]


def test_a_folder_that_can_only_be_read_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled.compile_kernel(kernel())
    compiled.why_not_kept.cache_clear()
    monkeypatch.setattr("tempfile.TemporaryFile", refuses)
    compiled.compile_kernel(kernel())
    assert hits() == 1
    compiled.why_not_kept.cache_clear()


def test_a_full_disk_is_said_and_costs_the_kernel_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", refuses)
    for _ in range(2):
        assert compiled.compile_kernel(kernel()) != 0
    assert [text for level, text in said(caplog) if level == logging.WARNING] == [
        f"a compiled kernel could not be kept in {folder}: No space left on device; later starts compile it again"
    ]


def test_a_lock_of_another_user_keeps_nobody_waiting(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / f"{__name__}.nothing.lock").mkdir()  # which cannot be opened as a file
    assert compiled.compile_kernel(kernel()) != 0
