"""Breaks a GPU backend's kernels, one place at a time, and reports which breaks the tests notice.

    .venv/bin/python scripts/mutate_kernels.py [--backend numba_cuda] [--sample N] [--seed S]
        [--file attention.py [--line L]]

A mutant is one change of one line inside a kernel or a function that kernels call: a mask dropped or let one further,
an index shifted, a loop that ends a block early, a barrier left out, K and V swapped, a comparison or a sign turned.
Each runs in a process of its own, with the changed file in place of the real one, which stays as it is; the tests are
those of tests/backends that a kernel of that file has. A crash or a run over the time limit counts as noticed. Exit
code 1 when a mutant survives that is not listed in `EQUIVALENT`.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.util
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

Changes = tuple[tuple[str, str, str], ...]
"""(what, pattern, replacement)."""

TRITON_CHANGES: Changes = (
    ("a mask dropped", r", mask=(?:[^(),]|\((?:[^()]|\([^()]*\))*\))+(?:, other=[^()]*(?:\([^()]*\))?)?\)", ")"),
    ("a mask one further", r"(mask=[^<\n]*?) < ", r"\1 <= "),
    ("an index shifted", r"tl\.arange\(0, (\w+)\)", r"(1 + tl.arange(0, \1))"),
    ("the last block skipped", r"range\((.+), (\w+), (BLOCK\w*)\)", r"range(\1, \2 - \3, \3)"),
    ("K and V swapped", r"\bk_cache\b(?=.*\bat\[)", "v_cache"),
    ("V taken from K", r"\bv_cache\b(?=.*\bat\[)", "k_cache"),
    ("a bound turned", r" >= ", " > "),
    ("a bound widened", r" < (?=size|sequences|end|last|limit)", " <= "),
    ("a greater for a less", r"tl\.maximum\(", "tl.minimum("),
    ("a sign turned", r"(\w) - (\w)", r"\1 + \2"),
    ("a sum for a difference", r"(\w) \+ (\w+ \*|tl\.load)", r"\1 - \2"),
    ("a factor dropped", r" \* (scale|shrink|its_share|noise)\b", ""),
    ("and for or", r" \| ", " & "),
    ("a round of mixing left out", r"static_range\((\d+)\)", r"static_range(\1 - 1)"),
    ("a low word for a high", r"tl\.umulhi\((\w+), (0x\w+)\)", r"\1 * \2"),
    ("a word of the key left out", r" \^ k[01]\b", ""),
    ("a key that stays", r"\b(k[01]) \+ 0x\w+", r"\1"),
    ("words in another order", r"tl\.join\((w\d), (w\d)\)", r"tl.join(\2, \1)"),
    ("a shift left out", r" >> \d+", ""),
    ("a half left out", r" \+ 0\.5\b", ""),
    ("a noise turned", r"return -tl\.log", "return tl.log"),
)

NUMBA_CHANGES: Changes = (
    ("a barrier left out", r"cuda\.sync(?:threads|warp)\(\)", "pass"),
    ("a wait left out", r"\b(?:all_)?copies_done\(\)", "pass"),
    ("an index shifted", r"cuda\.(threadIdx|blockIdx)\.x\b", r"(1 + cuda.\1.x)"),
    ("the last round skipped", r"range\((.+), (\w+), (\w+)\)", r"range(\1, \2 - \3, \3)"),
    ("a round too many", r"range\((.+), (\w+), (\w+)\)", r"range(\1, \2 + \3, \3)"),
    ("K and V swapped", r"\bk_cache\b(?=, )", "v_cache"),
    ("V taken from K", r"\bv_cache\b(?=, \w+, )", "k_cache"),
    ("a bound turned", r" >= ", " > "),
    ("a bound widened", r" < (?=size|sequences|end|last|limit|width|count|head_dim|rows|outputs)", " <= "),
    ("a greater for a less", r"\bmax\(", "min("),
    ("a less for a greater", r"\bmin\(", "max("),
    ("a comparison turned", r" > ", " < "),
    ("a sign turned", r"(\w) - (\w)", r"\1 + \2"),
    ("a sum for a difference", r"(\w) \+ (\w+ \*|load\()", r"\1 - \2"),
    ("a product's term lost", r" \+= ", " = "),
    ("a factor dropped", r" \* (scale|shrink|weight|factor|noise)\b", ""),
    ("or for and", r" and ", " or "),
    ("a place for another", r" % ", " // "),
)

TESTS = {
    "embedding.py": "embedding or take_rows",
    "norm.py": "add or norm",
    "linear.py": "linear or logits or gated or product or parts",
    "linear_q.py": "_q or quantised or codes",
    "rotary.py": "rotary or write_slots",
    "attention.py": "attention or write_slots or split or sequence",
    "sampling.py": "greedy or sample or accept or draws or broken or judged or nan or mass",
    "filters.py": "filter or equal or broken",
    "noise.py": "noise or sample or accept or draws",
}

EQUIVALENT: dict[str, str] = {
    "filters.py:token = tl.minimum(token, tl.min(tl.where((values == highest) & (index < size), index, size), axis=0))"
    " | a bound widened": "the index `size` gives `size`, which is what is given otherwise",
    "attention.py:for start in range(begin, end, teams): | a round too many": "its keys are at `end` or beyond, where "
    "nothing is read or summed",
    "linear_rows.py:for start in range(warp * CHUNK, inner, step): | a round too many": "beyond K all is zeros",
    "linear_q.py:for start in range(warp * chunk, inner, step): | a round too many": "beyond K all is zeros",
    "linear.py:lane = cuda.threadIdx.x % lanes | an index shifted": "lanes of a group change places; all get its sum",
    "linear_q.py:lane = cuda.threadIdx.x % lanes | an index shifted": "lanes of a group change places; all get its sum",
}
"""`file:line | change` -> why no test can see it."""


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    backend: str
    file: str
    line: int
    change: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.change}: {self.before.strip()}  ->  {self.after.strip()}"


NUMBA_TESTS = TESTS | {
    "activation.py": "gated or logits or softcap",
    "attention.py": "attention or write_slots or sequence",
    "attention_tiles.py": "attention and tiles",
    "blocks.py": "norm or greedy or filter or sample or attention or linear",
    "linear_rows.py": "(linear or logits or product) and not tiles",
    "linear_tiles.py": "tiles and not attention",
}


@dataclass(frozen=True)
class Subject:
    """A backend to break: what marks its kernels, how they are changed, and which tests look at them."""

    changes: Changes
    tests: dict[str, str]
    decorators: tuple[str, ...]
    own_tests: tuple[str, ...]
    others: tuple[str, ...]


SUBJECTS = {
    "cuda_triton": Subject(TRITON_CHANGES, TESTS, ("jit",), ("test_cuda_triton.py",), ("reference", "numba")),
    "numba_cuda": Subject(
        NUMBA_CHANGES,
        NUMBA_TESTS,
        ("kernel", "device"),
        ("test_numba_cuda.py", "test_numba_cuda_odd_widths.py"),
        ("reference", "numba_cpu", "cuda_triton"),
    ),
}


def folder_of(backend: str) -> Path:
    """Where the kernels are."""
    return ROOT / "backends" / backend


def mutants(backend: str, file: str) -> Iterator[Mutant]:
    """Every mutant of a file, in order."""
    subject = SUBJECTS[backend]
    source = (folder_of(backend) / file).read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        if not any(word in ast.unparse(d) for d in node.decorator_list for word in subject.decorators):
            continue
        first = node.body[0]
        described = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        doc = (first.end_lineno if described else first.lineno - 1) or node.lineno
        for number in range(doc + 1, (node.end_lineno or doc) + 1):
            line = lines[number - 1]
            code = line.partition("  #")[0]
            for change, pattern, replacement in subject.changes:
                for match in re.finditer(pattern, code):
                    after = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                    if after != code and _parses(lines, number, after):
                        yield Mutant(backend, file, number, change, line, after)


def _parses(lines: list[str], number: int, after: str) -> bool:
    try:
        ast.parse("\n".join([*lines[: number - 1], after, *lines[number:]]))
    except SyntaxError:
        return False
    return True


class _Instead(importlib.abc.MetaPathFinder):
    """Finds one module of the backend in a changed file."""

    def __init__(self, module: str, path: Path) -> None:
        self._module, self._path = module, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        return importlib.util.spec_from_file_location(name, self._path) if name == self._module else None


def noticed(mutant: Mutant, limit: int) -> bool:
    """Whether the tests fail with the mutant in place, in a child process."""
    child = os.fork()
    if child == 0:
        os._exit(_run_tests(mutant, limit))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def _run_tests(mutant: Mutant, limit: int) -> int:
    signal.alarm(limit)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    import pytest

    subject = SUBJECTS[mutant.backend]
    lines = (folder_of(mutant.backend) / mutant.file).read_text(encoding="utf-8").splitlines()
    lines[mutant.line - 1] = mutant.after
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder) / mutant.file
        changed.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sys.meta_path.insert(
            0, _Instead(f"slotwise.backends.{mutant.backend}.{mutant.file.removesuffix('.py')}", changed)
        )
        tests = ROOT / "tests" / "backends"
        wanted = f"({subject.tests[mutant.file]}) and not bits_in_any_company and not every_configuration"
        files = [str(tests / name) for name in (*subject.own_tests, "test_kernels.py")]
        selection = " and not ".join((wanted, *subject.others))
        return int(pytest.main([*files, "-x", "-q", "-p", "no:cacheprovider", "-k", selection]))


def main() -> int:
    """Run the mutants and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=sorted(SUBJECTS), default="cuda_triton")
    parser.add_argument("--sample", type=int, default=0, help="this many mutants, picked by the seed (0: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", choices=sorted(NUMBA_TESTS), help="the mutants of one file")
    parser.add_argument("--line", type=int, action="append", help="the mutants of one line of the file")
    parser.add_argument("--limit", type=int, default=120, help="seconds a mutant may take")
    parsed = parser.parse_args()
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import triton  # noqa: F401  (before the fork, so that each child need not)

    import slotwise.proving.validate  # noqa: F401

    files = [parsed.file] if parsed.file else list(SUBJECTS[parsed.backend].tests)
    files = [file for file in files if (folder_of(parsed.backend) / file).is_file()]
    chosen = [mutant for file in files for mutant in mutants(parsed.backend, file)]
    chosen = [mutant for mutant in chosen if parsed.line is None or mutant.line in parsed.line]
    total = len(chosen)
    if 0 < parsed.sample < total:
        picked = sorted(random.Random(parsed.seed).sample(range(total), parsed.sample))
        chosen = [chosen[i] for i in picked]
    survivors, start = [], time.monotonic()
    for mutant in chosen:
        caught = noticed(mutant, parsed.limit)
        print(f"{'noticed ' if caught else 'SURVIVED'} {mutant}", flush=True)
        if not caught:
            survivors.append(mutant)
    excused = [m for m in survivors if f"{m.file}:{m.before.strip()} | {m.change}" in EQUIVALENT]
    print(
        f"{len(chosen) - len(survivors)} of {len(chosen)} mutants noticed ({total} there are); "
        f"{len(survivors)} survived, "
        f"{len(excused)} of them known to change nothing; {time.monotonic() - start:.0f} s"
    )
    return 1 if len(survivors) > len(excused) else 0


if __name__ == "__main__":
    sys.exit(main())
