"""What the tests of faults share: running a kernel that must stop, and arrays for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from slotwise.backends.numba_cuda.simulator import Fault


def fault(kind: type[Fault], run: Callable[..., None], grid: Any, block: Any, *arguments: Any, **options: Any) -> str:
    """What the fault says that `run` with these arguments must stop with."""
    with pytest.raises(kind) as caught:
        run(grid, block, arguments, **options)
    return str(caught.value)


def floats(*shape: int) -> np.ndarray[Any, Any]:
    """float32 zeros."""
    return np.zeros(shape, np.float32)
