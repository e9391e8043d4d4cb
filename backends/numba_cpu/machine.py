"""What the processor at hand offers: vector width, registers, instructions, cores.

Owns `LANES`, `HAS_*` and `physical_cores`. What always holds: everything is read once, from LLVM's view of the host,
which is also what kernels are compiled for; nothing here depends on a model or a plan.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from llvmlite import binding as llvm

_FEATURES = frozenset(name for name, has in llvm.get_host_cpu_features().items() if has)
_X86 = platform.machine().lower() in ("x86_64", "amd64")

HAS_AVX512 = _X86 and {"avx512f", "avx512bw", "avx512vl"} <= _FEATURES
HAS_AVX2 = _X86 and {"avx2", "fma"} <= _FEATURES
HAS_VNNI = HAS_AVX512 and "avx512vnni" in _FEATURES
HAS_BF16_PAIRS = HAS_AVX512 and "avx512bf16" in _FEATURES
"""Whether an instruction multiplies bf16 by pairs and adds them in float32."""

LANES = 16 if HAS_AVX512 else 8
"""float32 numbers in one accumulator: a register of AVX-512 or AVX2, two of NEON.

Sums are taken over this many lanes, so a machine with wider registers may round otherwise than one with narrower.
"""


def physical_cores() -> int:
    """Cores that this process may run on, counting hyperthreads of one core once; at least 1."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))
