"""Lines on two axes: bandwidth against columns, latency against bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from tuner.report.points import COPY, NAMES, OURS
from tuner.report.style import PROVIDERS, Drawing, canvas, drawn, short_count

WIDTH, HEIGHT = 5.75, 3.1
"""Inches: two stand side by side on a desktop."""
LEGEND_COLUMNS = 5
Curve = Sequence[tuple[float, float]]


def bandwidth(name: str, title: str, origin: str, curves: Mapping[str, Curve]) -> Drawing:
    """GB/s against columns (log 2), a line for each provider; the copy's is the ceiling."""
    figure, axes = canvas(WIDTH, HEIGHT, title, origin)
    _place(axes, len(curves))
    for provider, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=NAMES[provider], **_look(provider))
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel("columns (length of a row)")
    axes.set_ylabel("GB/s")
    _legend(axes, len(curves))
    return drawn(figure, name, title)


def latency(name: str, title: str, origin: str, curves: Mapping[str, Curve]) -> Drawing:
    """µs against bytes moved, both logarithmic: points, as problems of the same bytes differ."""
    figure, axes = canvas(WIDTH, HEIGHT, title, origin)
    _place(axes, len(curves))
    for provider, curve in curves.items():
        if provider == COPY:
            axes.plot(*zip(*sorted(curve), strict=True), label=NAMES[provider], **_look(provider))
        else:
            look = {**_look(provider), "linestyle": "", "marker": "o", "alpha": 0.85, "markeredgewidth": 0}
            axes.plot(*zip(*curve, strict=True), label=NAMES[provider], **look)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("bytes moved")
    axes.set_ylabel("µs")
    _legend(axes, len(curves))
    return drawn(figure, name, title)


def _place(axes: Axes, entries: int) -> None:
    """Inside the canvas, with room for the labels and the legend's lines above."""
    top = axes.get_position().y1 - 0.06 * -(-entries // LEGEND_COLUMNS)
    axes.set_position((0.1, 0.14, 0.88, top - 0.14))
    axes.grid(True, axis="both")
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)


def _look(provider: str) -> dict[str, Any]:
    ours = provider == OURS
    if provider == COPY:
        return {"color": PROVIDERS[provider], "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 2}
    return {"color": PROVIDERS[provider], "marker": "o", "linewidth": 2.4 if ours else 1.4, "zorder": 4 if ours else 3}


def _legend(axes: Axes, entries: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=min(entries, LEGEND_COLUMNS), fontsize=7.5, handlelength=1.5, columnspacing=1.0
    )


def _bytes(value: float) -> str:
    """`1 MB` of 10^6."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= unit:
            return f"{value / unit:g} {name}"
    return f"{value:g} B"
