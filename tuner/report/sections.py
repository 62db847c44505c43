"""From points to a section of the page: key figures, drawings, a table. The same for sweeps and for benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tuner.report import curves, heatmap
from tuner.report.points import COPY, NAMES, OURS, Point, by_kind, grid, mean_ratio, providers
from tuner.report.style import Drawing, drawing_style

LARGE_BYTES = 32e6
"""From here on bandwidth, not latency, decides: the points of the figure of GB/s."""
FEW = 4
"""A kind with fewer problems gets no heatmap of its own; it is in the table."""
MAIN_KIND = "bf16"

Value = int | float | str | None


@dataclass(frozen=True)
class Table:
    """Sortable rows. A number is shown with its column's digits (None: as it is), and a missing value as an empty cell."""

    columns: tuple[str, ...]
    digits: tuple[int | None, ...]
    rows: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class Section:
    """A part of the page about one device: its name for links and files, key figures as (label, value), drawings, a table."""

    slug: str
    title: str
    origin: str
    key_figures: tuple[tuple[str, str], ...]
    drawings: tuple[Drawing, ...]
    more_drawings: tuple[Drawing, ...] = field(default=())
    table: Table | None = None


def section(slug: str, title: str, origin: str, points: Sequence[Point]) -> Section:
    """Everything about the points of one device. origin: device, versions, date."""
    groups = by_kind(points)
    main = MAIN_KIND if MAIN_KIND in groups else next(iter(groups))
    with drawing_style():
        drawings = [*_curves(slug, main, origin, groups[main]), *_maps(slug, main, origin, groups[main])]
        more = [
            _fraction_map(f"{slug}-{_slug(kind)}-fraction", f"Fraction of copy speed, {kind}", origin, group)
            for kind, group in groups.items()
            if kind != main and len(group) >= FEW
        ]
    return Section(slug, title, origin, _key_figures(points), tuple(drawings), tuple(more), _table(points))


def _key_figures(points: Sequence[Point]) -> tuple[tuple[str, str], ...]:
    fractions = [fraction for point in points if (fraction := point.ratio(COPY))]
    large = [fraction for point in points if point.problem.bytes_moved >= LARGE_BYTES and (fraction := point.ratio(COPY))]
    found = [("problems", str(len(points))), ("of copy speed", f"{statistics.geometric_mean(fractions):.2f}")]
    if large:
        found.append((f"of copy speed from {LARGE_BYTES / 1e6:.0f} MB", f"{statistics.geometric_mean(large):.2f}"))
    bests = [best[1] for point in points if (best := point.best_other())]
    if bests:
        found.append(("times as fast as the best other", f"{statistics.geometric_mean(bests):.2f}"))
        found.append(("at least, on one problem", f"{min(bests):.2f}"))
    for name in providers(points):
        ratio = mean_ratio(points, name)
        if name != OURS and ratio:
            found.append((f"times as fast as {NAMES[name]}", f"{ratio:.2f}"))
    return tuple(found)


def _curves(slug: str, kind: str, origin: str, points: Sequence[Point]) -> list[Drawing]:
    names = [*providers(points), COPY]
    large: dict[int, Point] = {}
    for point in sorted(points, key=lambda point: point.problem.bytes_moved):
        if point.problem.bytes_moved >= LARGE_BYTES:
            large[point.problem.cols] = point
    drawings = []
    if len(large) > 1:
        ordered = [large[cols] for cols in sorted(large)]
        lines = {name: [(p.problem.cols, p.gbs(name)) for p in ordered if name in p.us] for name in names}
        lines = {name: line for name, line in lines.items() if line}
        title = f"Bandwidth by columns, {kind}, most rows of each"
        drawings.append(curves.bandwidth(f"{slug}-bandwidth", title, origin, lines))
    lines = {name: [(point.problem.bytes_moved, point.us[name]) for point in points if name in point.us] for name in names}
    drawings.append(curves.latency(f"{slug}-latency", f"Latency by bytes, {kind}", origin, {n: line for n, line in lines.items() if line}))
    return drawings


def _maps(slug: str, kind: str, origin: str, points: Sequence[Point]) -> list[Drawing]:
    drawings = [_fraction_map(f"{slug}-fraction", f"Fraction of copy speed, {kind}", origin, points)]
    for name in ("eager", "compile"):
        cells = grid(points, _ratio_over(name))
        if cells:
            drawings.append(heatmap.speedup_map(f"{slug}-over-{name}", f"Times as fast as {NAMES[name]}, {kind}", origin, cells))
    variants = {(point.problem.rows, point.problem.cols): _variant_cell(point) for point in points if point.config}
    if variants:
        title = f"Variant that runs, with its warps, {kind}"
        drawings.append(heatmap.variant_map(f"{slug}-variant", title, origin, variants))
    losses = {place: (ratio - 1) * 100 for place, ratio in grid(points, _ratio_over("heuristic")).items()}
    if losses:
        title = f"Loss in % if the heuristic chose, {kind}"
        name = f"{slug}-heuristic"
        drawings.append(heatmap.number_map(name, title, origin, losses, colours="OrRd", low=0.0, high=30.0, text=percent))
    return drawings


def _fraction_map(name: str, title: str, origin: str, points: Sequence[Point]) -> Drawing:
    cells = grid(points, _ratio_over(COPY))
    return heatmap.number_map(name, title, origin, cells, colours="YlGnBu", low=0.3, high=1.2, text=lambda value: f"{value:.2f}")


def _ratio_over(name: str) -> Callable[[Point], float | None]:
    return lambda point: point.ratio(name)


def _variant_cell(point: Point) -> tuple[str, str]:
    return point.variant, point.param("num_warps")


def percent(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 0.5 else "0"


def _table(points: Sequence[Point]) -> Table:
    """A row for each problem; ratios say how many times as fast ours is."""
    others = [name for name in providers(points) if name != OURS]
    columns = ("rows", "cols", "kind", "µs", "GB/s", "of copy", "× best other", *(f"× {NAMES[name]}" for name in others), "config")
    digits = (None, None, None, 2, 0, 2, 2, *(2 for _ in others), None)
    rows = []
    for point in points:
        own, moved = point.us.get(OURS), point.problem
        gbs = point.gbs(OURS) if own else None
        best = point.best_other()
        ratios = (point.ratio(COPY), best and best[1], *(point.ratio(name) for name in others))
        rows.append((moved.rows, moved.cols, point.kind, own, gbs, *ratios, point.config))
    return Table(columns, digits, tuple(rows))


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text.lower())
