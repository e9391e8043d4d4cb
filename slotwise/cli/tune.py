"""`slotwise tune`: measure configurations of GPU kernels here, and write the user's own table.

What always holds: it runs before any generation, never during one; what it changes is block sizes, warps and stages of
decode-side kernels within limits that leave every sum in its order, and of prefill kernels; the file is written whole
or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from slotwise.core.errors import OptionError


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser("tune", help="tune GPU kernels on this GPU", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write (default: the user's own file)")
    parser.add_argument("--table", action="append", default=[], metavar="NAME", help="one table (default: all)")
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Measure, choose, write."""
    import torch

    if not torch.cuda.is_available():
        raise OptionError("tuning measures on a GPU and there is none here; `slotwise doctor` says what is missing")
    from slotwise.backends.cuda_triton.configurations import user_file
    from slotwise.backends.cuda_triton.tuning import tune, write_table

    path = parsed.output or user_file()
    found = tune(parsed.table, lambda line: print(line, file=sys.stderr, flush=True))
    write_table(path, found)
    print(path)
    return 0
