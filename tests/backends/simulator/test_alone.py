"""The simulator stands alone: its folder, numpy and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from slotwise.backends.numba_cuda import simulator

PROGRAM = """
import sys
sys.modules["numba"] = sys.modules["slotwise"] = sys.modules["torch"] = None  # so importing them fails
import numpy as np
from simt import DataRace, cuda, kernel

@kernel
def turned(x, out):
    tile = cuda.shared.array(64, np.float32)
    i = cuda.threadIdx.x
    tile[i] = x[i]
    if BARRIER:
        cuda.syncthreads()
    out[i] = tile[63 - i]

x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
BARRIER = {barrier}
turned.simulate(1, 64, (x, out))
assert np.array_equal(out, x[::-1])
"""


def _run(folder: Path, barrier: bool) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM.format(barrier=barrier))
    return subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True, check=False)


def test_a_copy_of_the_folder_runs_and_checks_kernels_with_numpy_alone(tmp_path: Path) -> None:
    shutil.copytree(Path(simulator.__file__).parent, tmp_path / "simt")
    done = _run(tmp_path, True)
    assert done.returncode == 0, done.stderr
    done = _run(tmp_path, False)
    assert "DataRace: shared array tile[" in done.stderr
    assert "program.py:14, in turned: out[i] = tile[63 - i]" in done.stderr


def test_importing_the_backend_imports_no_compiler_for_gpus() -> None:
    program = "import sys, slotwise, slotwise.backends.numba_cuda; print('numba.cuda' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
