"""Results as pictures.

What always holds: bars start at zero, the whiskers are the least and the most of the rounds, and what was not
measured has no bar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


def line(axis: Any, title: str, series: Mapping[str, Sequence[float]], label: str) -> None:
    """Lines by name over 1, 2, 3, ..."""
    for style, (name, values) in zip(("-", "--", ":"), series.items(), strict=False):
        axis.plot(range(1, len(values) + 1), values, style, color=colour_of(name), lw=1.5, label=name)
    axis.set_ylim(bottom=0)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel(label, fontsize=8)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


Painter = Callable[[Any], None]
"""Draws on one pair of axes."""


def draw(file: Path, heading: str, rows: Sequence[Sequence[Painter]], most_bars: int) -> None:
    """Write a PNG of panels in rows, high enough for so many bars in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(len(row) for row in rows)
    size = (4.4 * columns, (0.9 + 0.3 * most_bars) * len(rows) + 0.5)
    figure, axes = pyplot.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for row, places in zip(rows, axes, strict=True):
        for axis in places[len(row) :]:
            axis.set_axis_off()
        for paint, axis in zip(row, places, strict=False):
            paint(axis)
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
