"""What was measured on: the machine, the versions, the day.

What always holds: nothing here names a host, a user or a path.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("slotwise", "torch", "numpy", "numba", "llvmlite", "transformers", "llama-cpp-python", "gguf")
_TELLING = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
    "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def describe() -> dict[str, Any]:
    """Processor, cores, memory, instructions that matter, versions, date."""
    return {
        "processor": processor_name(),
        "cores": physical_cores(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "instructions": [flag for flag in _TELLING if flag in _cpu_flags()],
        "transparent_huge_pages": _huge_pages(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "date": datetime.date.today().isoformat(),
    }


def processor_name() -> str:
    """The processor's model, with family and model numbers where the name alone says little."""
    text = _read("/proc/cpuinfo")
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.MULTILINE))
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def physical_cores() -> int:
    """Cores that this process may run on, hyperthreads of one core counted once."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed)
    return max(1, len(set(siblings)))


def available_bytes() -> int | None:
    """Memory that new processes could have; None where the system does not say."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


class Disturbance:
    """How much of the cores' time went elsewhere since this was made; zeros where the system does not say."""

    def __init__(self) -> None:
        self._begun, self._before = time.monotonic(), self._used()

    def shares(self) -> dict[str, float]:
        """Shares of all cores' time: `host`, what a virtual machine's host gave to others, `others`, other processes.

        A process of our own counts as others until it has ended.
        """
        cores_seconds = (time.monotonic() - self._begun) * (os.cpu_count() or 1)
        host, others = (after - before for after, before in zip(self._used(), self._before, strict=True))
        return {"host": max(0.0, host) / cores_seconds, "others": max(0.0, others) / cores_seconds}

    @staticmethod
    def _used() -> tuple[float, float]:
        fields = _read("/proc/stat").partition("\n")[0].split()
        if len(fields) < 9:
            return 0.0, 0.0
        user, nice, system, stolen = (int(fields[place]) / os.sysconf("SC_CLK_TCK") for place in (1, 2, 3, 8))
        own = os.times()
        return stolen, user + nice + system - (own.user + own.system + own.children_user + own.children_system)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _huge_pages() -> str | None:
    found = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
