"""Numba-CUDA kernels: on an NVIDIA GPU natively, on a CPU in a SIMT simulator of our own.

Owns `BACKEND`. What always holds: the same kernel objects run in both; without a GPU the backend's tensors live on the
CPU, where every access is checked for bounds and races, and importing it needs neither Numba-CUDA nor a GPU.
"""

from __future__ import annotations

import importlib.util

import torch

from slotwise.backends._gpu import graphs as cuda_graphs
from slotwise.backends.numba_cuda import attention, embedding, linear, linear_q, norm, rotary, sampling
from slotwise.core.backend import Backend

OLDEST = (8, 0)
"""Compute capability of the oldest GPU that has what the kernels use: bf16 tensor cores and asynchronous copies."""


def _unavailable() -> str | None:
    if not torch.cuda.is_available():
        return None
    if torch.cuda.get_device_capability() < OLDEST:
        name = torch.cuda.get_device_name()
        return f"{name} is older than sm_80 (Ampere); set CUDA_VISIBLE_DEVICES= to run in the simulator"
    if importlib.util.find_spec("numba_cuda") is None:
        return "there is a GPU, but no Numba-CUDA; pip install 'numba-cuda[cu13]'"
    return None


BACKEND = Backend(
    name="numba_cuda",
    kernels=(
        *embedding.KERNELS,
        *norm.KERNELS,
        *linear.KERNELS,
        *linear_q.KERNELS,
        *rotary.KERNELS,
        *attention.KERNELS,
        *sampling.KERNELS,
    ),
    unavailable=_unavailable,
    device="cuda" if torch.cuda.is_available() else "cpu",
    chain=cuda_graphs.chain,
    note="" if torch.cuda.is_available() else "no GPU, so in the SIMT simulator: to check kernels, not for speed",
)
