"""Heatmaps over rows × cols: a number or a name in each cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from tuner.report.style import INK, MUTED, VARIANTS, Drawing, canvas, drawn, short_count

CELL_WIDTH, CELL_HEIGHT = 0.42, 0.27
"""Inches: four characters of 7.5 points fit."""
MARGIN_LEFT, MARGIN_BOTTOM = 0.75, 0.55
MIN_WIDTH = 5.2
"""Inches: the title and the origin of the figures fit."""
DARK_TEXT, LIGHT_TEXT = "#111827", "#fefefe"
"""On cells, whose colours are the same in both modes."""

Place = tuple[int, int]


def number_map(
    name: str, title: str, origin: str, cells: Mapping[Place, float], *, colours: str, low: float, high: float, text: Callable[[float], str]
) -> Drawing:
    """Numbers by (rows, cols), coloured from `low` to `high` by a matplotlib colour map."""
    colour_map, scale = matplotlib.colormaps[colours], Normalize(low, high, clip=True)
    fills = {place: colour_map(scale(value)) for place, value in cells.items()}
    figure = _map(title, origin, {place: (fills[place], text(value)) for place, value in cells.items()})
    return drawn(figure, name, title)


def speedup_map(name: str, title: str, origin: str, cells: Mapping[Place, float]) -> Drawing:
    """Ratios: white at 1, blue where larger (to 4 ×), red where smaller (to 1/1.25)."""
    logs = {place: math.log2(value) for place, value in cells.items()}
    shades = {place: value / 2 if value > 0 else value / math.log2(1.25) for place, value in logs.items()}
    colour_map, scale = matplotlib.colormaps["RdBu"], Normalize(-1.25, 1.25, clip=True)
    figure = _map(title, origin, {place: (colour_map(scale(shades[place])), _times(value)) for place, value in cells.items()})
    return drawn(figure, name, title)


def variant_map(name: str, title: str, origin: str, cells: Mapping[Place, tuple[str, str]]) -> Drawing:
    """(variant, short text) by (rows, cols), with the variants' colours explained."""
    variants = sorted({variant for variant, _ in cells.values()})
    colour = dict(zip(variants, VARIANTS, strict=False))
    figure = _map(title, origin, {place: (colour[variant], text) for place, (variant, text) in cells.items()})
    legend = [Patch(facecolor=colour[variant], label=variant) for variant in variants]
    figure.axes[0].legend(handles=legend, loc="upper left", bbox_to_anchor=(0, -0.5 / _height(cells)), ncols=len(variants), fontsize=8)
    return drawn(figure, name, title)


def _times(value: float) -> str:
    """Three characters or four."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def _height(cells: Mapping[Place, object]) -> float:
    """Inches of the map itself."""
    return len({rows for rows, _ in cells}) * CELL_HEIGHT


def _map(title: str, origin: str, cells: Mapping[Place, tuple[object, str]]) -> Figure:
    all_rows, all_cols = sorted({rows for rows, _ in cells}), sorted({cols for _, cols in cells})
    width, height = len(all_cols) * CELL_WIDTH, len(all_rows) * CELL_HEIGHT
    total_width, total_height = max(MIN_WIDTH, width + MARGIN_LEFT), height + MARGIN_BOTTOM
    figure, axes = canvas(total_width, total_height, title, origin)
    top = axes.get_position().y1
    per_inch = top / total_height
    axes.set_position((MARGIN_LEFT / total_width, MARGIN_BOTTOM * per_inch, width / total_width, height * per_inch))
    for (rows, cols), (fill, text) in cells.items():
        x, y = all_cols.index(cols), all_rows.index(rows)
        axes.add_patch(Rectangle((x + 0.03, y + 0.04), 0.94, 0.92, facecolor=fill, linewidth=0))
        axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=7.2, color=_text_colour(fill))
    axes.set_xlim(0, len(all_cols))
    axes.set_ylim(len(all_rows), 0)
    axes.set_xticks([x + 0.5 for x in range(len(all_cols))], [short_count(cols) for cols in all_cols])
    axes.set_yticks([y + 0.5 for y in range(len(all_rows))], [short_count(rows) for rows in all_rows])
    axes.tick_params(length=0, labelsize=7.5, labelcolor=INK)
    axes.set_xlabel("columns (length of a row)", color=MUTED, fontsize=8)
    axes.set_ylabel("rows", color=MUTED, fontsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _text_colour(fill: object) -> str:
    """Dark on light cells, light on dark ones, by relative luminance (WCAG 2)."""
    red, green, blue, _ = matplotlib.colors.to_rgba(fill)  # type: ignore[arg-type]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return DARK_TEXT if luminance > 0.18 else LIGHT_TEXT
