"""What `slotwise doctor` promises: what this machine can run, what is missing, and the command that adds it."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from slotwise.cli import doctor
from slotwise.core import backend
from slotwise.core.errors import BackendError

from .commands import Run


def test_it_names_what_is_here(run: Run) -> None:
    done = run("doctor")
    assert (done.code, done.err) == (0, "")
    for line in (f"torch       {torch.__version__}", "slotwise    0.1.0", "  reference    ready, "):
        assert line in done.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine with a GPU needs no simulator")
def test_it_says_which_gpu_kernels_are_simulated_here(run: Run) -> None:
    (line,) = (line for line in run("doctor").out.splitlines() if line.startswith("  numba_cuda"))
    assert line.startswith("  numba_cuda   ready, ")
    assert "no GPU, so in the SIMT simulator" in line


def test_what_is_missing_comes_with_its_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", none)
    monkeypatch.setattr(backend, "backend_names", lambda: ("numba_cpu", "cuda_triton"))
    out = run("doctor").out
    assert "jinja2      missing, Slotwise needs it: pip install jinja2" in out
    assert "numba       missing, Slotwise needs it: pip install numba" in out
    assert "triton      missing, cuda_triton needs it: pip install triton" in out
    assert "numba-cuda" not in out  # no backend named here needs it


def test_a_backend_that_cannot_run_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> SimpleNamespace:
        if name == "broken":
            raise BackendError("no module named x")
        return SimpleNamespace(kernels=(), unavailable=lambda: "there is no GPU")

    monkeypatch.setattr(backend, "backend_names", lambda: ("broken", "distant"))
    monkeypatch.setattr(backend, "load_backend", load)
    out = run("doctor").out
    assert "  broken       cannot be loaded: no module named x\n" in out
    assert "  distant      not here: there is no GPU\n" in out


@pytest.mark.parametrize(
    ("driver", "built", "words"),
    [
        (None, None, "none: there is no NVIDIA driver here"),
        ("/usr/bin/nvidia-smi", None, "this PyTorch is a CPU build"),
        ("/usr/bin/nvidia-smi", "13.0", "built for CUDA 13.0, cannot use it"),
    ],
)
def test_a_gpu_that_cannot_be_used_is_explained(
    run: Run, monkeypatch: pytest.MonkeyPatch, driver: str | None, built: str | None, words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    assert words in run("doctor").out


def test_a_gpu_is_described(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert "gpu         NVIDIA H200, sm_90, 139 GiB\n" in run("doctor").out
