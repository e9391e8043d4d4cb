"""Results as pictures.

What always holds: bars start at zero, the whiskers are the least and the most of the rounds, and what was not
measured has no bar.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"slotwise": "#2f6f4f", "llama.cpp": "#c77d2e", "transformers": "#5b6ea6"}


def colour_of(name: str) -> str:
    """An engine's colour, the same for all its precisions."""
    return next((colour for engine, colour in COLOURS.items() if name.startswith(engine)), "#777777")


def bars(axis: Any, title: str, spreads: Mapping[str, Any], limits: Mapping[str, float] | None = None) -> None:
    """Horizontal bars of spreads by name, the first on top; `limits` draws a line at what memory allows each."""
    names = list(spreads)
    places = range(len(names))
    for place, name in zip(places, names, strict=True):
        spread = spreads[name]
        whisker = [[spread["median"] - spread["least"]], [spread["most"] - spread["median"]]]
        axis.barh(place, spread["median"], color=colour_of(name), xerr=whisker, error_kw={"lw": 1, "capsize": 2})
        label = f"{spread['median']:.3g}"
        axis.annotate(label, (spread["most"], place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if limits and name in limits:
            axis.plot([limits[name]] * 2, [place - 0.45, place + 0.45], color="#aa2222", lw=1.5)
    axis.set_yticks(list(places), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.margins(x=0.15)
    axis.set_title(title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(axis="x", labelsize=8)


def draw(
    file: Path, heading: str, rows: Sequence[Sequence[tuple[str, Mapping[str, Any], Mapping[str, float]]]]
) -> None:
    """Write a PNG of panels in rows, each a title, spreads by name, and limits by name."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(len(row) for row in rows)
    tallest = max(len(spreads) for row in rows for _, spreads, _ in row)
    size = (4.2 * columns, (0.9 + 0.3 * tallest) * len(rows) + 0.5)
    figure, axes = pyplot.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, line in zip(rows, axes, strict=True):
        for axis in line[len(row) :]:
            axis.set_axis_off()
        for (title, spreads, limits), axis in zip(row, line, strict=False):
            bars(axis, title, spreads, limits)
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
