"""How figures look, and how one becomes a PNG and an SVG that follows the page into dark mode."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, LINE, PAPER, PANEL = "#1b2230", "#5b6577", "#d8dde6", "#ffffff", "#f6f8fb"
PROVIDERS = {
    "tuned": "#0a66c8",
    "heuristic": "#6ea3d6",
    "eager": "#7c8594",
    "compile": "#d46a0c",
    "autotune": "#2b9468",
    "liger": "#2b9469",
    "quack": "#a53f97",
    "flashinfer": "#c23b3b",
    "flaggems": "#8c7102",
    "copy": INK,
}
VARIANTS = ("#0a66c9", "#2b946a", "#d46a0d", "#a53f98", "#8c7103", "#c23b3c", "#5b6578")
"""For variants in the order they appear. Text on them is white in either mode."""

DARK = {
    INK: "#e7eaf0",
    MUTED: "#9ba6b6",
    LINE: "#363f4d",
    PAPER: "#12161d",
    PANEL: "#1a202a",
    "#0a66c8": "#5caaff",
    "#6ea3d6": "#86b4de",
    "#7c8594": "#9aa4b3",
    "#d46a0c": "#f5a04f",
    "#2b9468": "#58c796",
    "#2b9469": "#58c797",
    "#a53f97": "#dc86cf",
    "#c23b3b": "#f37f7f",
    "#8c7102": "#d2b93f",
}
"""What each colour of the light figures is in dark mode. Others stay."""

SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
}
TITLE_INCHES = 0.74
PNG_DPI = 150


@dataclass(frozen=True)
class Drawing:
    """A finished figure: its file name without ending, its title, and both forms."""

    name: str
    title: str
    svg: str
    png: bytes


@contextmanager
def drawing_style() -> Iterator[None]:
    """Within the `with` block figures are made in the report's style."""
    with matplotlib.rc_context(SETTINGS):
        yield


def canvas(width: float, height: float, title: str, origin: str) -> tuple[Figure, Axes]:
    """A figure of width × height inches for axes, below its title and where the figures come from."""
    total = height + TITLE_INCHES
    figure = Figure(figsize=(width, total), facecolor=PAPER)
    axes = figure.add_axes((0.0, 0.0, 1.0, height / total))
    axes.set_facecolor("none")
    figure.text(0.06 / width, 1 - 0.08 / total, title, fontsize=11, fontweight="bold", va="top")
    lines = origin.replace(" · ", "\n", 1)
    figure.text(0.06 / width, 1 - 0.33 / total, lines, fontsize=7, color=MUTED, va="top", linespacing=1.4)
    return figure, axes


def drawn(figure: Figure, name: str, title: str) -> Drawing:
    """Both forms of a figure. Colours with a dark counterpart become CSS variables in the SVG."""
    tight: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=PNG_DPI, **tight)
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids that are the same each time and differ between the figures of a page
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, **tight)
    return Drawing(name, title, for_page(svg.getvalue().decode("utf-8"), title), png.getvalue())


def for_page(svg: str, title: str) -> str:
    """An SVG document as an element of a page: no prolog, no ids that nothing refers to, the page's fonts and colours."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(?!m[0-9a-f]+"|p[0-9a-f]+")[^"]*"', "", text)
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', text)[:2]
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head = f'<svg role="img" aria-label="{label}" style="width: {float(width) * 4 / 3:.0f}px; aspect-ratio: {width} / {height}"'
    text = head + text[len("<svg") :]
    text = text.replace("'DejaVu Sans', sans-serif", "var(--font)").replace("'DejaVu Sans'", "var(--font)")
    for light in DARK:
        text = text.replace(light, f"var({variable(light)})")
    return text


def variable(light: str) -> str:
    """The CSS variable of a colour."""
    return f"--c-{light[1:]}"


def colour_rules() -> str:
    """CSS that gives the variables their values in light and dark mode."""
    light = " ".join(f"{variable(colour)}: {colour};" for colour in DARK)
    dark = " ".join(f"{variable(colour)}: {other};" for colour, other in DARK.items())
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


def short_count(number: float) -> str:
    """`4K` of 4096, `1M` of 1048576, `5120` as `5K`; what is no multiple of 1024 as it is."""
    whole = round(number)
    for unit, letter in ((2**20, "M"), (2**10, "K")):
        if whole % unit == 0 and whole:
            return f"{whole // unit}{letter}"
    return str(whole)
