"""Triton kernels: on an NVIDIA GPU natively, on a CPU in Triton's interpreter.

Owns `BACKEND`. What always holds: the same functions run in both; without a GPU the backend's tensors live on the CPU,
where it is a way to check kernels, hundreds of times slower than `reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.runtime.interpreter
from triton.runtime.jit import JITFunction

from slotwise.backends._gpu import graphs as cuda_graphs
from slotwise.backends.cuda_triton import attention, embedding, linear, linear_q, norm, rotary, sampling
from slotwise.core.backend import Backend


def _unavailable() -> str | None:
    if not isinstance(attention.attend, JITFunction):
        return "TRITON_INTERPRET was set when Triton was imported; unset it: this backend interprets by itself on a CPU"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        return f"{name} is older than sm_80 (Ampere); set CUDA_VISIBLE_DEVICES= to run in Triton's interpreter"
    if not torch.cuda.is_available() and not hasattr(triton.runtime.interpreter, "_LangPatchScope"):
        return f"there is no GPU, and Triton {triton.__version__} cannot interpret here; pip install 'triton>=3.7'"
    return None


BACKEND = Backend(
    name="cuda_triton",
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
    chains_prefill=False,
    note="" if torch.cuda.is_available() else "no GPU, so in Triton's interpreter: to check kernels, not for speed",
)
