"""Whether a command printed what a page shows.

What always holds: every word, every whole number and every mark is compared exactly. Apart stand only

- what is measured: a number with a unit of time (s, ms, us, ns, min), of a rate (GB/s, tok/s, ...) or a share (%) is
  any number with a unit of that kind;
- numbers with a point or an exponent, whose last digits differ between machines: within one in a hundred, or 1e-6;
- the temporary folder, which the page shows as `FOLDER`, and a seed that was drawn (more than six digits after `seed`);
- how many spaces stand between two words, since columns are as wide as what stands in them. A line's indent counts.

A shown line `...` stands for any lines, none too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

TIMES = r"(?:ns|us|ms|s|min|minutes|seconds)\b"
RATES = r"(?:[kMGT]?B/s|GFLOP/s|tok/s|tokens/s|tokens a second)"
VALUE = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
PARTS = re.compile(
    rf"(?P<time>{VALUE} ?{TIMES})|(?P<rate>{VALUE} ?{RATES})|(?P<share>{VALUE} ?%)|(?P<seed>seed[ =:]+\d{{7,}})"
    rf"|(?P<point>(?<![\w.])[-+]?\d+(?:\.\d+(?:e[-+]?\d+)?|e[-+]?\d+)(?![\w.]*\w))"
)


def _pieces(line: str) -> tuple[str, list[float]]:
    """A line with what varies replaced by its kind, and the numbers with a point, in order."""
    points: list[float] = []

    def name(found: re.Match[str]) -> str:
        if found["point"]:
            points.append(float(found["point"]))
        return f"<{found.lastgroup}>"

    words = line.split()
    indent = line[: len(line) - len(line.lstrip())]
    return indent + PARTS.sub(name, " ".join(words)), points


def same(shown: str, given: str) -> bool:
    """Whether a printed line is what the page shows."""
    (wanted, numbers), (found, others) = _pieces(shown), _pieces(given)
    return wanted == found and all(
        math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-6) for a, b in zip(numbers, others, strict=True)
    )


def difference(shown: Sequence[str], given: Sequence[str], *, excerpt: bool = False) -> str:
    """Which shown line is not printed where it should be, or which printed line is not shown; empty when all is well.

    An excerpt may begin and end anywhere in what was printed.
    """
    wanted = ["...", *shown, "..."] if excerpt else list(shown)
    reach = {0}  # how many of the given lines may be used up by the shown lines so far
    for line in wanted:
        if line.strip() == "...":
            after = set(range(min(reach), len(given) + 1))
        else:
            after = {at + 1 for at in reach if at < len(given) and same(line, given[at])}
        if not after:
            return f"shown and not printed there: {line!r}"
        reach = after
    return "" if len(given) in reach else f"printed and not shown: {given[max(reach)]!r}"
