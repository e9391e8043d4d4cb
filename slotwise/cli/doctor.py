"""`slotwise doctor`: what this machine can run, and what is missing; with a MODEL, what that checkpoint says.

What always holds: it changes nothing and never fails because something is missing; each line is what was found now. Of
a checkpoint that is refused the rest is told too, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import slotwise
from slotwise.core.errors import SlotwiseError

PACKAGES = (
    # package, the backend that needs it (none: all of Slotwise), the command that installs it
    ("torch", None, "pip install torch"),
    ("safetensors", None, "pip install safetensors"),
    ("tokenizers", None, "pip install tokenizers"),
    ("jinja2", None, "pip install jinja2"),
    ("huggingface_hub", None, "pip install huggingface_hub"),
    ("numba", None, "pip install numba"),
    ("triton", "cuda_triton", "pip install triton"),
    ("numba-cuda", "numba_cuda", "pip install 'numba-cuda[cu13]'"),
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="what this machine can run", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a checkpoint: its architecture, special tokens, ends of text, templates and generation defaults",
    )
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print what is found."""
    return _machine() if parsed.model is None else _checkpoint(parsed.model)


def _checkpoint(folder: str) -> int:
    from slotwise.inspect.checkpoint import describe
    from slotwise.models.folder import existing_folder

    sections = describe(existing_folder(folder))
    print("\n".join(map(str, sections)))
    return int(any(section.error is not None for section in sections))


def _machine() -> int:
    import torch

    from slotwise.core.backend import backend_names, default_backend

    print(f"slotwise    {slotwise.__version__}")
    print(f"python      {sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    threads, vectors = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    print(
        f"cpu         {os.cpu_count()} logical cores, {vectors}; PyTorch uses {threads} threads (--threads changes it)"
    )
    print(f"gpu         {_gpu()}")
    for package, backend, command in PACKAGES:
        try:
            print(f"{package:<11} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            # What only a backend needs that is not part of this version is not missing.
            if backend is None or backend in backend_names():
                print(f"{package:<11} missing, {backend or 'Slotwise'} needs it: {command}")
    try:
        default = default_backend()
    except SlotwiseError:
        default = None
    print("backends")
    for name in backend_names():
        chosen = ", the default here" if name == default else ""
        print(f"  {name:<12} {_backend(name)}{chosen}")
    return 0


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return "; ".join(f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in found)
    if shutil.which("nvidia-smi") is None:
        return "none: there is no NVIDIA driver here"
    if torch.version.cuda is None:
        return "a driver, but this PyTorch is a CPU build; pip install torch with CUDA: https://pytorch.org/get-started"
    return f"a driver, but PyTorch, built for CUDA {torch.version.cuda}, cannot use it; `nvidia-smi` says more"


def _backend(name: str) -> str:
    from slotwise.core.backend import load_backend

    try:
        backend = load_backend(name)
    except SlotwiseError as error:
        return f"cannot be loaded: {error}"
    reason = backend.unavailable()
    ops = len({kernel.op for kernel in backend.kernels})
    if reason is not None:
        return f"not here: {reason}"
    return f"ready, {len(backend.kernels)} kernels for {ops} ops{backend.note and f'; {backend.note}'}"
