"""Reading a cubin: registers, spills, shared memory, widths of memory accesses, tensor-core instructions.

Owns `KernelFacts` and `facts_of`. What always holds: every number is read off the machine code with NVIDIA's own
cuobjdump and nvdisasm (Triton's wheel carries both); nothing is taken from the compiler's word but the dynamic shared
memory and the threads of a launch, which are not in the cubin.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from slotwise.core.errors import SlotwiseError
from slotwise.core.machine_code import MachineCode


class AuditError(SlotwiseError):
    """The audit could not be made."""


@dataclass(frozen=True, slots=True)
class Chip:
    """What one multiprocessor has. Source: CUDA C++ Programming Guide, technical specifications per capability."""

    shared_bytes: int
    shared_per_block: int
    warps: int
    blocks: int
    registers: int = 65536


_KIB = 1024
CHIPS: Mapping[str, Chip] = {
    "sm_80": Chip(164 * _KIB, 163 * _KIB, 64, 32),
    "sm_89": Chip(100 * _KIB, 99 * _KIB, 48, 24),
    "sm_90": Chip(228 * _KIB, 227 * _KIB, 64, 32),
    "sm_100": Chip(228 * _KIB, 227 * _KIB, 64, 32),
    "sm_120": Chip(100 * _KIB, 99 * _KIB, 48, 24),
}

_RESERVED_SHARED = 1024  # bytes a block that the system keeps
_REGISTER_UNIT = 256  # registers are given to a warp in units of this many
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDTH = re.compile(r"\.(?:U|S)?(8|16|64|128|256)(?=\.|$)")
TENSOR = re.compile(r"^(HMMA|IMMA|DMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA|UTCOMMA)")


@dataclass(frozen=True, slots=True)
class KernelFacts:
    """What one compiled function is. `loads` and `stores` count global accesses by bytes a thread."""

    code: MachineCode
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    loads: Mapping[int, int]
    stores: Mapping[int, int]
    tensor: Mapping[str, int]
    instructions: int

    @property
    def widest_load(self) -> int:
        """Bytes a thread of the widest global load; 0 when there is none."""
        return max(self.loads, default=0)

    @property
    def widest_store(self) -> int:
        """Bytes a thread of the widest global store; 0 when there is none."""
        return max(self.stores, default=0)

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident, by registers, shared memory and blocks."""
        chip = CHIPS[self.code.generation]
        warps = -(-self.code.threads // 32)
        per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        blocks = min(
            chip.blocks,
            chip.warps // warps,
            chip.registers // (per_warp * warps),
            chip.shared_bytes // (self.shared_bytes + _RESERVED_SHARED),
        )
        return blocks * warps / chip.warps


def facts_of(code: MachineCode) -> KernelFacts:
    """Disassemble and count; raises AuditError when the tools are missing or refuse the cubin."""
    with tempfile.TemporaryDirectory(prefix="slotwise-audit-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code.cubin)
        usages = _USAGE.findall(_run("cuobjdump", "-res-usage", str(path)))
        listing = _run("nvdisasm", "-c", str(path))
    if not usages:
        raise AuditError(f"{code.kernel} {code.generation}: cuobjdump says nothing of registers; is it too old for it?")
    # The function, and what it calls out of line (a division's slow path, say), whose registers are counted in its own.
    registers, stack, shared, local = (max(map(int, column)) for column in zip(*usages, strict=True))
    opcodes = Counter(_INSTRUCTION.findall(listing))
    if not opcodes:
        raise AuditError(f"{code.kernel} {code.generation}: nvdisasm shows no instruction; is it too old for it?")
    return KernelFacts(
        code,
        registers,
        stack_bytes=stack + local,
        spills=sum(n for op, n in opcodes.items() if op.partition(".")[0] in ("STL", "LDL")),
        shared_bytes=shared + code.shared_bytes,
        loads=_by_width(opcodes, ("LDG", "LDGSTS", "LD")),
        stores=_by_width(opcodes, ("STG", "ST")),
        tensor={op: n for op, n in sorted(opcodes.items()) if TENSOR.match(op)},
        instructions=sum(n for op, n in opcodes.items() if op != "NOP"),
    )


def _by_width(opcodes: Mapping[str, int], kinds: tuple[str, ...]) -> Mapping[int, int]:
    found: Counter[int] = Counter()
    for op, count in opcodes.items():
        if op.partition(".")[0] in kinds:
            width = _WIDTH.search(op.partition(".")[1] + op.partition(".")[2])
            found[int(width[1]) // 8 if width else 4] += count
    return dict(sorted(found.items()))


def _tool(name: str) -> str:
    try:
        import triton
    except ImportError:
        carried = None
    else:
        carried = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if carried is not None and carried.is_file():
        return str(carried)
    found = shutil.which(name)
    if found is None:
        raise AuditError(f"{name} is needed to read machine code; `pip install triton` brings it, or the CUDA toolkit")
    return found


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AuditError(f"{tool} failed: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout
