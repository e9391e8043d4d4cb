"""`slotwise doctor`: what this machine can run, and what is missing, with the command that adds it.

What always holds: it changes nothing and never fails because something is missing; each line is what was found now.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

import slotwise
from slotwise.core.backend import backend_names, load_backend
from slotwise.core.errors import SlotwiseError

PACKAGES = (
    # package, what it is for, the command that installs it
    ("torch", "the reference backend", "pip install torch"),
    ("safetensors", "checkpoints", "pip install safetensors"),
    ("tokenizers", "tokenizers", "pip install tokenizers"),
    ("jinja2", "chat templates", "pip install jinja2"),
    ("numba", "the CPU kernels", "pip install 'slotwise[numba]'"),
    ("triton", "the Triton kernels", "pip install 'slotwise[triton]'"),
    ("numba-cuda", "the Numba-CUDA kernels", "pip install 'slotwise[cuda]'"),
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("doctor", help="what this machine can run", description=__doc__.partition("\n")[0])
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print what is found."""
    print(f"slotwise    {slotwise.__version__}")
    print(f"python      {sys.version.split()[0]} on {platform.system()} {platform.machine()}")
    threads = torch.get_num_threads()
    print(
        f"cpu         {os.cpu_count()} logical cores, PyTorch uses {threads} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    print(f"gpu         {_gpu()}")
    for package, purpose, command in PACKAGES:
        try:
            print(f"{package:<11} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:<11} missing: needed for {purpose}; {command}")
    print("backends")
    for name in backend_names():
        print(f"  {name:<12} {_backend(name)}")
    return 0


def _gpu() -> str:
    if not torch.cuda.is_available():
        built = (
            f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this PyTorch is a CPU build"
        )
        return f"none that PyTorch can use ({built})"
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    return "; ".join(found)


def _backend(name: str) -> str:
    try:
        backend = load_backend(name)
    except SlotwiseError as error:
        return f"cannot be loaded: {error}"
    reason = backend.unavailable()
    ops = len({kernel.op for kernel in backend.kernels})
    return f"ready, {len(backend.kernels)} kernels for {ops} ops" if reason is None else f"not here: {reason}"
