"""Bars: one group for each provider, one bar for each way it was called."""

from __future__ import annotations

from collections.abc import Mapping

from tuner.report.points import NAMES
from tuner.report.style import INK, PROVIDERS, Drawing, canvas, drawn

BAR_INCHES, GAP_INCHES, WIDTH = 0.2, 0.16, 6.4
SHADES = (1.0, 0.62, 0.36)
"""Opacity of the bars of a group, in order; no group has more."""


def bars(name: str, title: str, origin: str, values: Mapping[str, Mapping[str, float]], unit: str) -> Drawing:
    """Horizontal bars, the fastest provider on top by its first way; each bar says its value and way."""
    order = sorted(values, key=lambda provider: next(iter(values[provider].values())))
    height = sum(len(values[provider]) * BAR_INCHES + GAP_INCHES for provider in order) + 0.1
    figure, axes = canvas(WIDTH, height, title, origin)
    axes.set_position((0.19, 0.02, 0.79, axes.get_position().y1 - 0.04))
    longest = max(value for ways in values.values() for value in ways.values())
    y = 0.0
    for provider in order:
        start = y
        for shade, (way, value) in zip(SHADES[: len(values[provider])], values[provider].items(), strict=True):
            colour = PROVIDERS.get(provider, PROVIDERS["eager"])
            axes.barh(y, value, height=BAR_INCHES * 0.86, color=colour, alpha=shade)
            axes.text(value + longest * 0.008, y, f"{value:.3g} {unit}  {way}", va="center", fontsize=7.5, color=INK)
            y += BAR_INCHES
        axes.text(-longest * 0.012, (start + y - BAR_INCHES) / 2, NAMES.get(provider, provider), ha="right", va="center", fontsize=8.5)
        y += GAP_INCHES
    axes.set_xlim(0, longest * 1.28)
    axes.set_ylim(y, -BAR_INCHES)
    axes.set_axis_off()
    return drawn(figure, name, title)
